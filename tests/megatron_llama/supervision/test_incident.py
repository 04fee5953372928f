"""The report of an incident: which rank it names, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_llama.supervision.incident import Incident, write_report
from parallel.heartbeat import Beat, Call, Event


def beat(rank: int, number: int, moment: float = 0.0, action: str = "F2") -> Beat:
    call = Call("all_reduce", "tp", range(0, 3), number)
    return Beat(rank, 100 + rank, 1, moment, 7, "step", action, (call,), call)


BEATS = {0: beat(0, 5, 1.0), 1: beat(1, 4, 3.0), 2: beat(2, 5, 2.0)}
LOST = dict.fromkeys((0, 2), 69)
HEARD = dict.fromkeys(range(3), "File x.py")


@pytest.mark.parametrize(
    ("codes", "overdue", "stacks", "kind", "rank"),
    [
        (LOST | {1: -9}, {}, {}, "death", 1),
        (LOST | {1: 1}, {}, {}, "death", 1),
        ({0: 0, 1: 75, 2: 1}, {}, {}, "death", 2),
        ({0: 69, 1: 69}, {}, {2: "File x.py"}, "death", 0),  # the one that died is on another node
        ({}, {0: 9.0, 1: 9.0, 2: 9.0}, HEARD, "hang", 1),  # the others are in a call that it has not made
        ({}, {0: 9.0, 2: 9.0}, HEARD | {2: ""}, "hang", 2),
        (LOST, {}, {1: ""}, "hang", 1),  # the others' timeouts were faster
        (LOST, {}, {1: "File x.py"}, "hang", 1),  # so they were, and it answers
        (LOST, {1: 9.0}, {1: "File x.py"}, "hang", 1),
        ({}, {}, HEARD, "elsewhere", 1),
    ],
    ids=str,
)
def test_kind_and_rank(codes: dict, overdue: dict, stacks: dict, kind: str, rank: int) -> None:
    incident = Incident(codes, overdue, BEATS, stacks, time=10.0)
    assert (incident.kind, incident.rank, incident.step) == (kind, rank, 7)


def test_a_rank_that_has_never_begun_is_named() -> None:
    incident = Incident({}, {1: 9.0}, {0: BEATS[0]}, {0: "File x.py"}, time=10.0)
    assert (incident.rank, incident.step) == (1, 0)
    assert incident.headline() == "rank 1 hangs before it has begun"


def test_a_rank_that_does_not_come_to_the_start_is_named() -> None:
    beats = {rank: Beat(rank, 100, 1, 0.0, 0, "start", "" if rank == 1 else "waits for all ranks") for rank in range(3)}
    incident = Incident(LOST, {}, beats, {1: "File x.py"}, time=10.0)
    assert (incident.kind, incident.rank) == ("hang", 1)
    assert "waits for all ranks\n" in incident.report({})


def test_a_page(tmp_path: Path) -> None:
    stacks = {0: "File zero.py", 1: "", 2: "File two.py"}
    incident = Incident({}, {1: 9.0}, BEATS | {2: beat(2, 5, 2.0, "waits for F2")}, stacks, time=10.0)
    path = write_report(tmp_path / "reports", incident, {"node": "0 of 1"})
    assert path.name.endswith("-hang-rank-00001.txt")
    lines = [" ".join(line.split()) for line in path.read_text().splitlines()]
    assert lines[0] == "rank 1 hangs in step 7, action F2; its last call is all_reduce over tp (ranks 0 to 2), call 4"
    assert lines[3:6] == [
        "node 0 of 1",
        "limit 9.0 s without a sign of life",
        "silent rank 1 does not answer signals: stopped, or in the kernel (disk, device)",
    ]
    assert lines[7:11] == [
        "what they wait for",
        "rank 0: all_reduce over tp (ranks 0 to 2), call 5; rank 1 has not come",
        "rank 2: all_reduce over tp (ranks 0 to 2), call 5; rank 1 has not come",
        "rank 2: waits for F2, whose input comes from another stage",
    ]
    assert lines[13] == "0 step 7 F2 9.0 s alive all_reduce over tp (ranks 0 to 2), call 5"
    assert [line for line in lines if line.startswith("stacks of")] == [f"stacks of rank {rank}" for rank in (1, 0, 2)]


def test_the_flight_recorders_are_kept_beside_the_report(tmp_path: Path) -> None:
    """In the order of time over all ranks, and those of the named rank in the report."""
    events = {
        0: [Event(9.0, "action", "F1")],
        1: [Event(8.0, "phase", "step", 7), Event(9.5, "call", "all_reduce", 4, "tp")],
    }
    path = write_report(tmp_path, Incident({1: -9}, {}, BEATS, {}, 10.0, events), {})
    _, tail = path.read_text().split("what rank 1 did last\n")
    assert [" ".join(line.split()) for line in tail.splitlines()] == [
        "2.000 s before phase step, step 7",
        "0.500 s before all_reduce over tp, call 4",
    ]
    (flight,) = tmp_path.glob("*-flight.jsonl")
    assert [json.loads(line) for line in flight.read_text().splitlines()] == [
        {"seconds_before": 2.0, "rank": 1, "phase": "step", "step": 7},
        {"seconds_before": 1.0, "rank": 0, "action": "F1"},
        {"seconds_before": 0.5, "rank": 1, "call": "all_reduce", "axis": "tp", "number": 4},
    ]
    again = write_report(tmp_path, Incident({1: -9}, {}, BEATS, {}, 10.0, events), {})  # in the same second, most likely
    assert again != path and len(list(tmp_path.glob("*-flight.jsonl"))) == 2


@pytest.mark.parametrize(
    ("code", "text"),
    [(-11, "rank 1 killed by SIGSEGV, in step 7"), (1, "rank 1 ended with code 1, in"), (69, "(it has lost another rank)")],
    ids=str,
)
def test_how_a_rank_has_ended(code: int, text: str) -> None:
    assert text in Incident({1: code}, {}, BEATS, {}, time=10.0).headline()
