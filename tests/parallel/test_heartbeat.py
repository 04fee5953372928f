"""Heartbeats: what is written is read, who is waited for, and when a rank has stood still for too long."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.heartbeat import (
    EVENTS,
    SLOTS,
    Beat,
    Call,
    Heartbeat,
    Limits,
    Watch,
    beat_path,
    read,
    read_events,
    stacks_path,
    suspects,
    waited_for,
)
from parallel.launch import become, detect, open_heartbeat
from parallel.launchers import Launch, MeetingPoint
from parallel.ledger import Ledger
from parallel.topology import Topology
from tests.ranks import run_ranks


@pytest.fixture
def heartbeat(tmp_path: Path) -> Heartbeat:
    return Heartbeat(beat_path(tmp_path, 3))


def test_what_is_written_is_read(heartbeat: Heartbeat, tmp_path: Path) -> None:
    before = time.monotonic()
    heartbeat.enter("step", 7)
    heartbeat.act("B2.1")
    heartbeat.call("all_gather", "data", (1, 3, 5))
    heartbeat.call("all_reduce", "tp", (2, 3))
    heartbeat.call("all_reduce", "tp", (2, 3))
    beat = read(tmp_path, 3)
    gather, reduce = Call("all_gather", "data", range(1, 6, 2), 1), Call("all_reduce", "tp", range(2, 4), 2)
    assert replace(beat, time=0.0) == Beat(3, os.getpid(), 6, 0.0, 7, "step", "B2.1", (gather, reduce), reduce)
    assert before <= beat.time <= time.monotonic()


def test_a_new_phase_has_no_action_yet(heartbeat: Heartbeat, tmp_path: Path) -> None:
    heartbeat.act("F0")
    heartbeat.enter("save", 4)
    assert (read(tmp_path, 3).phase, read(tmp_path, 3).action) == ("save", "")


def test_messages_and_collectives_of_an_axis_are_counted_apart(heartbeat: Heartbeat, tmp_path: Path) -> None:
    for kind in ("send", "all_reduce", "receive"):
        heartbeat.call(kind, "pp", (0, 3))
    assert [(call.kind, call.number) for call in read(tmp_path, 3).calls] == [("receive", 2), ("all_reduce", 1)]


def test_long_names_and_many_axes_stay_inside_the_record(heartbeat: Heartbeat, tmp_path: Path) -> None:
    heartbeat.act("x" * 100)
    for axis in range(SLOTS + 5):
        heartbeat.call("all_reduce", f"{axis} {'y' * 50}", (3, 4))
    beat = read(tmp_path, 3)
    assert beat.phase == "start" and beat.action == "x" * 24 and len(beat.calls) == SLOTS


def test_the_flight_recorder_keeps_the_latest_events(heartbeat: Heartbeat, tmp_path: Path) -> None:
    for step in range(1, 100):
        heartbeat.enter("step", step)
        heartbeat.act(f"F{step}")
        heartbeat.call("all_reduce", "tp", (2, 3))
    events = read_events(tmp_path, 3)
    assert len(events) == EVENTS - 1
    assert [(e.what, e.name, e.number, e.axis) for e in events[-4:]] == [
        ("call", "all_reduce", 98, "tp"),
        ("phase", "step", 99, ""),
        ("action", "F99", 0, ""),
        ("call", "all_reduce", 99, "tp"),
    ]
    assert [e.time for e in events] == sorted(e.time for e in events)
    assert read(tmp_path, 3).time == events[-1].time


def test_the_flight_recorder_of_a_dead_rank_can_be_read(tmp_path: Path) -> None:
    def rank_main(rank: int, world_size: int) -> None:
        Heartbeat(beat_path(tmp_path, rank)).act("F0")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError, match="exit code -9"):
        run_ranks(1, rank_main, joined=False)
    assert list(map(str, read_events(tmp_path, 0))) == ["phase start", "action F0"]
    assert read_events(tmp_path, 1) == []


def test_a_rank_that_has_not_begun(tmp_path: Path) -> None:
    assert read(tmp_path, 0) is None
    beat_path(tmp_path, 0).write_bytes(b"")  # made, and not filled yet
    assert read(tmp_path, 0) is None


def test_without_a_file_it_goes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Heartbeat().enter("step", 1)
    assert list(tmp_path.iterdir()) == []


def test_the_ledger_shows_its_calls(heartbeat: Heartbeat, tmp_path: Path) -> None:
    ledger = Ledger(heartbeat=heartbeat)
    ledger.record("broadcast", "dp", (3, 7), 100)
    assert str(read(tmp_path, 3).last_call) == "broadcast over dp (ranks 3, 7), call 1"


def test_a_call_over_many_ranks_costs_no_more_than_one_over_two() -> None:
    """Nothing looks at all of the ranks before somebody asks."""

    class Ranks(tuple):
        def __iter__(self):
            raise AssertionError("looked at all ranks")

        __str__ = __repr__ = __hash__ = __iter__

    ledger = Ledger()
    ledger.record("all_reduce", "world", Ranks(range(2048)), 100)
    ledger.record("all_reduce", "world", Ranks(range(2048)), 100)
    assert ledger.last == "all_reduce over world (0, 1, ... 2047: 2048 ranks), 100 bytes, call 2"


def test_a_rank_learns_from_its_supervisor_where_to_beat(tmp_path: Path) -> None:
    def rank_main(rank: int, world_size: int) -> None:
        launch = Launch(5, 1, 8, 4, "supervisor", MeetingPoint("n1", 1234, serves=False))
        become(launch, tmp_path)
        assert detect() == launch
        open_heartbeat(launch).enter("load")
        assert read(tmp_path, 5).phase == "load"

    run_ranks(1, rank_main, joined=False)


def test_stacks_are_written_at_the_signal(tmp_path: Path) -> None:
    def rank_main(rank: int, world_size: int) -> str:
        Heartbeat(beat_path(tmp_path, rank))
        os.kill(os.getpid(), signal.SIGUSR2)
        return stacks_path(beat_path(tmp_path, rank)).read_text()

    assert "in rank_main" in run_ranks(1, rank_main, joined=False)[0]


@given(st.sampled_from([(1, 1, 4, 2), (2, 2, 2, 2), (4, 1, 2, 2), (2, 3, 1, 4)]))
def test_members_of_every_axis_of_a_grid_are_told_by_three_numbers(sizes: tuple[int, ...]) -> None:
    """A record has the first rank, the last one and how many there are."""
    pp, dp, cp, tp = sizes
    topology = Topology(tp=tp, pp=pp, dp=dp, cp=cp)
    for names in (["tp"], ["pp"], ["dp"], ["cp"], ["dp", "cp"]):
        for ranks in topology.groups(*names):
            if len(ranks) > 1:
                assert tuple(range(ranks[0], ranks[-1] + 1, (ranks[-1] - ranks[0]) // (len(ranks) - 1))) == ranks


# who is waited for


def beat(rank: int, moment: float, *calls: Call, action: str = "", phase: str = "step") -> Beat:
    return Beat(rank, 100 + rank, 1, moment, 4, phase, action, calls, calls[-1] if calls else None)


def reduce(number: int, members: range = range(0, 4)) -> Call:
    return Call("all_reduce", "world", members, number)


def test_who_has_not_come_is_waited_for() -> None:
    beats = [beat(0, 5.0, reduce(8)), beat(1, 1.0, reduce(8)), beat(2, 3.0, reduce(7)), beat(3, 2.0, reduce(8))]
    assert waited_for(beats) == {rank: [(reduce(8), [2])] for rank in (0, 1, 3)}
    assert suspects(beats)[0] == 2  # though others have been still for longer


def test_ranks_of_other_nodes_are_not_judged() -> None:
    assert waited_for([beat(0, 1.0, reduce(8)), beat(1, 1.0, reduce(8))]) == {}


def test_who_waits_for_a_message_is_not_to_blame() -> None:
    assert suspects([beat(0, 9.0, action="F3"), beat(1, 2.0, action="waits for F2")]) == [0, 1]


def test_who_does_not_answer_signals_comes_first() -> None:
    beats = [beat(0, 1.0), beat(1, 2.0, reduce(9)), beat(2, 3.0, reduce(8))]
    assert suspects(beats, silent=[1]) == [1, 0, 2]


def test_of_equals_the_one_that_stopped_first() -> None:
    assert suspects([beat(0, 2.0), beat(1, 1.0), beat(2, 0.0, phase="end")]) == [1, 0, 2]


# how long is too long


LIMITS = Limits(first=100.0, least=5.0, factor=3.0)


def watch_steps(watch: Watch, seconds: list[float], phase: str = "step") -> float:
    """Steps of one rank that last that long, looked at every tenth second; returns the time."""
    now, beats = 0.0, 0
    for step, duration in enumerate(seconds, 1):
        beats += 1
        for _ in range(round(duration * 10)):
            assert watch.look({0: Beat(0, 1, beats, now, step, phase)}, now) == []
            now += 0.1
    return now


def seconds_until_overdue(watch: Watch, beat: Beat | None, now: float) -> float:
    began = now
    while not watch.look({0: beat}, now):
        now += 0.1
        assert now < began + 1000
    return now - began


def test_an_unknown_phase_has_the_first_limit() -> None:
    assert seconds_until_overdue(Watch(LIMITS), None, 0.0) == pytest.approx(100, abs=1)


@pytest.mark.parametrize(("longest", "limit"), [(0.5, 5.0), (4.0, 12.0)])
def test_a_known_phase_has_a_limit_by_what_was_seen(longest: float, limit: float) -> None:
    watch = Watch(LIMITS)
    now = watch_steps(watch, [0.5, longest, 0.5, 0.5])
    assert watch.limit("step") == pytest.approx(limit, abs=0.4)
    assert seconds_until_overdue(watch, Beat(0, 1, 4, now, 4, "step"), now) == pytest.approx(limit, abs=1)
    assert watch.limit("evaluate") == 100


def test_pauses_of_an_irregular_phase_teach_nothing() -> None:
    watch = Watch(LIMITS)
    watch_steps(watch, [0.5, 0.5, 0.5], phase="save")
    assert watch.limit("save") == 100


def test_what_was_learned_holds_for_the_next_processes() -> None:
    watch = Watch(LIMITS)
    watch_steps(watch, [0.5, 0.5])
    watch.forget_ranks()
    assert watch.phase(0) == "start" and watch.limit("step") == 5


def test_a_supervisor_that_was_stopped_itself_blames_nobody() -> None:
    watch = Watch(LIMITS)
    now = watch_steps(watch, [0.5, 0.5])
    assert watch.look({0: Beat(0, 1, 2, now, 2, "step")}, now + 3600) == []
