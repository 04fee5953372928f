"""What an optimizer step costs a pipeline, where all ranks meet at its end and where it is validated during the next step.

    python tools/benchmark_post_validation.py
    python tools/benchmark_post_validation.py --schedules zb-h2 zb-v --micro-batches 8 --json figures.json

One process per pp rank, gloo. A stage sleeps 20 ms for each F, I and W (B is I + W); weights, optimizer and messages are real,
and tiny. Milliseconds per step, over steps in a row:

busy             the sleep of one rank in one step: what a schedule without a bubble takes
no optimizer     the schedule alone: what its lists take, one step after the other
ordinary         NativeZero: at the end of a step all ranks wait for the gradient norm
post-validated   PostValidatedZero, where no gradient is clipped
all corrected    the same where every step is clipped: each begins a second time

Where other programs use the machine, run it as root under `chrt --fifo 10`: sleepers then wake in time.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.multiprocessing.spawn import start_processes

    from megatron_llama.tool_frame import run_tool
    from parallel.groups import Axis, ProcessGroups, build_groups
    from parallel.kernels.table import resolve_kernels
    from parallel.pipeline.executor import Executor
    from parallel.pipeline.layout import Placement
    from parallel.pipeline.p2p import both_ways
    from parallel.pipeline.schedules import SCHEDULES, Action, Schedule
    from parallel.pipeline.speculation import speculative_start
    from parallel.shards import Box, Segment, Shard
    from parallel.tensor.deferred import WeightGradientQueue
    from parallel.tensor.linear import ColumnParallelLinear
    from parallel.tensor.parameter import ShardedParameter
    from parallel.topology import Topology
    from parallel.zero.engine import OptimizerSettings
    from parallel.zero.native import NativeZero
    from parallel.zero.post_validation import PostValidatedZero
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

CPU = torch.device("cpu")
SHAPE = (1, 1, 4)  # [s, b, h]
NEVER, ALWAYS = 1e9, 1e-9  # norms to clip to
ROUNDS = 3
WAYS = ("no optimizer", "ordinary", "post-validated", "all corrected")


class Stage(nn.Module):
    """One linear layer, with the sum of squares as the loss."""

    def __init__(self, number: int, is_last: bool) -> None:
        super().__init__()
        h = SHAPE[-1]
        self.is_last, self.weight_gradients = is_last, WeightGradientQueue()
        whole = Box.whole((h, h))
        weight = ShardedParameter(Shard((h, h), (Segment(f"stages.{number}", (h, h), whole, whole),)), torch.float32, CPU)
        nn.init.eye_(weight)
        self.linear = ColumnParallelLinear(weight, Axis.single("tp"), False, resolve_kernels(), self.weight_gradients)

    def forward(self, x: Tensor | None, micro_batch: Tensor) -> Tensor:
        y = self.linear(micro_batch if x is None else x)
        return y.square().sum() if self.is_last else y


@dataclass
class SleepingExecutor(Executor):
    """Each action takes as long as a device would."""

    sleep_seconds: float = 0.0

    def _compute(self, action: Action, arrived: Tensor | None, micro_batch: Tensor, train: bool) -> Tensor | None:
        end = time.perf_counter() + self.sleep_seconds * (2 if action.kind == "B" else 1)
        made = super()._compute(action, arrived, micro_batch, train)
        time.sleep(max(0.0, end - time.perf_counter()))
        return made


class Listener:
    """In place of an engine."""

    def expect_passes(self, count: int) -> None:
        pass


@dataclass(frozen=True)
class Case:
    """What is measured: a schedule, its sizes, and how long the stages sleep."""

    name: str
    pp: int
    micro_batches: int
    sleep_seconds: float
    steps: int

    @property
    def placement(self) -> Placement:
        kind = SCHEDULES[self.name]
        return kind.placement(self.pp, kind.min_chunks)

    @property
    def schedule(self) -> Schedule:
        return SCHEDULES[self.name](self.placement, self.micro_batches)

    @property
    def busy_seconds(self) -> float:
        return 3 * self.micro_batches * self.placement.chunks * self.sleep_seconds


def make_step(case: Case, way: str, groups: ProcessGroups) -> Callable[[], object]:
    """One training step of this rank."""
    rank, placement, schedule = groups.place.pp, case.placement, case.schedule
    stages = [placement.stage(rank, chunk) for chunk in range(placement.chunks)]
    chunks = [Stage(stage, stage == placement.num_stages - 1) for stage in stages]
    executor = SleepingExecutor(chunks, placement, groups, SHAPE, torch.float32, CPU, sleep_seconds=case.sleep_seconds)
    batches = [torch.full(SHAPE, 1.0 + number) for number in range(case.micro_batches)]
    if way == "no optimizer":
        return lambda: executor.run(schedule[rank], batches, Listener())
    settings = OptimizerSettings(clip_norm=ALWAYS if way == "all corrected" else NEVER)
    engine_class = NativeZero if way == "ordinary" else PostValidatedZero
    engine, start = engine_class(chunks, groups, settings), None
    if isinstance(engine, PostValidatedZero):
        start = speculative_start(schedule, placement, rank, engine.validate)

    def step() -> None:
        engine.begin_step()
        executor.run(schedule[rank], batches, engine, start)
        engine.step(1e-6, torch.zeros(1, dtype=torch.float64))

    return step


def rank_main(rank: int, case: Case, folder: str) -> None:
    """One rank's process, forked: leaves the seconds per step of every round. The ways take turns."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=case.pp)
    groups = build_groups(Topology(pp=case.pp), rank, both_ways=both_ways(case.placement))
    steps = {way: make_step(case, way, groups) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, step in steps.items():
            dist.barrier()
            step()  # fills the pipeline
            start = time.perf_counter()
            for _ in range(case.steps):
                step()
            seconds[way].append((time.perf_counter() - start) / case.steps)
    dist.barrier()
    Path(folder, f"rank-{rank}").write_bytes(pickle.dumps(seconds))


def measure(case: Case) -> dict[str, float]:
    """Seconds per step, of the rank that takes longest; the median of the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(rank_main, (case, folder), nprocs=case.pp, start_method="fork")
        ranks = [pickle.loads(Path(folder, f"rank-{rank}").read_bytes()) for rank in range(case.pp)]
    return {way: median(map(max, zip(*(seconds[way] for seconds in ranks), strict=True))) for way in WAYS}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("1f1b", "zb-h1", "zb-h2", "zb-v")
    described = f"({' '.join(names)})"
    parser.add_argument("--schedules", nargs="+", choices=tuple(SCHEDULES), default=names, metavar="NAME", help=described)
    parser.add_argument("--pp", type=int, default=4, metavar="N", help="pipeline ranks (%(default)s)")
    parser.add_argument("--micro-batches", type=int, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="in a row (%(default)s)")
    parser.add_argument("--sleep-ms", type=float, default=20.0, metavar="MS", help="of F, I and W each (%(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    for name in arguments.schedules:
        SCHEDULES[name].validate(arguments.pp, SCHEDULES[name].min_chunks, arguments.micro_batches)
    load = " ".join(f"{load:.1f}" for load in os.getloadavg())
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": f"{os.cpu_count()} x {platform.machine()} CPU; load average {load}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "sizes": f"pp {arguments.pp}; {arguments.micro_batches} micro-batches; F, I, W {arguments.sleep_ms:g} ms; "
        f"{arguments.steps} steps in a row, the median of {ROUNDS} rounds",
    }
    for name, fact in facts.items():
        print(f"{name:11s}{fact}", flush=True)
    print("".join(f"{title:>16}" for title in ("schedule", "busy, ms", *WAYS)))
    torch.set_num_threads(1)  # the ranks are forked
    rows = []
    for name in arguments.schedules:
        case = Case(name, arguments.pp, arguments.micro_batches, arguments.sleep_ms / 1e3, arguments.steps)
        seconds = {"busy": case.busy_seconds, **measure(case)}
        rows.append({"schedule": name, "seconds_per_step": seconds})
        print(f"{name:>16}" + "".join(f"{1e3 * value:16.0f}" for value in seconds.values()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
