"""The parity matrix: any layout gives the same losses, gradients and weights as one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from megatron_llama.config import OptimizerConfig, ParallelConfig, ZeroConfig
from tests.parity.comparison import differences, inexact, reference
from tests.parity.training import MODEL, OPTIMIZER, TRAIN, Case, train
from tests.ranks import run_ranks

SGD = OptimizerConfig(name="sgd", learning_rate=0.1, clip_norm=0.5)
GQA = replace(MODEL, num_kv_heads=2, num_layers=2)
ONE_KV_HEAD = replace(MODEL, num_kv_heads=1, num_layers=2)
ODD_VOCABULARY = replace(MODEL, vocab_size=101)
FEW_ROWS = replace(MODEL, vocab_size=10, num_layers=2)  # over 4 ranks of 8 rows: some hold nothing but padding
TIED = replace(MODEL, tie_embeddings=True)


# Four tensor ranks on two cores wait for one another most of the time: half the layers and micro-batches for them.
STAGE_0 = ZeroConfig(stage=0)
SHALLOW = replace(MODEL, num_layers=2)
SMALL_BATCH = replace(TRAIN, global_batch_size=4)
PAIRS_OF_SAMPLES = replace(TRAIN, micro_batch_size=2)


def slow_unless(cases: Iterable[Case], is_quick: Callable[[Case], bool]) -> list:
    """The cases, of which all others are marked slow."""
    return [case if is_quick(case) else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def layout(**settings) -> ParallelConfig:
    return ParallelConfig(**{"dp": 1, "sequence_parallel": False, **settings})


CASES = [
    Case("tp2", layout(tp=2)),
    Case("tp4", layout(tp=4), SHALLOW, SMALL_BATCH),
    Case("tp2-sp", layout(tp=2, sequence_parallel=True)),
    Case("tp4-sp", layout(tp=4, sequence_parallel=True), SHALLOW, SMALL_BATCH),
    Case("pp2-gpipe", layout(pp=2, schedule="gpipe")),
    Case("pp2-1f1b", layout(pp=2)),
    Case("pp4-1f1b", layout(pp=4)),
    Case("pp2-uneven", layout(pp=2, layers_per_stage=(1, 3))),
    Case("dp2-zero0", layout(dp=2), zero=STAGE_0),
    Case("dp2-zero1", layout(dp=2)),
    Case("dp4-zero0", layout(dp=4), zero=STAGE_0),
    Case("dp4-zero1", layout(dp=4)),
    Case("tp2-pp2", layout(tp=2, pp=2, sequence_parallel=True)),
    Case("tp2-dp2", layout(tp=2, dp=2, sequence_parallel=True)),
    Case("pp2-dp2", layout(pp=2, dp=2)),
    Case("tp2-pp2-dp2", layout(tp=2, pp=2, dp=2, sequence_parallel=True)),
    Case("tp2-pp2-dp2-no-sp-zero0", layout(tp=2, pp=2, dp=2), zero=STAGE_0),
    Case("odd-vocabulary-tp2", layout(tp=2, sequence_parallel=True), ODD_VOCABULARY),
    Case("vocabulary-of-padding-tp4", layout(tp=4), FEW_ROWS, SMALL_BATCH),
    Case("gqa-tp2", layout(tp=2), GQA),
    Case("kv-below-tp4", layout(tp=4, sequence_parallel=True), GQA, SMALL_BATCH),
    Case("one-kv-head-tp4-dp2", layout(tp=4, dp=2), ONE_KV_HEAD, SMALL_BATCH),
    Case("tied", layout(dp=2), TIED),
    Case("tied-tp2", layout(tp=2, sequence_parallel=True), TIED),
    Case("tied-pp2", layout(pp=2), TIED),
    Case("tied-pp2-dp3", layout(pp=2, dp=3), TIED, replace(TRAIN, global_batch_size=6)),
    Case("tied-tp2-pp2-dp2", layout(tp=2, pp=2, dp=2, sequence_parallel=True), replace(TIED, vocab_size=101)),
    Case("full-recompute-tp2-pp2", layout(tp=2, pp=2, recompute="full", sequence_parallel=True)),
    Case("selective-recompute-tp2-dp2", layout(tp=2, dp=2, recompute="selective")),
    Case("micro-batch-2", layout(tp=2, dp=2), train=PAIRS_OF_SAMPLES),
    Case("one-micro-batch", layout(pp=2, dp=4), train=PAIRS_OF_SAMPLES),
    Case("ragged-masks-tp2-pp2-dp2", layout(tp=2, pp=2, dp=2, sequence_parallel=True), ragged=True),
    Case("ragged-masks-dp4", layout(dp=4), ragged=True),
    Case("documents-tp2-sp", layout(tp=2, sequence_parallel=True), GQA, ragged=True, documents=True),
    Case("documents-pp2-full-recompute", layout(pp=2, recompute="full"), documents=True),
    Case("packed-tp2-sp", layout(tp=2, sequence_parallel=True), GQA, packed=True),
    Case("packed-pp2-dp2", layout(pp=2, dp=2), packed=True),
    Case("documents-dp2-selective", layout(dp=2, recompute="selective"), train=PAIRS_OF_SAMPLES, documents=True),
]


# SGD shows a wrong factor in a gradient, which AdamW hides; AdamW's state is cut alike for layouts of a kind, so one of each.
WITH_ADAMW = (
    "tp4-sp",
    "pp4-1f1b",
    "dp4-zero0",
    "dp4-zero1",
    "kv-below-tp4",
    "tied-tp2-pp2-dp2",
    "ragged-masks-tp2-pp2-dp2",
    "packed-pp2-dp2",
)


def same_as_one_process(case: Case, optimizer: OptimizerConfig) -> None:
    case = replace(case, optimizer=optimizer)
    assert differences(case, run_ranks(case.world_size, train, case)) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_as_one_process_with_sgd(case: Case) -> None:
    same_as_one_process(case, SGD)


@pytest.mark.parametrize("case", slow_unless(CASES, lambda case: case.name in WITH_ADAMW), ids=lambda case: case.name)
def test_same_as_one_process_with_adamw(case: Case) -> None:
    same_as_one_process(case, OPTIMIZER)


BF16_LAYOUTS = [
    layout(tp=2, sequence_parallel=True),
    layout(pp=2, dp=2),
    layout(tp=2, pp=2, dp=2, sequence_parallel=True, recompute="selective"),
]


@pytest.mark.parametrize("parallel", BF16_LAYOUTS, ids=["tp2-sp", "pp2-dp2", "tp2-pp2-dp2"])
def test_bf16_is_close_to_one_process_in_bf16(parallel: ParallelConfig) -> None:
    case = Case("bf16", parallel, train=replace(TRAIN, dtype="bf16"))
    assert differences(case, run_ranks(case.world_size, train, case)) == []


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("tp", [1, 2])
def test_recomputation_changes_no_bit(mode: str, tp: int) -> None:
    plain = Case("plain", layout(tp=tp, sequence_parallel=True), SHALLOW, SMALL_BATCH)
    again = replace(plain, parallel=replace(plain.parallel, recompute=mode))
    assert inexact(run_ranks(tp, train, again), run_ranks(tp, train, plain)) == []


@pytest.mark.parametrize("parallel", [layout(pp=2), layout(pp=4), layout(pp=2, schedule="gpipe")], ids=["pp2", "pp4", "gpipe"])
def test_pipelining_without_clipping_changes_no_bit(parallel: ParallelConfig) -> None:
    """No sum crosses ranks, so there is nothing to round differently."""
    case = Case("pipeline", parallel, optimizer=replace(OPTIMIZER, clip_norm=0.0))
    assert inexact(run_ranks(case.world_size, train, case), [reference(case)]) == []


def test_one_non_finite_gradient_skips_the_step_everywhere() -> None:
    """An infinite weight gradient on one rank masks the update on all; the next steps go on from the same weights."""
    case = Case("skip", layout(tp=2, dp=2))
    outcomes = run_ranks(4, _train_with_infinity, case)
    assert all(o.skipped == [0.0, 1.0, 0.0] for o in outcomes)
    clean = run_ranks(4, _train_without_step_1, case)
    assert inexact_weights(outcomes, clean) == []


def inexact_weights(outcomes, expected) -> list[str]:
    from tests.parity.training import assemble

    ours, theirs = assemble(outcomes, "weights"), assemble(expected, "weights")
    return [name for name in theirs if not ours[name].equal(theirs[name])]


def _train_with_infinity(rank: int, world_size: int, case: Case):
    from parallel.zero.native import NativeZero

    reduce_gradients = NativeZero.reduce_gradients
    calls = []

    def poison(self) -> None:
        reduce_gradients(self)
        calls.append(1)
        if len(calls) == 2 and rank == 3:
            self.buckets[0].master_grad[5] = float("inf")

    NativeZero.reduce_gradients = poison
    return train(rank, world_size, case, steps=3)


def _train_without_step_1(rank: int, world_size: int, case: Case):
    import tests.parity.training as training

    drawn = training.micro_batches

    def skip_one(case, step, dp_rank, dp_size):
        return drawn(case, 2 if step == 1 else step, dp_rank, dp_size)

    training.micro_batches = skip_one
    return train(rank, world_size, case, steps=2)
