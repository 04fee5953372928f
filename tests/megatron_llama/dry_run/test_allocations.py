"""The ledger of live tensors: against sums by hand, and against torch's profiler over a real step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.profiler import ProfilerActivity, profile

from megatron_llama.config import ZeroConfig
from megatron_llama.dry_run.allocations import AllocationLedger
from tests.parity.test_parity import layout
from tests.parity.training import MODEL, TRAIN, Case, Session
from tests.ranks import run_ranks

KB = 256 * 4  # bytes of 256 fp32 numbers


def numbers(device: str, count: int = 256) -> Tensor:
    return torch.zeros(count, device=device)


@pytest.fixture(params=["cpu", "meta"])
def device(request) -> str:
    return request.param


def test_live_bytes_follow_storages(device) -> None:
    with AllocationLedger(device) as ledger:
        first = numbers(device)
        view = first.view(16, 16)[2:].t()
        assert ledger.live.total() == KB, "a view is no storage of its own"
        second = view.contiguous()
        assert ledger.live.total() == KB + second.nbytes
        del first
        assert ledger.live.total() == KB + second.nbytes, "the view keeps the whole storage"
        del view, second
        assert ledger.live.total() == 0


def test_peak_is_the_most_at_one_time(device) -> None:
    with AllocationLedger(device) as ledger:
        kept = numbers(device)
        (kept * 2 + 1).sum()  # two temporaries together
        assert ledger.peak_bytes == 3 * KB
        ledger.reset_peak()
        assert (ledger.peak_bytes, ledger.peak) == (KB, {"workspace": KB})
        kept.sum()
        assert ledger.peak_bytes == KB + 4


def test_in_place_and_out_allocate_nothing_and_resizing_does(device) -> None:
    with AllocationLedger(device) as ledger:
        here, out = numbers(device), torch.empty(0, device=device)
        here.add_(1).mul_(2)
        torch.add(here, here, out=here)
        assert ledger.live.total() == KB
        out.resize_(512)
        assert ledger.live.total() == 3 * KB
        parts = torch._foreach_add([here, out], 1)
        assert ledger.live.total() == 6 * KB
        del parts
        torch.mul(here, 3, out=out.resize_(0).resize_(256))
        assert ledger.live.total() == 3 * KB, "a storage does not shrink"


def test_components(device) -> None:
    before = numbers(device)
    with AllocationLedger(device) as ledger:
        ledger.own("weights", [before, before.view(2, -1), torch.zeros(3, device="cpu" if device == "meta" else "meta")])
        with ledger.component("buffers"):
            buffer = before + 1
        other = before + 2
        assert ledger.live == {"weights": KB, "buffers": KB, "workspace": KB}
        ledger.own("optimizer", [other])
        assert +ledger.live == {"weights": KB, "buffers": KB, "optimizer": KB}
        del buffer
        assert ledger.live.total() == 2 * KB and ledger.peak_bytes == 3 * KB


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * dy


def test_backward_passes_are_seen(device) -> None:
    """Two nodes that keep their inputs, and what their backward passes make."""
    with AllocationLedger(device) as ledger:
        x = numbers(device).requires_grad_()
        y = Square.apply(Square.apply(x))
        assert ledger.live.total() == 3 * KB
        loss = y.sum()
        del y
        ledger.reset_peak()
        loss.backward()
        del loss
        assert ledger.live.total() == 2 * KB, "x and its gradient"
        assert ledger.peak_bytes == 4 * KB + 2 * 4, "x, its square, two products; the loss and its gradient"


# ---- a step of the program ----------------------------------------------------------------------------------------------

SMALL = replace(MODEL, hidden_size=64, ffn_hidden_size=176, vocab_size=256)
BATCH = replace(TRAIN, sequence_length=64, global_batch_size=4)


def ledger_of(session: Session) -> AllocationLedger:
    ledger = AllocationLedger("cpu")
    ledger.follow_engine(session.engine)
    ledger.follow(session.step_runner.executor)
    return ledger


def profiled_peak(function: Callable[[], None]) -> int:
    """The most bytes that torch's profiler has seen allocated beyond what there was before, and at the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_same_peak_as_the_profiler(recompute: str) -> None:
    """In fp32, where no kernel makes a copy of its inputs inside."""
    session = Session(0, 1, Case("alone", layout(recompute=recompute), SMALL, BATCH))
    session.step(0)
    ledger = ledger_of(session)
    before = ledger.live.total()
    gc.collect()

    def step() -> None:
        with ledger:
            session.step(1)

    expected = profiled_peak(step)
    assert ledger.peak_bytes - before == expected


def kept_by_a_step(rank: int, world_size: int, case: Case) -> tuple[dict[str, int], dict[str, int], int]:
    """Components at the peak of the second step, those after it, and what the engine says of its state."""
    session = Session(rank, world_size, case)
    session.step(0)
    ledger = ledger_of(session)
    with ledger:
        session.step(1)
    return ledger.peak, +ledger.live, session.engine.state_bytes


def test_components_of_a_step_in_a_pipeline() -> None:
    case = Case("pp2", layout(pp=2, dp=2, schedule="zb-h1"), SMALL, BATCH, zero=ZeroConfig(stage=2))
    for peak, after, state_bytes in run_ranks(4, kept_by_a_step, case):
        states = ("weights", "gradients", "optimizer")
        assert sum(after[name] for name in states) == state_bytes
        assert all(peak[name] == after[name] for name in states)
        assert peak["activations"] > 0 and peak["workspace"] > 0 and peak["buffers"] > 0
        assert set(after) <= {*states, "workspace"} and after.get("workspace", 0) < 2000, "nothing of a step is left"
