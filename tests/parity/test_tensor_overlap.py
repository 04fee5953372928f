"""Whole training steps in each mode of tensor-parallel overlap: the same losses, norms and weights, and the same bytes.

"none" and "backward" do the same arithmetic: no tolerance. In "chunks" a product is made by blocks of rows, and a matrix
library may add up in another order for other sizes: the tolerances of the parity matrix.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.tensor import overlap
from tests.parity.comparison import relative, relative_l2
from tests.parity.test_parity import GQA, SMALL_BATCH, layout
from tests.parity.training import MODEL, Case, train
from tests.ranks import run_ranks

CASES = [
    Case("sp", layout(tp=2, sequence_parallel=True), MODEL, SMALL_BATCH),
    Case("sp-split-full-recompute", layout(tp=2, sequence_parallel=True, schedule="zb-h1", recompute="full"), GQA, SMALL_BATCH),
    Case("tp-selective-documents", layout(tp=2, recompute="selective"), GQA, SMALL_BATCH, documents=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_modes_train_alike(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "PIECE_BYTES", {"cpu": 128})  # tiny messages go in pieces too
    outcomes = {}
    for mode in ("none", "backward", "chunks"):
        parallel = replace(case.parallel, tp_overlap=mode)
        outcomes[mode] = run_ranks(case.world_size, train, replace(case, parallel=parallel), 2)
    for rank, right in enumerate(outcomes["none"]):
        same, chunked = outcomes["backward"][rank], outcomes["chunks"][rank]
        assert (same.losses, same.norms, same.sent_bytes) == (right.losses, right.norms, right.sent_bytes)
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(same.weights, right.weights, strict=True))
        assert sum(chunked.sent_bytes.values()) == sum(right.sent_bytes.values())
        assert all(relative(a, b) < 5e-7 for a, b in zip(chunked.losses, right.losses, strict=True))
        for ours, theirs in zip(chunked.gradients, right.gradients, strict=True):
            assert relative_l2(ours.tensor, theirs.tensor) < 1e-5, ours.name
