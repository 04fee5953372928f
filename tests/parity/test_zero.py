"""The native engine's ways to reduce, shard and gather: each gives what one process gives.

Stages 0 and 1 in other layouts: test_parity. Bytes on the wire: test_counts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

import parallel.collectives
import tests.parity.training
from megatron_llama.config import ZeroConfig
from parallel.zero.buckets import Bucket
from parallel.zero.native import NativeZero
from parallel.zero.traffic import Gathers
from tests.parity.comparison import differences, inexact, reference
from tests.parity.test_parity import GQA, SGD, SHALLOW, SMALL_BATCH, TIED, layout
from tests.parity.training import TRAIN, Case, Outcome, Session, train
from tests.ranks import run_ranks

STAGE_2, GROUPS_OF_2 = ZeroConfig(stage=2), ZeroConfig(shard_group_size=2)
TWO_LAYERS_TIED = replace(TIED, num_layers=2)

CASES = [  # clipping is at work in all of them
    Case("stage-2", layout(dp=2), SHALLOW, SMALL_BATCH, SGD, STAGE_2),
    Case("stage-2-tp2-sp-dp2", layout(tp=2, dp=2, sequence_parallel=True), SHALLOW, zero=STAGE_2, ragged=True),
    Case("stage-2-kv-below-tp", layout(tp=4, sequence_parallel=True), GQA, SMALL_BATCH, zero=STAGE_2),
    Case("stage-2-tied-full-recompute", layout(dp=2, recompute="full"), TWO_LAYERS_TIED, SMALL_BATCH, SGD, STAGE_2),
    Case("stage-2-split-backward", layout(dp=2, schedule="zb-h1"), SHALLOW, SMALL_BATCH, zero=STAGE_2),
    Case("groups-of-2", layout(dp=4), SHALLOW, zero=GROUPS_OF_2, optimizer=SGD),
    Case(
        "groups-of-1-pp2-tied", layout(pp=2, dp=2), TWO_LAYERS_TIED, SMALL_BATCH, zero=replace(GROUPS_OF_2, shard_group_size=1)
    ),
    Case("stage-2-groups-of-2", layout(dp=4), SHALLOW, zero=replace(STAGE_2, shard_group_size=2), ragged=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_as_one_process(case: Case) -> None:
    assert differences(case, run_ranks(case.world_size, train, case)) == []


BF16_WIRE, BF16_GRADIENTS = ZeroConfig(reduce_dtype="bf16"), ZeroConfig(gradient_dtype="bf16")
BF16_CASES = [
    Case("wire", layout(tp=2, dp=2, sequence_parallel=True), zero=BF16_WIRE),
    Case("wire-stage-0", layout(dp=2), zero=replace(BF16_WIRE, stage=0)),
    Case("wire-groups-of-2", layout(dp=4), zero=replace(BF16_WIRE, shard_group_size=2)),
    Case("gradients", layout(pp=2, dp=2), zero=BF16_GRADIENTS),
    Case("gradients-stage-2-tp2-sp", layout(tp=2, dp=2, sequence_parallel=True), zero=replace(BF16_GRADIENTS, stage=2)),
]


@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_bf16_is_close_to_one_process_in_bf16(case: Case) -> None:
    """One process adds up its micro-batches in fp32 and sends nothing."""
    case = replace(case, model=SHALLOW, train=replace(TRAIN, dtype="bf16"))
    assert differences(case, run_ranks(case.world_size, train, case)) == []


def train_without_pauses(rank: int, world_size: int, case: Case) -> Outcome:
    """Nobody waits for the weights after a step but whoever uses them."""
    session = Session(rank, world_size, case)
    finish, session.engine.finish = session.engine.finish, lambda: None
    for step in range(3):
        session.step(step)
    finish()
    return session.finish()


@pytest.mark.parametrize(
    ("parallel", "zero"),
    [
        (layout(dp=2), STAGE_2),
        (layout(tp=2, dp=2, sequence_parallel=True, recompute="full"), ZeroConfig()),
        (layout(dp=4), GROUPS_OF_2),
    ],
    ids=["stage-2", "stage-1-tp2-sp", "groups-of-2"],
)
def test_overlap_changes_no_bit(parallel, zero: ZeroConfig) -> None:
    case = Case("overlap", parallel, SHALLOW, zero=zero)
    apart = replace(case, zero=replace(zero, overlap=False))
    ranks = case.world_size
    assert inexact(run_ranks(ranks, train_without_pauses, case), run_ranks(ranks, train_without_pauses, apart)) == []


def test_every_weight_is_waited_for_where_it_is_used(monkeypatch) -> None:
    """With a bucket for each parameter, none comes along with another one's. Whoever computes with a weight without calling its
    module would not wait for it."""
    reduce_gradients = NativeZero.reduce_gradients

    def check_and_reduce(self):
        late = [bucket.parameters[0].shard.segments[0].name for bucket in self.buckets if bucket.gather is not None]
        assert late == [], "used before they were there"
        reduce_gradients(self)

    monkeypatch.setattr(tests.parity.training, "BUCKET_SIZE", 1)
    monkeypatch.setattr(NativeZero, "reduce_gradients", check_and_reduce)
    run_ranks(2, train_without_pauses, Case("one-parameter-per-bucket", layout(dp=2), SHALLOW, SMALL_BATCH))


# ---- planted bugs -------------------------------------------------------------------------------------------------------


def forget_the_pass_before(monkeypatch) -> None:
    """What a bucket brings to its shard takes the place of what came before."""
    finish = Bucket._finish_scatter

    def overwrite(self):
        if self._scatter is not None and self.every_pass:
            self.master_grad.zero_()
        finish(self)

    monkeypatch.setattr(Bucket, "_finish_scatter", overwrite)


def add_up_in_one_group_only(monkeypatch) -> None:
    monkeypatch.setattr(Bucket, "start_copies_sum", lambda self: None)


def count_copies_in_the_norm(monkeypatch) -> None:
    local_totals = NativeZero._local_totals

    def counted(self, sums):
        totals = local_totals(self, sums)
        totals[0] *= self.copies_axis.size
        return totals

    monkeypatch.setattr(NativeZero, "_local_totals", counted)


def start_too_few_gathers(monkeypatch) -> None:
    """Only the first weights come; the others stay those of the step before."""
    monkeypatch.setattr(Gathers, "wait_for", lambda self, bucket: bucket.wait_gather())
    monkeypatch.setattr(Gathers, "finish", lambda self: [bucket.wait_gather() for bucket in self._buckets])


def lose_a_ranks_piece(monkeypatch) -> None:
    def lose(self):
        self.exchange.wait()
        self.out.copy_(self.pieces[0])

    monkeypatch.setattr(parallel.collectives.SumOfPieces, "wait", lose)


PLANTED = [
    (forget_the_pass_before, CASES[0]),
    (add_up_in_one_group_only, CASES[5]),
    (count_copies_in_the_norm, CASES[5]),
    (start_too_few_gathers, CASES[5]),
    (lose_a_ranks_piece, replace(BF16_CASES[1], model=SHALLOW, train=replace(TRAIN, dtype="bf16"))),
]


@pytest.mark.parametrize(("plant", "case"), PLANTED, ids=[f"{plant.__name__}-{case.name}" for plant, case in PLANTED])
def test_planted_bugs_are_caught(plant, case: Case, monkeypatch) -> None:
    reference(case)
    plant(monkeypatch)
    try:
        outcomes = run_ranks(case.world_size, train, case)
    except AssertionError:
        return  # the model's own checks found it: the weights of a rank are not its masters'
    assert differences(case, outcomes) != []
