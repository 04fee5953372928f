"""The clock of waits: who comes late has not waited, and the others have."""

import time

import pytest
import torch

from parallel.collectives import all_gather, all_reduce, broadcast, reduce_scatter, start_exchange, start_receive, start_send
from parallel.groups import Axis
from tests.parallel.building import grid, randn
from tests.ranks import run_ranks

LATE_SECONDS = 0.3


def exchange(x: torch.Tensor, tp: Axis) -> None:
    start_exchange(x, torch.empty_like(x), tp, shift=1).wait()


def message(x: torch.Tensor, tp: Axis) -> None:
    (start_send(x, tp, 0, tag=0) if tp.rank == 1 else start_receive(torch.empty_like(x), tp, 1, tag=0)).wait()


CALLS = {
    "all_reduce": all_reduce,
    "all_gather": all_gather,
    "large all_gather": lambda x, tp: all_gather(x.repeat(1 << 15, 1), tp),
    "reduce_scatter": reduce_scatter,
    "broadcast": lambda x, tp: broadcast(x, tp, source=1),
    "exchange": exchange,
    "message": message,
}


def waits_for(rank: int, world_size: int) -> dict[str, float]:
    """How long each call has waited, for which rank 1 is late."""
    tp, seconds = grid(rank, tp=world_size).tp, {}
    for name, call in CALLS.items():
        call(randn(4, 8), tp)  # connections are made
        all_reduce(torch.zeros(1), tp)
        if rank == 1:
            time.sleep(LATE_SECONDS)
        before = tp.ledger.clock.seconds
        call(randn(4, 8), tp)
        seconds[name] = tp.ledger.clock.seconds - before
    return seconds


@pytest.fixture(scope="module")
def waited() -> list[dict[str, float]]:
    return run_ranks(2, waits_for)


@pytest.mark.parametrize("name", CALLS)
def test_who_comes_late_has_not_waited(waited: list[dict[str, float]], name: str) -> None:
    assert waited[0][name] > LATE_SECONDS / 2 > waited[1][name]
