"""What only a GPU can show: the same losses as on the CPU, and a step in which the host never waits for the device.

Nothing of this file has run on a device yet.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from parallel import collectives
from parallel.pipeline.trace import Trace
from tests.parity.comparison import BF16_LOSS_TOLERANCE, inexact, reference, relative
from tests.parity.test_parity import GQA, SMALL_BATCH, layout
from tests.parity.training import MODEL, TRAIN, Case, Outcome, Session, micro_batches

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
        weights.append([master.clone() for master in session.engine.update.read("master")])
    assert all(torch.equal(split, whole) for whole, split in zip(*weights, strict=True))


# Ranks that share the GPU, each in a process of its own, with gloo between them. (gloo sends no CUDA tensors from one rank to
# another: pipelines are in test_streams.)
SHARED = [
    Case("tp2", layout(tp=2), GQA, SMALL_BATCH),
    Case("tp2-sp", layout(tp=2, sequence_parallel=True), GQA, SMALL_BATCH),
    Case("tp4-sp", layout(tp=4, sequence_parallel=True), GQA, SMALL_BATCH),
    Case("dp2-zero1", layout(dp=2), GQA, SMALL_BATCH),
    Case("tp2-dp2", layout(tp=2, dp=2, sequence_parallel=True), GQA, SMALL_BATCH),
]
DELAY_CYCLES = 2_000_000  # about a millisecond


def _late(function: Callable, when: str) -> Callable:
    """A collective before which (or after whose start) this rank's stream is busy for a while."""

    def call(*args: object, **options: object) -> object:
        if when == "before":
            torch.cuda._sleep(DELAY_CYCLES)
        work = function(*args, **options)
        if when == "after":
            torch.cuda._sleep(DELAY_CYCLES)
        return work

    return call


def _train_on_a_shared_gpu(rank: int, case: Case, folder: Path, when: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=case.world_size)
    for owner, name in (
        (dist, "all_reduce"),
        (dist, "all_to_all_single"),
        (collectives, "_all_gather_into"),
        (collectives, "_reduce_scatter_into"),
    ):
        setattr(owner, name, _late(getattr(owner, name), when))
    session = Session(rank, case.world_size, case, device="cuda")
    for step in range(4):
        session.step(step)
    (folder / f"{rank}").write_bytes(pickle.dumps(_on_host(session.finish())))
    dist.destroy_process_group()


def _on_host(outcome: Outcome) -> Outcome:
    for boxes in (outcome.weights, outcome.optimizer, outcome.gradients):
        boxes[:] = [replace(box, tensor=box.tensor.cpu()) for box in boxes]
    return outcome


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_late_collectives_change_no_bit(case: Case, tmp_path: Path) -> None:
    """What is computed waits for what arrives, and what is sent is not overwritten before it has left."""
    outcomes = {}
    for when in ("never", "before", "after"):
        folder = tmp_path / when
        folder.mkdir()
        torch.multiprocessing.spawn(_train_on_a_shared_gpu, (case, folder, when), nprocs=case.world_size)
        outcomes[when] = [pickle.loads((folder / f"{rank}").read_bytes()) for rank in range(case.world_size)]
    assert inexact(outcomes["before"], outcomes["never"]) == []
    assert inexact(outcomes["after"], outcomes["never"]) == []
    expected = reference(case)
    for ours, theirs in zip(outcomes["never"][0].losses, expected.losses, strict=False):
        assert relative(ours, theirs) < 1e-5
