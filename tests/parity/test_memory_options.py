"""Recomputation and offload change no bit: losses, gradients and weights are those of the same layout that keeps everything.

Compiled kernels round elsewhere, and float8 rounds much: close to the same run without.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from megatron_llama import runtime
from megatron_llama.config import ParallelConfig
from parallel import offload
from parallel.kernels.float8_kernels import Products
from tests.parallel.kernels.test_float8 import needs_rows
from tests.parity.comparison import differences, inexact, reference, relative
from tests.parity.test_parity import GQA, PAIRS_OF_SAMPLES, SHALLOW, SMALL_BATCH, layout
from tests.parity.training import MODEL, Case, Outcome, Session, micro_batches, train
from tests.ranks import run_ranks

STEPS = 2
BF16 = replace(SMALL_BATCH, dtype="bf16")
LEAST = {"recompute": "linear_outputs", "offload_layers": 1}

CASES = [
    Case("linear-outputs-documents", layout(recompute="linear_outputs"), GQA, PAIRS_OF_SAMPLES, documents=True),
    Case("linear-outputs-tp2", layout(tp=2, recompute="linear_outputs"), SHALLOW, SMALL_BATCH),
    Case("linear-outputs-tp2-sp-bf16", layout(tp=2, sequence_parallel=True, recompute="linear_outputs"), GQA, BF16),
    Case("linear-outputs-offload-zb-h1", layout(schedule="zb-h1", **LEAST), SHALLOW, SMALL_BATCH),
    Case("linear-outputs-offload-pp2-zb-v", layout(pp=2, chunks=2, schedule="zb-v", **LEAST), MODEL, SMALL_BATCH),
    Case("full-2-layers", layout(recompute="full", recompute_layers=2), MODEL, SMALL_BATCH),
    Case("full-2-layers-offload-3", layout(recompute="full", recompute_layers=2, offload_layers=3), MODEL, SMALL_BATCH),
    Case("selective-offload-all", layout(recompute="selective", offload_layers=4), MODEL, SMALL_BATCH),
    Case("offload-tp2-sp-bf16", layout(tp=2, sequence_parallel=True, offload_layers=1), SHALLOW, BF16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_memory_options_change_no_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 1)  # the tensors of a tiny model go too
    kept = replace(case.parallel, recompute="none", recompute_layers=0, offload_layers=0)
    plain = run_ranks(case.world_size, train, replace(case, parallel=kept), STEPS)
    assert inexact(run_ranks(case.world_size, train, case, STEPS), plain) == []


FLOAT8 = replace(GQA, ffn_hidden_size=64)  # multiples of 16 on two tensor ranks


@pytest.mark.parametrize("parallel", [layout(), layout(tp=2, sequence_parallel=True, schedule="zb-h1")], ids=["1", "tp2-zb-h1"])
@pytest.mark.parametrize("recipe", ["tensorwise", pytest.param("rowwise", marks=needs_rows)])
def test_float8_trains_like_bf16(recipe: str, parallel: ParallelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near as three bits of mantissa let it be: in 8 steps from 4.6 to 4.3."""
    case = Case("float8", parallel, FLOAT8, replace(BF16, float8=recipe))
    monkeypatch.setattr(runtime, "float8_missing", lambda device: None)  # the CPU has slow ones
    losses = run_ranks(case.world_size, train, case)[0].losses
    plain = reference(replace(case, train=BF16)).losses
    assert losses != plain and losses[-1] < losses[0]
    assert all(relative(loss, right) < 5e-3 for loss, right in zip(losses, plain, strict=True)), (losses, plain)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_only_the_blocks_linears_are_in_float8(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four linears in each of two layers and micro-batches; neither the head nor the embedding."""
    made = []
    for name in ("fprop", "dgrad", "wgrad"):
        method = getattr(Products, name)
        monkeypatch.setattr(Products, name, lambda self, *x, name=name, do=method: made.append(name) or do(self, *x))
    monkeypatch.setattr(runtime, "float8_missing", lambda device: None)
    train(0, 1, Case("count", layout(), SHALLOW, replace(BF16, float8=recipe, global_batch_size=2)), steps=1)
    products = 4 * 2 * 2
    assert {name: made.count(name) for name in set(made)} == {
        "fprop": products,
        "dgrad": products,
        **({"wgrad": products} if recipe == "tensorwise" else {}),
    }


def train_counting_graphs(rank: int, world_size: int, case: Case) -> tuple[Outcome, int]:
    """What a training run sees, and how many graphs torch has compiled for it."""
    counters.clear()
    outcome = train(rank, world_size, case)
    return outcome, counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("parallel", [layout(), layout(tp=2, sequence_parallel=True)], ids=["1", "tp2"])
def test_compiled_kernels_train_like_others_and_are_compiled_once(parallel: ParallelConfig) -> None:
    """One graph each for the norm, the norm after an addition, SwiGLU, and the rotation of q and of k (GQA: another shape)."""
    case = Case("compiled", parallel, GQA, replace(SMALL_BATCH, compile=True))
    with inductor.patch(compile_threads=1):  # no worker processes in forked ranks
        results = run_ranks(case.world_size, train_counting_graphs, case, deadline_seconds=800.0)
    outcomes, graphs = zip(*results, strict=True)
    assert differences(replace(case, train=SMALL_BATCH), list(outcomes)) == []
    assert graphs == (5,) * case.world_size


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("recompute", ["none", "selective", "linear_outputs", "full"])
def test_offload_on_streams_changes_no_bit_and_never_makes_the_host_wait(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not run yet: there was no GPU at hand."""
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    masters = []
    for layers in (0, 3):
        case = Case("offload", layout(recompute=recompute, offload_layers=layers), MODEL, BF16)
        session = Session(0, 1, case, device="cuda")
        session.step(0)  # pins the host's memory
        batch = session.step_runner.prepare(micro_batches(case, 1, 0, 1))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            session.step_runner.run(batch, 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        masters.append([box.tensor.clone() for box in session.engine.weight_boxes(write=False)])
    assert all(torch.equal(kept, offloaded) for kept, offloaded in zip(*masters, strict=True))
