"""What supervisors tell each other, with a clock that the test turns. Real ones are in test_supervise."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from megatron_llama.supervision.supervisors import Supervisors
from parallel.errors import LostContactError

SILENCE, START = 5.0, 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def supervisors(nodes: int) -> list[Supervisors]:
    store = dist.HashStore()
    return [Supervisors(node, nodes, f"n{node}", store, SILENCE, START) for node in range(nodes)]


def live(clock: Clock, seconds: float, *beating: Supervisors) -> list[int]:
    """Let time pass in which only these beat; returns the nodes that the first one finds lost."""
    lost = []
    for _ in range(round(seconds * 2)):
        clock.now += 0.5
        for one in beating:
            lost += one.beat()
    return lost


def test_who_is_silent_for_too_long_is_lost_once(clock: Clock) -> None:
    everyone = supervisors(3)
    assert live(clock, 20, *everyone) == [] and everyone[0].arrivals() == 3
    assert live(clock, SILENCE - 1, *everyone[:2]) == []
    assert live(clock, 20, *everyone[:2]) == [2] and everyone[0].lost == {2}
    clock.now += 1
    with pytest.raises(LostContactError, match="given up this one, of node 2 \\(n2\\)"):
        everyone[2].beat()


def test_who_has_not_come_yet_has_more_time(clock: Clock) -> None:
    first, second, _ = supervisors(3)
    assert live(clock, START - 2, first, second) == [] and first.arrivals() == 2
    assert live(clock, 4, first, second) == [2]


def test_the_others_notice_where_the_first_one_is_silent(clock: Clock) -> None:
    first, second = supervisors(2)
    live(clock, 20, first, second)
    with pytest.raises(LostContactError, match="the first supervisor has been silent for 5 s"):
        live(clock, SILENCE + 2, second)


def test_one_that_was_asleep_itself_blames_nobody(clock: Clock) -> None:
    first, second = supervisors(2)
    live(clock, 20, first, second)
    clock.now += 3600
    assert live(clock, 20, first, second) == []
