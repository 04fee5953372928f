"""In a step of the native engine the host never asks for a number that the device has computed, so it never waits for it.

On CPUs the questions are counted: scalars read, conversions to Python numbers, lists and arrays, and operations whose result
has a size that depends on the data. Not covered, because they ask on purpose: attention with document masks on a CPU (SDPA
gets a mask of each document's length), post-validation (which reads the verdict of the step before), and DeepSpeed.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llama.config import ZeroConfig
from parallel.zero.native import NativeZero
from tests.parity.test_parity import SHALLOW, SMALL_BATCH, layout
from tests.parity.training import OPTIMIZER, Case, Session, micro_batches
from tests.ranks import run_ranks

QUESTIONS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
INDEXING = {"index", "index_put", "index_put_"}  # questions where an index is a mask
METHODS = ("tolist", "numpy", "__array__")  # which read a CPU's memory without an operation
PROGRAM = tuple(str(Path(__file__).parents[2] / package) for package in ("parallel", "megatron_llama"))


class HostReads(TorchDispatchMode):
    """Inside, `places` gets the line of our program that asks, for each question."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def note(self, question: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PROGRAM)]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}: {ours[-1].line}" if ours else "not our program"
        self.places.append(f"{question} in {place}")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in QUESTIONS or by_mask:
            self.note(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    reads = HostReads()

    def noting(method: str):
        original = getattr(torch.Tensor, method)

        def note_and_do(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.note(method)
            return original(tensor, *args, **kwargs)

        return mock.patch.object(torch.Tensor, method, note_and_do)

    first, second, third = map(noting, METHODS)
    with first, second, third, reads:
        yield reads.places


def reads_of_a_step(rank: int, world_size: int, case: Case) -> list[str]:
    """Who asked in the second step of a training."""
    session = Session(rank, world_size, case)
    data = session.runtime.groups.data
    session.step(0)
    batch = session.step_runner.prepare(micro_batches(case, 1, data.rank, data.size))
    with host_reads() as places:
        session.step_runner.run(batch, 1e-3)
    session.engine.finish()
    return places


BF16, FP16 = (replace(SMALL_BATCH, dtype=dtype) for dtype in ("bf16", "fp16"))
NARROW = replace(OPTIMIZER, master_weights="remainder", moment_dtype="bf16")
ALONE = Case("alone", layout(), SHALLOW, BF16)
CASES = [
    Case("dp2-zero0", layout(dp=2), SHALLOW, SMALL_BATCH, zero=ZeroConfig(stage=0)),
    Case("dp2-zero1-narrow", layout(dp=2), SHALLOW, BF16, NARROW),
    Case("dp2-zero2-narrow-wire", layout(dp=2), SHALLOW, BF16, zero=ZeroConfig(stage=2, reduce_dtype="bf16")),
    Case("tp2-sp-recompute-fp16", layout(tp=2, sequence_parallel=True, recompute="full"), SHALLOW, FP16),
    Case("tied-pp2-zb", layout(pp=2, schedule="zb-h1"), replace(SHALLOW, tie_embeddings=True), BF16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nobody_asks_the_device_in_a_step(case: Case) -> None:
    for places in run_ranks(case.world_size, reads_of_a_step, case):
        assert places == []


PLANTED = {
    "item": lambda sums: sums.sum().item(),
    "if": lambda sums: bool(sums.sum() > 0),
    "float": lambda sums: float(sums[0]),
    "tolist": lambda sums: sums.tolist(),
    "numpy": lambda sums: sums.numpy(),
    "mask": lambda sums: sums[sums > 0],
}


@pytest.mark.parametrize("question", PLANTED)
def test_a_planted_question_is_found(question: str, monkeypatch) -> None:
    step = NativeZero.step

    def asking_step(engine, learning_rate, sums, judge):
        PLANTED[question](sums)
        return step(engine, learning_rate, sums, judge)

    monkeypatch.setattr(NativeZero, "step", asking_step)
    assert len(run_ranks(1, reads_of_a_step, ALONE)[0]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("case", [replace(ALONE, optimizer=NARROW), replace(ALONE, train=FP16)], ids=["narrow", "fp16"])
def test_cuda_notices_no_wait(case: Case, stage: int) -> None:
    """It has not run on a device yet. What else training computes is in test_gpu.py."""
    session = Session(0, 1, replace(case, zero=ZeroConfig(stage=stage)), device="cuda")
    session.step(0)
    batch = session.step_runner.prepare(micro_batches(case, 1, 0, 1))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.step_runner.run(batch, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
