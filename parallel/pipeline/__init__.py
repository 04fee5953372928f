"""Pipeline parallelism: a schedule is data. Reading order: layout, schedules, check, p2p, executor."""
