"""Numbers that go wrong, planted in forked ranks: each function returns a `Change`, which runs in a rank before its program.

`together` joins several. A fault of a step happens `times` times in a process, when it gets there; a poisoned sample is bad
whenever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from megatron_llama.data.loader import Loader, MicroBatch
from parallel.heartbeat import Heartbeat
from parallel.pipeline.executor import Executor
from parallel.zero.buckets import Sink
from parallel.zero.native import NativeZero
from tests.megatron_llama.programs import Change

NAN = float("nan")


def together(*changes: Change) -> Change:
    def change(rank: int) -> None:
        for one in changes:
            one(rank)

    return change


def poisoned_samples(factors: Mapping[int, float]) -> Change:
    """The loss of these samples is multiplied by a factor: NaN, or one that makes a spike."""

    def change(rank: int) -> None:
        read = Loader.micro_batches

        def poisoned(self: Loader, first_sample: int) -> list[MicroBatch]:
            size, first = self.micro_batch_size, first_sample + self.dp_rank * self.num_micro_batches * self.micro_batch_size
            batches = read(self, first_sample)
            for sample, factor in factors.items():
                number, place = divmod(sample - first, size)
                if 0 <= number < len(batches):
                    mask = batches[number].loss_mask.clone()
                    mask[:, place] *= factor
                    batches[number] = replace(batches[number], loss_mask=mask)
            return batches

        Loader.micro_batches = poisoned

    return change


def _at(step: int, rank: int, times: int, plant: Callable[[Callable[[], bool]], None]) -> Change:
    """`plant` is told how to ask whether the fault is to happen now; it happens once for each yes."""

    def change(own_rank: int) -> None:
        if own_rank != rank:
            return
        enter, now, left = Heartbeat.enter, [0], [times]

        def follow(self: Heartbeat, phase: str, at: int = 0) -> None:
            now[0] = at
            enter(self, phase, at)

        def strikes() -> bool:
            if now[0] != step or not left[0]:
                return False
            left[0] -= 1
            return True

        Heartbeat.enter = follow
        plant(strikes)

    return change


def bad_loss(rank: int, step: int, times: int = 1) -> Change:
    """The loss of all micro-batches of a rank is NaN; of no effect where a rank has no loss."""

    def plant(strikes: Callable[[], bool]) -> None:
        run = Executor.run

        def spoiled(self: Executor, actions, micro_batches, listener=None, start=None):
            if listener is not None and strikes():
                micro_batches = [replace(batch, loss_mask=batch.loss_mask * NAN) for batch in micro_batches]
            return run(self, actions, micro_batches, listener, start)

        Executor.run = spoiled

    return _at(step, rank, times, plant)


def bad_gradient(rank: int, step: int, times: int = 1, name: str = "") -> Change:
    """One element of a rank's gradient is infinite: that of the parameter of this name, or of the first one that is made."""

    def plant(strikes: Callable[[], bool]) -> None:
        ready = Sink.ready

        def spoiled(self: Sink) -> None:
            names = [segment.name for segment in self.parameter.shard.segments]
            if (not name or name in names) and strikes():
                segment = self.parameter.shard.segments[names.index(name) if name else 0]
                gradient = self.main_grad[segment.local.slices()]
                gradient[(0,) * gradient.dim()] = torch.inf
            ready(self)

        Sink.ready = spoiled

    return _at(step, rank, times, plant)


def bad_weight(rank: int, step: int) -> Change:
    """One of the rank's master weights becomes infinite in memory, before the step."""

    def plant(strikes: Callable[[], bool]) -> None:
        begin = NativeZero.begin_step

        def spoiled(self: NativeZero) -> None:
            if strikes():
                self.buckets[0].local_weights[0] = torch.inf
            begin(self)

        NativeZero.begin_step = spoiled

    return _at(step, rank, 1, plant)
