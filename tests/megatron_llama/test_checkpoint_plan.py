"""What one process plans is what the ranks write and hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from megatron_llama import checkpoint_plan
from megatron_llama.checkpoint_plan import CheckpointPlan
from megatron_llama.config import ZeroConfig, load_config
from parallel.shards import TensorBox
from tests.parity.test_parity import TIED, layout
from tests.parity.training import MODEL, Case, Session
from tests.ranks import run_ranks

ODD = replace(TIED, num_kv_heads=2, vocab_size=101)

CASES = [
    Case("tied, kv heads below tp", layout(tp=4, sequence_parallel=True), ODD),
    Case("tied, two ends of a pipeline", layout(pp=2, dp=2), ODD),
    Case("uneven layers", layout(tp=2, pp=2, layers_per_stage=(3, 1)), replace(MODEL, num_kv_heads=1)),
    Case("v-shaped, two chunks", layout(pp=2, dp=2, schedule="zb-v", chunks=2), ODD),
    Case("copies of the optimizer", layout(dp=4), ODD, zero=ZeroConfig(stage=0)),
    Case("copies by groups", layout(dp=4), ODD, zero=ZeroConfig(shard_group_size=2)),
    Case("ZeRO 2", layout(tp=2, dp=2), ODD, zero=ZeroConfig(stage=2)),
]


def places(boxes: Iterable[TensorBox]) -> list[tuple]:
    return [(box.name, box.global_shape, box.box) for box in boxes]


def boxes_of_rank(rank: int, world_size: int) -> list[dict[str, list[tuple]]]:
    found = []
    for case in CASES:
        engine = Session(rank, world_size, case).engine
        for write in (True, False):
            boxes = {"weights": engine.weight_boxes(write), "optimizer": engine.optimizer_boxes(write)}
            found.append({group: places(items) for group, items in boxes.items()})
    return found


def test_ranks_write_and_hold_what_is_planned() -> None:
    assert all(case.world_size == 4 for case in CASES)
    for rank, of_rank in enumerate(run_ranks(4, boxes_of_rank)):
        expected = iter(of_rank)
        for case in CASES:
            plan = CheckpointPlan(case.config, 4)
            for write in (True, False):
                planned = {group: places(items) for group, items in plan.boxes(rank, write).items()}
                assert planned == next(expected), f"{case.name}, rank {rank}, write {write}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_covers_every_tensor_once(case: Case) -> None:
    manifest = CheckpointPlan(case.config, 4).manifest()  # which checks it
    assert len(manifest.files) == 8
    assert {name.removeprefix("exp_avg/") for name in manifest.tensors if name.startswith("exp_avg/")} <= set(manifest.tensors)


def test_70b_on_512_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds because the stages of a pipeline and tensor rank are built once for all data ranks."""
    built = []

    class Counted(checkpoint_plan.NativeZero):
        def __init__(self, *arguments) -> None:
            built.append(1)
            super().__init__(*arguments)

    monkeypatch.setattr(checkpoint_plan, "NativeZero", Counted)
    settings = ["--model.preset", "llama-3.1-70b", "--parallel.tp", "8", "--parallel.pp", "8"]
    manifest = CheckpointPlan(load_config(settings), 512).manifest()
    assert len(built) == 64
    assert len(manifest.files) == 1024 and len(manifest.tensors) == 3 * 723
    elements = 70_553_706_496
    assert 12 * elements < manifest.total_bytes < 12 * elements + 1024 * 64 * 1024, "fp32 weights and moments, and headers"
