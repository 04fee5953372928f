"""Every schedule against one process: the same bits where no sum crosses ranks, the matrix's criteria elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.pipeline.schedules import SCHEDULES
from tests.parity.comparison import differences, inexact, reference
from tests.parity.test_parity import GQA, SMALL_BATCH, TIED, layout, slow_unless
from tests.parity.training import MODEL, OPTIMIZER, TRAIN, Case, train
from tests.ranks import run_ranks

UNCLIPPED = replace(OPTIMIZER, clip_norm=0.0)
DEEP = replace(MODEL, num_layers=8)
TIED_GQA = replace(GQA, num_layers=4, tie_embeddings=True)


def case(name: str, schedule: str, pp: int, model=DEEP, optimizer=UNCLIPPED, **settings) -> Case:
    chunks = settings.pop("chunks", SCHEDULES[schedule].min_chunks)
    options = {key: settings.pop(key) for key in ("documents", "ragged", "train") if key in settings}
    return Case(name, layout(pp=pp, schedule=schedule, chunks=chunks, **settings), model, optimizer=optimizer, **options)


def outcomes_of(one: Case) -> list:
    """What the ranks saw; no more activations may have been in flight than the checker says."""
    outcomes = run_ranks(one.world_size, train, one)
    assert [o.peak_in_flight for o in outcomes] == [o.predicted_peak for o in outcomes]
    return outcomes


SPLIT = [name for name, kind in SCHEDULES.items() if name not in ("gpipe", "1f1b")]
EXACT = [
    *(case(f"pp2-{name}", name, 2) for name in SPLIT),
    *(case(f"pp4-{name}", name, 4) for name in SPLIT),
    case("pp2-interleaved-4", "interleaved", 2, chunks=4),
    case("pp2-interleaved-odd-batch", "interleaved", 2, train=replace(TRAIN, global_batch_size=5)),
    case("pp4-zb-v-few-micro-batches", "zb-v", 4, train=replace(TRAIN, global_batch_size=3)),
    case("pp2-zb-h2-full-recompute", "zb-h2", 2, recompute="full"),
    case("pp2-zb-v-selective-recompute", "zb-v", 2, recompute="selective"),
    case("pp2-interleaved-full-recompute", "interleaved", 2, recompute="full"),
    case("pp2-zb-v-documents", "zb-v", 2, documents=True, ragged=True),
    case("pp2-zb-v-uneven", "zb-v", 2, layers_per_stage=(1, 3, 2, 2)),
]


QUICK = ("interleaved", "zb-v")  # one with whole backward passes and one that splits them, for layouts like another's


def is_quick(one: Case) -> bool:
    parallel = one.parallel
    return (parallel.pp == 2 and parallel.dp == 1) or parallel.schedule in QUICK


@pytest.mark.parametrize("one", slow_unless(EXACT, is_quick), ids=lambda one: one.name)
def test_the_same_bits_as_one_process(one: Case) -> None:
    """Interleaving, splitting and delaying change nothing: gradients add up in the same order."""
    assert inexact(outcomes_of(one), [reference(one)]) == []


CLOSE = [
    *(case(f"tp2-pp2-{name}", name, 2, MODEL, OPTIMIZER, tp=2, sequence_parallel=True, train=SMALL_BATCH) for name in SPLIT),
    *(case(f"pp2-dp2-{name}", name, 2, MODEL, OPTIMIZER, dp=2) for name in SPLIT),
    case("tp2-pp2-dp2-zb-v", "zb-v", 2, MODEL, OPTIMIZER, tp=2, dp=2, recompute="full"),
    case("tied-pp2-interleaved", "interleaved", 2, TIED, OPTIMIZER),
    case("tied-pp2-zb-h1", "zb-h1", 2, TIED, OPTIMIZER),
    case("tied-pp2-zb-v", "zb-v", 2, TIED, OPTIMIZER),
    case("tied-tp2-pp2-v-min", "v-min", 2, TIED_GQA, OPTIMIZER, tp=2, sequence_parallel=True, train=SMALL_BATCH),
    case("tied-pp2-dp2-dualpipe-v", "dualpipe-v", 2, TIED, OPTIMIZER, dp=2),
]


@pytest.mark.parametrize("one", slow_unless(CLOSE, is_quick), ids=lambda one: one.name)
def test_within_the_criteria_of_the_matrix(one: Case) -> None:
    assert differences(one, outcomes_of(one)) == []
