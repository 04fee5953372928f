"""What only a GPU can show: the same losses as on the CPU, and a step in which the host never waits for the device."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from parallel.pipeline.trace import Trace
from tests.parity.comparison import BF16_LOSS_TOLERANCE, reference, relative
from tests.parity.test_parity import GQA, layout
from tests.parity.training import MODEL, TRAIN, Case, Session, micro_batches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", BF16_LOSS_TOLERANCE)])
def test_same_losses_as_on_the_cpu(dtype: str, tolerance: float) -> None:
    """Other kernels round differently: fp32 to 1e-5 over 8 steps (TF32 is off by default), bf16 as between layouts."""
    case = Case("gpu", layout(recompute="selective"), GQA, replace(TRAIN, dtype=dtype))
    expected = reference(case)  # forked before this process touches CUDA
    session = Session(0, 1, case, device="cuda")
    for step in range(8):
        session.step(step)
    outcome = session.finish()
    for ours, theirs in zip(outcome.losses, expected.losses, strict=True):
        assert relative(ours, theirs) < tolerance


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_never_makes_the_host_wait(recompute: str, schedule: str, tmp_path) -> None:
    """Neither whole nor split backward passes, nor a trace of them, which is read when the step is over."""
    case = Case("sync", layout(recompute=recompute, schedule=schedule), MODEL, replace(TRAIN, dtype="bf16"))
    session = Session(0, 1, case, device="cuda")
    session.step(0)  # first use allocates and compiles
    batch = session.step_runner.prepare(micro_batches(case, 1, 0, 1))
    executor = session.step_runner.executor
    executor.trace = Trace(executor.groups, executor.placement, executor.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.step_runner.run(batch, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    executor.trace.write(tmp_path / "step.json")
    spans = [e for e in json.loads((tmp_path / "step.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert [span["name"] for span in spans] == [str(action) for action in session.step_runner.actions]
    assert all(span["dur"] > 0 for span in spans)
    assert all(a["ts"] + a["dur"] <= b["ts"] + 0.1 for a, b in zip(spans, spans[1:], strict=False))  # microseconds


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_split_backward_pass_changes_no_bit_on_a_gpu(recompute: str) -> None:
    """bf16, in which nothing but the order of the main gradients' sums could differ."""
    weights = []
    for schedule in ("1f1b", "zb-h1"):
        case = Case("split", layout(recompute=recompute, schedule=schedule), GQA, replace(TRAIN, dtype="bf16"))
        session = Session(0, 1, case, device="cuda")
        for step in range(2):
            session.step(step)
        weights.append([bucket.master.clone() for bucket in session.engine.buckets])
    assert all(torch.equal(split, whole) for whole, split in zip(*weights, strict=True))
