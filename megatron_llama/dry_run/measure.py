"""One rank's training step on meta tensors, measured: parameters, memory, messages and floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from megatron_llama.config import RunConfig, masks_documents, micro_batches_per_step
from megatron_llama.data.boundaries import boundaries
from megatron_llama.data.loader import MicroBatch
from megatron_llama.dry_run.allocations import COMPONENTS, AllocationLedger
from megatron_llama.dry_run.fake_world import fake_world
from megatron_llama.dry_run.shapes import META, Shapes
from megatron_llama.dry_run.traffic import Traffic, traffic
from megatron_llama.runtime import Runtime, build_runtime
from megatron_llama.step import TrainStep, make_engine
from megatron_llama.verdict import NO_SUMS
from parallel.topology import Coordinates
from parallel.zero.native import NativeZero


@dataclass(frozen=True)
class Figures:
    """What one rank holds and does in one training step; bytes are those of tensors.

    `parameters`: that the rank holds, padding left out, copies counted. `shared_parameters`: the same, but of what n ranks hold
    copies of along tensor or embedding axes, 1/n: added up over the model-parallel ranks it is the model's size. `peak`: bytes
    by component when most were live. `held`: between steps, likewise. `flops`: by operator.
    """

    rank: int
    place: Coordinates
    layers: Sequence[range]
    micro_batches: int
    parameters: int
    shared_parameters: float
    peak: dict[str, int]
    held: dict[str, int]
    traffic: list[Traffic]
    flops: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


class StepLedger(AllocationLedger):
    """Allocations of a step on meta tensors, whose operators `shapes` runs."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(META.type)
        self.shapes = shapes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: without torch's guard against it an operator takes a quarter less time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result, may_be_new = self.shapes.run(func, args, kwargs or {})
        if may_be_new:
            self.account(func, args, kwargs, result)
        return result


def measure(
    config: RunConfig, rank: int, world_size: int, gpus_per_node: int, shapes: Shapes | None = None
) -> Figures:
    """Build one rank's part of the program and run a step. `config` has passed `validate`, its schedule is settled.

    `shapes`: those of ranks before, which save time. A step without micro-batches comes first: it leaves behind what every step
    leaves, gathers of weights on their way.
    """
    ledger = StepLedger(shapes or Shapes())
    with fake_world(rank, world_size) if world_size > 1 else nullcontext(), ledger:
        runtime = build_runtime(config, rank, world_size, META, timedelta(minutes=1), fresh=False)
        engine = make_engine(runtime)
        assert isinstance(engine, NativeZero)
        ledger.follow_engine(engine)
        count = micro_batches_per_step(config, world_size)
        step = TrainStep(runtime, engine, count)
        ledger.follow(step.executor)
        _empty_step(step, engine, config.optimizer.learning_rate)
        micro_batch = one_micro_batch(config)
        batch = step.prepare([micro_batch] * count)
        held = dict(ledger.live)
        runtime.groups.ledger.clear()
        ledger.shapes.flops.clear()
        ledger.reset_peak()
        following = step.prepare([micro_batch] * count)  # as the trainer does
        step.run(batch, config.optimizer.learning_rate, step=2)
        del following
        return Figures(
            rank=rank,
            place=runtime.groups.place,
            layers=[runtime.layers[runtime.placement.stage(runtime.groups.place.pp, c)] for c in range(config.parallel.chunks)],
            micro_batches=count,
            parameters=_parameters(runtime, shared=False),
            shared_parameters=_parameters(runtime, shared=True),
            peak={name: ledger.peak.get(name, 0) for name in COMPONENTS},
            held={name: held.get(name, 0) for name in COMPONENTS},
            traffic=traffic(runtime.groups, gpus_per_node),
            flops=dict(ledger.shapes.flops),
        )


def _empty_step(step: TrainStep, engine: NativeZero, learning_rate: float) -> None:
    """A step of no micro-batches: reduction, update, and weights on their way."""
    engine.begin_step()
    sums = torch.zeros(1 + len(NO_SUMS), dtype=torch.float64, device=META)
    step.watch.after_step(engine.step(learning_rate, sums, step.watch.before_step(1).judge))


def one_micro_batch(config: RunConfig) -> MicroBatch:
    """A micro-batch as the loader makes it, of zeros; each sample is one document."""
    length, size = config.train.sequence_length, config.train.micro_batch_size
    positions, documents = torch.arange(length)[:, None], None
    if masks_documents(config.data):
        positions, documents = boundaries([np.empty(0, np.int64)] * size, length)
    tokens = torch.zeros(length, size, dtype=torch.int64)
    return MicroBatch(tokens, tokens, torch.ones(length, size), positions, documents)


def _parameters(runtime: Runtime, shared: bool) -> float:
    """Elements of the logical tensors on this rank; `shared`: of those with copies, its share."""
    parameters = {id(p): p for chunk in runtime.chunks for p in chunk.parameters()}.values()
    segments = [segment for parameter in parameters for segment in parameter.shard.segments]
    copies = [segment.replica.size if shared and segment.replica else 1 for segment in segments]
    return sum(segment.box.numel / size for segment, size in zip(segments, copies, strict=True))
