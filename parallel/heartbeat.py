"""Heartbeats: what a rank is doing, in a page of shared memory that a supervisor on the same node reads.

A beat is a write to memory: no system call, about a microsecond. It says the phase, the step, the action, and per axis how many
collectives have been started; so a supervisor sees who stands still, and for whom the others wait. The latest beats stay in a
ring, the flight recorder, which outlives the rank.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HEAD = struct.Struct("<qqq")  # pid, number of beats, slot of the latest call
BEATS_OFFSET, LATEST_OFFSET = 8, 16  # in it
PLACE = struct.Struct("<q24s24s")  # step, phase, action
CALL = struct.Struct("<qqqq16s16s")  # number of the call over its axis, its members (first, last, how many), kind, axis
ACTION, NUMBER = struct.Struct("<24s"), struct.Struct("<q")  # parts of these
PLACE_OFFSET, CALLS_OFFSET, SLOTS = 32, 96, 24
WHAT = struct.Struct("<8s24s16s")  # what it is, its name, axis
EVENT = struct.Struct(f"<dq{WHAT.size}s")  # time (monotonic clock), step or number of the call, WHAT
EVENTS_OFFSET, EVENTS = CALLS_OFFSET + SLOTS * CALL.size, 128
SIZE = EVENTS_OFFSET + EVENTS * EVENT.size
STACK_SIGNAL = signal.SIGUSR2
MESSAGES = ("send", "receive")  # not made by all members alike, so that their numbers can't be compared
LONGEST_LOOK_SECONDS = 2.0  # that a look of the supervisor counts for
WAITS = "waits for "  # begins the name of an action that another rank's message has to come first for


class Heartbeat:
    """The writing side. Without a file it writes to memory that nobody reads.

    With a file, the stacks of all threads are written beside it whenever this process receives STACK_SIGNAL.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._known: dict[tuple[str, str], _KnownCall] = {}
        self._slots: dict[tuple[str, bool], int] = {}
        self._numbers = [0] * SLOTS
        self._in_slots: list[_KnownCall | None] = [None] * SLOTS
        self._beats, self._latest = 0, -1
        self._memory: mmap.mmap | bytearray = bytearray(SIZE)
        if path is not None:
            self._stacks = open(stacks_path(path), "w")  # open as long as the process lives
            faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)
            with open(path, "w+b") as file:
                file.truncate(SIZE)
                self._memory = mmap.mmap(file.fileno(), SIZE)
            HEAD.pack_into(self._memory, 0, os.getpid(), self._beats, self._latest)
            self.enter("start")

    def enter(self, phase: str, step: int = 0) -> None:
        """A phase begins; `step` is the one under way."""
        name = phase.encode()
        PLACE.pack_into(self._memory, PLACE_OFFSET, step, name, b"")
        self._beat(step, WHAT.pack(b"phase", name, b""))

    def act(self, action: str) -> None:
        """An action of the phase begins."""
        name = action.encode()
        ACTION.pack_into(self._memory, PLACE_OFFSET + 32, name)
        self._beat(0, WHAT.pack(b"action", name, b""))

    def call(self, kind: str, axis: str, ranks: tuple[int, ...]) -> None:
        """A collective, or a message, over an axis is about to start. The ranks of an axis are always the same."""
        try:
            known = self._known[kind, axis]
        except KeyError:
            known = self._get_to_know(kind, axis, ranks)
        slot, offset, record, event = known
        number = self._numbers[slot] = self._numbers[slot] + 1
        NUMBER.pack_into(self._memory, offset, number)
        if self._in_slots[slot] is not known:
            self._memory[offset + NUMBER.size : offset + CALL.size] = record
            self._in_slots[slot] = known
        if self._latest != slot:
            NUMBER.pack_into(self._memory, LATEST_OFFSET, slot)
            self._latest = slot
        self._beat(number, event)

    def _get_to_know(self, kind: str, axis: str, ranks: tuple[int, ...]) -> _KnownCall:
        slot = self._slots.setdefault((axis, kind in MESSAGES), min(len(self._slots), SLOTS - 1))
        record = CALL.pack(0, ranks[0], ranks[-1], len(ranks), kind.encode(), axis.encode())[NUMBER.size :]
        event = WHAT.pack(b"call", kind.encode(), axis.encode())
        known = _KnownCall(slot, CALLS_OFFSET + slot * CALL.size, record, event)
        return self._known.setdefault((kind, axis), known)

    def _beat(self, number: int, what: bytes) -> None:
        beats = self._beats
        EVENT.pack_into(self._memory, EVENTS_OFFSET + beats % EVENTS * EVENT.size, time.monotonic(), number, what)
        self._beats = beats + 1  # (after the event, which a reader would take for an old one otherwise)
        NUMBER.pack_into(self._memory, BEATS_OFFSET, beats + 1)


class _KnownCall(NamedTuple):
    """What is the same in all calls of a kind over an axis: their slot, where it is, and what stands in it and in events."""

    slot: int
    offset: int
    record: bytes
    event: bytes


@dataclass(frozen=True)
class Call:
    """The latest call over an axis, the `number`-th there. `members` is a range: axes of a grid have evenly spaced ranks."""

    kind: str
    axis: str
    members: range
    number: int

    def __str__(self) -> str:
        first, last, size = self.members[0], self.members[-1], len(self.members)
        ranks = f"{first}, {last}" if size == 2 else f"{first} to {last}"
        stride = f", every {self.members.step}th" if size > 2 and self.members.step > 1 else ""
        return f"{self.kind} over {self.axis} (ranks {ranks}{stride}), call {self.number}"


@dataclass(frozen=True)
class Beat:
    """What a rank has said last. `time` is that of the monotonic clock, which all processes of a node share."""

    rank: int
    pid: int
    beats: int
    time: float
    step: int
    phase: str
    action: str = ""
    calls: tuple[Call, ...] = ()
    last_call: Call | None = None

    def waits(self) -> bool:
        """Whether it says so itself."""
        return self.action.startswith(WAITS)


@dataclass(frozen=True)
class Event:
    """An entry of a rank's flight recorder: the `number`-th call of that axis, or a phase or an action that began.

    `time` is that of the monotonic clock. `number` is the step where a phase began; an action has none.
    """

    time: float
    what: str
    name: str
    number: int = 0
    axis: str = ""

    def __str__(self) -> str:
        if self.what == "call":
            return f"{self.name} over {self.axis}, call {self.number}"
        return f"{self.what} {self.name}" + (f", step {self.number}" if self.number else "")


def beat_path(directory: Path, rank: int) -> Path:
    """The file of a rank's heartbeat."""
    return directory / f"rank-{rank:05d}.beat"


def stacks_path(path: Path) -> Path:
    """Where the process whose heartbeat is `path` writes its stacks."""
    return path.with_suffix(".stacks")


def read(directory: Path, rank: int) -> Beat | None:
    """The latest beat of a rank; None where it has not made its file yet."""
    record = _record(directory, rank)
    if record is None:
        return None
    pid, beats, latest = HEAD.unpack_from(record)
    moment, _, _ = EVENT.unpack_from(record, EVENTS_OFFSET + (beats - 1) % EVENTS * EVENT.size)
    step, phase, action = PLACE.unpack_from(record, PLACE_OFFSET)
    calls = tuple(filter(None, (_call(record, slot) for slot in range(SLOTS))))
    last = _call(record, latest) if latest >= 0 else None
    return Beat(rank, pid, beats, moment, step, _text(phase), _text(action), calls, last)


def _record(directory: Path, rank: int) -> bytes | None:
    """The memory of a rank that has begun."""
    try:
        record = beat_path(directory, rank).read_bytes()
    except FileNotFoundError:
        return None
    has_begun = len(record) == SIZE and HEAD.unpack_from(record)[1] > 0
    return record if has_begun else None


def read_events(directory: Path, rank: int) -> list[Event]:
    """The latest events of a rank, also of one that has died, oldest first; none where it has not begun."""
    record = _record(directory, rank)
    if record is None:
        return []
    _, beats, _ = HEAD.unpack_from(record)
    first = max(beats - EVENTS + 1, 0)  # without the oldest, which may be about to be overwritten
    places = (EVENTS_OFFSET + number % EVENTS * EVENT.size for number in range(first, beats))
    fields = (EVENT.unpack_from(record, place) for place in places)
    return [_event(moment, number, what) for moment, number, what in fields]


def _event(moment: float, number: int, what: bytes) -> Event:
    kind, name, axis = map(_text, WHAT.unpack(what))
    return Event(moment, kind, name, number, axis)


def _call(record: bytes, slot: int) -> Call | None:
    number, first, last, size, kind, axis = CALL.unpack_from(record, CALLS_OFFSET + slot * CALL.size)
    if number == 0 or size < 2:
        return None
    return Call(_text(kind), _text(axis), range(first, last + 1, max((last - first) // (size - 1), 1)), number)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")  # (a beat may be read while it is written)


def waited_for(beats: Iterable[Beat]) -> dict[int, list[tuple[Call, list[int]]]]:
    """Per rank: its collectives that some of the other ranks here have not called yet, and which ranks those are."""
    by_rank = {beat.rank: beat for beat in beats}
    numbers = {
        (beat.rank, call.axis, call.members): call.number
        for beat in by_rank.values()
        for call in beat.calls
        if call.kind not in MESSAGES
    }
    found: dict[int, list[tuple[Call, list[int]]]] = {}
    for beat in by_rank.values():
        for call in beat.calls:
            if call.kind in MESSAGES:
                continue
            late = [m for m in call.members if m in by_rank and numbers.get((m, call.axis, call.members), 0) < call.number]
            if late:
                found.setdefault(beat.rank, []).append((call, late))
    return found


def suspects(beats: Iterable[Beat], silent: Iterable[int] = ()) -> list[int]:
    """The ranks that may hold up the others, the likeliest first.

    Those that don't answer signals (`silent`) come first, then those that wait for nobody, then who has been still for longest.
    """
    beats, silent = list(beats), set(silent)
    waiting = waited_for(beats)
    order = sorted(
        beats, key=lambda beat: (beat.rank not in silent, beat.waits() or beat.rank in waiting, beat.phase == "end", beat.time)
    )
    return [beat.rank for beat in order]


@dataclass(frozen=True)
class Limits:
    """How long a rank may stand still, in seconds.

    That is `first`; in a `regular` phase, once a rank has been through it, `factor` times the longest pause seen there, and at
    least `least`.
    """

    first: float = 900.0
    least: float = 60.0
    factor: float = 10.0
    regular: tuple[str, ...] = ("step", "evaluate", "audit")  # others wait for storage, whose pauses say little of the next


class Watch:
    """Finds ranks that stand still for too long. What it learns of the phases holds over restarts: see `forget_ranks`."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._longest: dict[str, float] = {}  # pause per phase, of the phases under way too
        self._left: set[str] = set()  # phases that some rank has been through
        self.forget_ranks()

    def forget_ranks(self) -> None:
        """Other processes are watched from now on."""
        self._seen: dict[int, Beat] = {}
        self._still: dict[int, float] = {}
        self._looked_at: float | None = None

    def limit(self, phase: str) -> float:
        """How long a rank may stand still in a phase."""
        if phase not in self._left or phase not in self.limits.regular:
            return self.limits.first
        return max(self.limits.least, self.limits.factor * self._longest[phase])

    def look(self, beats: Mapping[int, Beat | None], now: float) -> list[int]:
        """The ranks that have stood still for too long at the time `now`; None is a rank that has not begun to beat."""
        # where this process itself has been stopped, the ranks may have been, too
        passed = 0.0 if self._looked_at is None else min(now - self._looked_at, LONGEST_LOOK_SECONDS)
        self._looked_at = now
        for rank, beat in beats.items():
            before, phase = self._seen.get(rank), self.phase(rank)
            self._still[rank] = still = self._still.get(rank, 0.0) + passed
            if beat is None or (before is not None and beat.beats == before.beats):
                continue
            self._longest[phase] = max(self._longest.get(phase, 0.0), still)
            if before is not None and (beat.phase, beat.step) != (phase, before.step):
                self._left.add(phase)
            self._seen[rank], self._still[rank] = beat, 0.0
        return [rank for rank in beats if self._still[rank] > self.limit(self.phase(rank))]

    def phase(self, rank: int) -> str:
        """The phase that a rank was last seen in."""
        return self._seen[rank].phase if rank in self._seen else "start"
