"""One rank of the overlap benchmark: training steps of the program itself, with the link as it is and then limited."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import median

import torch
from _nodes import limit_rate, transmitted_bytes
from torch import Tensor

from megatron_llama.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig, ZeroConfig
from megatron_llama.data.loader import MicroBatch
from megatron_llama.runtime import build_runtime
from megatron_llama.step import TrainStep, make_engine
from parallel import launch
from parallel.collectives import all_reduce, barrier, start_exchange
from parallel.groups import Axis

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=5)
LEARNING_RATE = 1e-4
MODES = {"zero": ("off", "on"), "tp": ("none", "backward", "chunks")}  # without overlap first


@dataclass(frozen=True)
class Case:
    """What is measured: `kind` is data parallelism with ZeRO stage 1, or tensor parallelism with sequence parallelism."""

    kind: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int
    sequence_length: int
    batch: int  # samples of a rank's micro-batch
    rounds: int
    megabits: float  # of the limited link

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_heads=self.heads,
            ffn_hidden_size=self.ffn,
            vocab_size=self.vocabulary,
        )

    def config(self, mode: str) -> RunConfig:
        """Two ranks; one micro-batch per step; in data parallelism about one bucket per layer."""
        if self.kind == "zero":
            parallel, zero = ParallelConfig(dp=2), ZeroConfig(overlap=mode == "on", bucket_size=self.layer_parameters)
        else:
            parallel, zero = ParallelConfig(tp=2, dp=1, tp_overlap=mode), ZeroConfig()
        train = TrainConfig(
            steps=1,
            global_batch_size=self.batch * parallel.dp,
            micro_batch_size=self.batch,
            sequence_length=self.sequence_length,
            dtype="fp32",
        )
        optimizer = OptimizerConfig(learning_rate=LEARNING_RATE)
        return RunConfig(model=self.model, parallel=parallel, zero=zero, train=train, optimizer=optimizer)

    @property
    def layer_parameters(self) -> int:
        """Of a layer's matrices."""
        return self.hidden * (4 * self.hidden + 3 * self.ffn)


@dataclass(frozen=True)
class Step:
    """One measured step: seconds on the clock and of the CPU; bytes by the ledger and by the interface."""

    seconds: float
    cpu_seconds: float
    ledger_bytes: float
    interface_bytes: float
    loss: float


class Contestant:
    """The program in one mode."""

    def __init__(self, case: Case, mode: str, rank: int) -> None:
        self.runtime = build_runtime(case.config(mode), rank, 2, CPU, TIMEOUT)
        self.engine = make_engine(self.runtime)
        self.step = TrainStep(self.runtime, self.engine, 1)
        generator = torch.Generator().manual_seed(1 + self.runtime.groups.data.rank)
        tokens = torch.randint(case.vocabulary, (case.sequence_length + 1, case.batch), generator=generator)
        places = torch.arange(case.sequence_length)[:, None]
        self.micro_batch = MicroBatch(tokens[:-1], tokens[1:], torch.ones(tokens[1:].shape), places)

    def measure(self) -> Step:
        """The second of two steps, so that the gathers of the first are behind it; bytes are those of both."""
        groups, ends, cpu = self.runtime.groups, [], []
        barrier(groups.world, CPU)
        groups.ledger.clear()
        before = transmitted_bytes()
        for _ in range(2):
            info = self.step.run(self.step.prepare([self.micro_batch]), LEARNING_RATE)
            ends.append(time.perf_counter())
            cpu.append(cpu_seconds())
        self.engine.finish()
        ledger_bytes = sum(groups.ledger.sent_bytes.values())
        barrier(groups.world, CPU)
        sent = transmitted_bytes() - before
        return Step(ends[1] - ends[0], cpu[1] - cpu[0], ledger_bytes / 2, sent / 2, info.sums[0].item())


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def compete(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[Step]]:
    """All contestants in turn, in another order each round, after a round that does not count."""
    names = list(contestants)
    steps: dict[str, list[Step]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            steps[name].append(contestants[name].measure())
    return {name: measured[1:] for name, measured in steps.items()}


def link_bytes_per_second(world: Axis, size: int) -> float:
    """Each way, of messages of that size."""
    message, other, seconds = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8), []
    for _ in range(3):
        barrier(world, CPU)
        start = time.perf_counter()
        start_exchange(message, other, world, 1).wait()
        seconds.append(time.perf_counter() - start)
    return size / median(seconds)


def product_seconds(case: Case, world: Axis) -> dict[str, float]:
    """Of a rank's forward product of each linear, both ranks at once: the slower one's."""
    hidden, ffn, split = case.hidden, case.ffn, 2 if case.kind == "tp" else 1
    shapes = {
        "wqkv": (hidden, 3 * hidden // split),
        "wo": (hidden // split, hidden),
        "w13": (hidden, 2 * ffn // split),
        "w2": (ffn // split, hidden),
        "head": (hidden, case.vocabulary // split),
    }
    seconds = {}
    for name, (inputs, outputs) in shapes.items():
        x, weight = torch.randn(case.sequence_length * case.batch, inputs), torch.randn(outputs, inputs)
        seconds[name] = median(_seconds_of(x, weight) for _ in range(5))
    slower = torch.tensor(list(seconds.values()), dtype=torch.float64)
    all_reduce(slower, world, torch.distributed.ReduceOp.MAX)
    return dict(zip(seconds, slower.tolist(), strict=True))


def _seconds_of(x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    torch.mm(x, weight.t())
    return time.perf_counter() - start


def main() -> None:
    """The case is the argument, in JSON; what was measured is printed, in JSON."""
    case = Case(**json.loads(sys.argv[1]))
    place = launch.detect()
    launch.start(place, CPU, TIMEOUT)
    contestants = {mode: Contestant(case, mode, place.rank) for mode in MODES[case.kind]}
    world = contestants[MODES[case.kind][0]].runtime.groups.world
    products = product_seconds(case, world)
    unlimited = compete(contestants, case.rounds)
    limit_rate(case.megabits)
    bandwidth = link_bytes_per_second(world, size=4 * 2**20)
    limited = compete(contestants, case.rounds)
    layers = next(iter(contestants.values())).engine.buckets
    measured = {
        "products": products,
        "bandwidth": bandwidth,
        "bucket_bytes": [bucket.main_grad.nbytes for bucket in layers],
        "unlimited": {mode: [asdict(step) for step in steps] for mode, steps in unlimited.items()},
        "limited": {mode: [asdict(step) for step in steps] for mode, steps in limited.items()},
    }
    launch.stop()
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
