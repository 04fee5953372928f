"""Training with the head's loss in chunks of tokens: against whole logits, and every schedule against 1f1b."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_llama.config import ParallelConfig
from parallel.tensor import head_loss
from tests.parity.comparison import differences, inexact, reference
from tests.parity.test_parity import FEW_ROWS, SGD, SHALLOW, SMALL_BATCH, TIED, layout
from tests.parity.training import Case, train
from tests.ranks import run_ranks

CASES = [
    Case("tp2-pp2-sp", layout(tp=2, pp=2, sequence_parallel=True), SHALLOW, SMALL_BATCH),
    Case("tp4-few-rows-ragged", layout(tp=4), FEW_ROWS, SMALL_BATCH, ragged=True),
    Case("tied-dp2", layout(dp=2), replace(TIED, num_layers=2), SMALL_BATCH),
]


def in_chunks(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """At most 5 of a sample's 16 tokens at once."""
    rows = -(-case.model.vocab_size // (8 * case.parallel.tp)) * 8
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 5 * rows * 4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_the_criteria_of_the_matrix(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(case, optimizer=SGD)
    reference(case)  # in whole logits, and kept
    in_chunks(monkeypatch, case)
    assert differences(case, run_ranks(case.world_size, train, case)) == []


@pytest.mark.parametrize("other", [layout(pp=2, schedule="gpipe"), layout(pp=2, schedule="zb-h1")], ids=["gpipe", "zb-h1"])
def test_the_same_bits_whatever_waits_between_forward_and_backward(
    other: ParallelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpipe makes the logits of all micro-batches but one again; zb-h1 splits the backward pass."""
    outcomes = []
    for parallel in (layout(pp=2), other):
        case = Case("chunks", parallel, SHALLOW, SMALL_BATCH)
        in_chunks(monkeypatch, case)
        outcomes.append(run_ranks(2, train, case, 2))
    assert inexact(outcomes[1], outcomes[0]) == []
