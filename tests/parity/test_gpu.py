"""What only a GPU can show: the same losses as on the CPU, and a step in which the host never waits for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_never_makes_the_host_wait(recompute: str) -> None:
    case = Case("sync", layout(recompute=recompute), MODEL, replace(TRAIN, dtype="bf16"))
    session = Session(0, 1, case, device="cuda")
    session.step(0)  # first use allocates and compiles
    batch = session.step_runner.prepare(micro_batches(case, 1, 0, 1))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.step_runner.run(batch, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
