"""Training with split backward passes and with several chunks on a rank, by lists made by hand, against whole ones.

Splitting changes no bit: not over tensor ranks, nor under sequence parallelism, recomputation, a tied head, or buckets that
leave while weight gradients still wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

import megatron_llama.runtime
import megatron_llama.step
from megatron_llama.config import ParallelConfig
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import one_forward_one_backward
from parallel.zero.buckets import Bucket
from tests.parallel.pipeline.lists import all_forward_all_backward, split_backward
from tests.parity.comparison import differences, inexact, reference
from tests.parity.test_parity import GQA, SGD, SHALLOW, SMALL_BATCH, TIED, layout
from tests.parity.training import Case, train
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Lists:
    """A schedule: whole backward passes, or split ones whose W come `delay` I later."""

    delay: int | None = None

    def placement(self, pp: int, chunks: int) -> Placement:
        return Placement(pp, chunks)

    def __call__(self, placement: Placement, micro_batches: int):
        made = one_forward_one_backward if placement.chunks == 1 else all_forward_all_backward
        schedule = made(placement, micro_batches)
        return schedule if self.delay is None else split_backward(schedule, self.delay)


def train_with(rank: int, world_size: int, case: Case, lists: Lists, steps: int):
    schedules = {case.parallel.schedule: lists}
    megatron_llama.step.SCHEDULES = megatron_llama.runtime.SCHEDULES = schedules
    return train(rank, world_size, case, steps)


SPLIT_CASES = [
    Case("one-process", layout(), SHALLOW),
    Case("tp2", layout(tp=2), SHALLOW, SMALL_BATCH),
    Case("selective-tp2-sp", layout(tp=2, sequence_parallel=True, recompute="selective"), SHALLOW, SMALL_BATCH),
    Case("full-tp2-sp", layout(tp=2, sequence_parallel=True, recompute="full"), SHALLOW, SMALL_BATCH),
    Case("full", layout(recompute="full"), GQA),
    Case("tied", layout(), replace(TIED, num_layers=2)),
    Case("tied-pp2", layout(pp=2), TIED, SMALL_BATCH),
    Case("pp2-dp2-zero1", layout(pp=2, dp=2), SHALLOW),
]


@pytest.mark.parametrize("case", SPLIT_CASES, ids=lambda case: case.name)
def test_splitting_the_backward_pass_changes_no_bit(case: Case) -> None:
    whole = run_ranks(case.world_size, train_with, case, Lists(), 3)
    split = run_ranks(case.world_size, train_with, case, Lists(delay=2), 3)
    assert inexact(split, whole) == []


def chunked(chunks: int, **settings) -> ParallelConfig:
    return layout(chunks=chunks, **settings)


def test_a_tied_head_in_another_chunk_of_the_same_rank() -> None:
    """It is the same parameter as the embedding, used twice. (Other cases of several chunks: test_schedules.)"""
    case = Case("tied-chunks2", chunked(2), TIED, SMALL_BATCH, SGD)
    assert differences(case, run_ranks(1, train_with, case, Lists(1), 8)) == []


def leave_one_gradient_early(monkeypatch) -> None:
    """A bucket that leaves before its last weight gradient."""

    def early(self):
        self.expected_gradients -= 1
        if self.expected_gradients == 1:
            self.has_left = True
            self._leave(self)

    monkeypatch.setattr(Bucket, "gradient_ready", early)


def test_a_bucket_that_leaves_a_weight_gradient_early_is_caught(monkeypatch) -> None:
    """Even where nothing asserts it: the data ranks' sums lack a gradient."""
    case = Case("early", layout(dp=2), SHALLOW, SMALL_BATCH, SGD)
    reference(case)
    leave_one_gradient_early(monkeypatch)
    assert differences(case, run_ranks(2, train_with, case, Lists(1), 8)) != []
