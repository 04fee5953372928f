"""Pipeline parallelism: a schedule is data. Reading order: layout, schedules, costs, simulate, check, choice, p2p, executor."""
