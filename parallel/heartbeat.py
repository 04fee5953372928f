"""Heartbeats: what a rank is doing, in a page of shared memory that a supervisor on the same node reads.

A beat is a write to memory: no system call, about a microsecond. It says the phase, the step, the action, and per axis how many
collectives have been started; so a supervisor sees who stands still, and for whom the others wait.
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

HEAD = struct.Struct("<qqdq")  # pid, number of beats, time of the latest (monotonic clock), slot of the latest call
PLACE = struct.Struct("<q24s24s")  # step, phase, action
CALL = struct.Struct("<qqqq16s16s")  # number of the call over its axis, its members (first, last, how many), kind, axis
PLACE_OFFSET, CALLS_OFFSET, SLOTS = 32, 96, 24
SIZE = CALLS_OFFSET + SLOTS * CALL.size
STACK_SIGNAL = signal.SIGUSR2
MESSAGES = ("send", "receive")  # not made by all members alike, so that their numbers can't be compared
LONGEST_LOOK_SECONDS = 2.0  # that a look of the supervisor counts for
WAITS = "waits for "  # begins the name of an action that another rank's message has to come first for


class Heartbeat:
    """The writing side. Without a file it writes to memory that nobody reads.

    With a file, the stacks of all threads are written beside it whenever this process receives STACK_SIGNAL.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._slots: dict[tuple[str, bool], int] = {}
        self._numbers = [0] * SLOTS
        self._beats, self._latest, self._pid = 0, -1, os.getpid()
        self._memory: mmap.mmap | bytearray = bytearray(SIZE)
        if path is not None:
            self._stacks = open(stacks_path(path), "w")  # open as long as the process lives
            faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)
            with open(path, "w+b") as file:
                file.truncate(SIZE)
                self._memory = mmap.mmap(file.fileno(), SIZE)
            self.enter("start")

    def enter(self, phase: str, step: int = 0) -> None:
        """A phase begins; `step` is the one under way."""
        PLACE.pack_into(self._memory, PLACE_OFFSET, step, phase.encode(), b"")
        self._beat()

    def act(self, action: str) -> None:
        """An action of the phase begins."""
        struct.pack_into("<24s", self._memory, PLACE_OFFSET + 32, action.encode())
        self._beat()

    def call(self, kind: str, axis: str, ranks: tuple[int, ...]) -> None:
        """A collective, or a message, over an axis is about to start."""
        key = axis, kind in MESSAGES
        slot = self._slots.setdefault(key, min(len(self._slots), SLOTS - 1))
        self._numbers[slot] += 1
        ends = ranks[0], ranks[-1], len(ranks)
        CALL.pack_into(self._memory, CALLS_OFFSET + slot * CALL.size, self._numbers[slot], *ends, kind.encode(), axis.encode())
        self._latest = slot
        self._beat()

    def _beat(self) -> None:
        self._beats += 1
        HEAD.pack_into(self._memory, 0, self._pid, self._beats, time.monotonic(), self._latest)


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


def beat_path(directory: Path, rank: int) -> Path:
    """The file of a rank's heartbeat."""
    return directory / f"rank-{rank:05d}.beat"


def stacks_path(path: Path) -> Path:
    """Where the process whose heartbeat is `path` writes its stacks."""
    return path.with_suffix(".stacks")


def read(directory: Path, rank: int) -> Beat | None:
    """The latest beat of a rank; None where it has not made its file yet."""
    try:
        record = beat_path(directory, rank).read_bytes()
    except FileNotFoundError:
        return None
    if len(record) < SIZE:
        return None
    pid, beats, moment, latest = HEAD.unpack_from(record)
    step, phase, action = PLACE.unpack_from(record, PLACE_OFFSET)
    if not beats:
        return None
    calls = tuple(filter(None, (_call(record, slot) for slot in range(SLOTS))))
    last = _call(record, latest) if latest >= 0 else None
    return Beat(rank, pid, beats, moment, step, _text(phase), _text(action), calls, last)


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
    regular: tuple[str, ...] = ("step", "evaluate")  # the others depend on storage, whose pauses say little about the next


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
