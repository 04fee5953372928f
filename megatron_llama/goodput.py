"""Where the wall time of a run went, and how often it failed, from what it has written down.

`metrics.jsonl` and `discarded.jsonl` say when the program started, what it did then, and which steps a resume took back
(megatron_llama/metrics.py). The log of a supervisor (megatron_llama/supervise.py) adds when the processes were started and when
they died, which the records alone cannot know: one JSON object per line,

    {"time": 1767225600.0, "event": "start" | "death" | "hang" | "restart" | "end", ...}

time in seconds since the epoch. start: the supervisor starts the ranks; death: one of them has died; hang: one stands still;
restart: all are started again; end: the supervisor ends. Other events, and further fields (rank, step, code), are passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from parallel.errors import DataError

# What wall time goes into; together they are all of it.
PARTS = {
    "steps": "steps that count",
    "redone": "steps lost and done again",
    "skipped": "steps skipped (not finite)",
    "checkpoints": "checkpoints",
    "evaluation": "evaluation",
    "starting": "starting and restarting",
    "idle": "not running",
    "other": "anything else",
}
STEPS = ("steps", "redone", "skipped")
FAILURES = ("death", "hang")
# what time is spent on after each event, until the next one
AFTER = {"start": "starting", "death": "starting", "hang": "starting", "restart": "starting", "end": "idle"}
WORLD = re.compile(r", torch \S+, (\d+) x ")  # in the first line that a start writes to its log


@dataclass(frozen=True)
class Record:
    """A line of metrics.jsonl. `part` is what its time went into; None: an event, or something that takes no time."""

    step: int
    time: float  # when it was written
    part: str | None = None
    seconds: float | None = None  # None: since the record before
    event: str | None = None  # start, end


@dataclass(frozen=True)
class Event:
    """A line of the supervisor's log."""

    time: float
    event: str


@dataclass(frozen=True)
class Gap:
    """Time between two programs of a run: seconds by part, and how often it failed there."""

    failures: int
    redone: float = 0.0
    starting: float = 0.0
    idle: float = 0.0


@dataclass(frozen=True)
class Account:
    """What became of a run's wall time. Counts of steps; seconds; None where a run has shown none."""

    begin: float  # since the epoch
    seconds: dict[str, float]  # by part
    failures: int
    steps: int
    steps_redone: int
    step_seconds: float  # the median
    checkpoint_seconds: float | None  # for which a checkpoint held training up, the median
    restart_seconds: float | None  # from a failure until the program had started again, the mean
    save_every: int | None  # steps between checkpoints, the median

    @property
    def wall_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def effective_share(self) -> float:
        """The share of wall time in steps that count."""
        return self.seconds["steps"] / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def present_interval(self) -> float | None:
        """Seconds of training between checkpoints."""
        return self.save_every * self.step_seconds if self.save_every else None

    @property
    def running_seconds(self) -> float:
        """Time in which a failure could strike."""
        return self.wall_seconds - self.seconds["idle"]

    @property
    def running_share(self) -> float:
        """As `effective_share`, without the time in which the run was stopped."""
        return self.seconds["steps"] / self.running_seconds if self.running_seconds else 0.0


def read_records(run_directory: Path) -> list[Record]:
    """What a run has recorded, in the order of time, discarded steps as part `redone`. Raises DataError."""
    path, discarded_path = run_directory / "metrics.jsonl", run_directory / "discarded.jsonl"
    kept = list(_json_lines(path))
    discarded = list(_json_lines(discarded_path)) if discarded_path.exists() else []
    if not all({"step", "time"} <= line.keys() for line in kept + discarded):
        raise DataError(f"{path}: has lines without a time: an older version wrote it, and cannot say when they were written")
    # a crash may have left a line in both files, and the next resume then discards it twice
    lost = {json.dumps(line): _record(line, is_lost=True) for line in discarded}
    records = [_record(line) for line in kept if json.dumps(line) not in lost] + list(lost.values())
    if not any(record.part in STEPS for record in records):
        raise DataError(f"{path}: has no step yet")
    return sorted(records, key=lambda record: record.time)


def _record(line: dict, is_lost: bool = False) -> Record:
    step, time = line["step"], line["time"]
    if "step_seconds" in line:
        part = "redone" if is_lost else "skipped" if line.get("skipped") else "steps"
        return Record(step, time, part, line["step_seconds"])
    if "checkpoint_seconds" in line:
        return Record(step, time, "checkpoints", line["checkpoint_seconds"])
    return Record(step, time, "evaluation" if "valid_loss" in line else None, event=line.get("event"))


def read_events(supervisor_log: Path) -> list[Event]:
    """The supervisor's log, in the order of time. Raises DataError."""
    events = []
    for number, line in enumerate(_json_lines(supervisor_log), 1):
        if not isinstance(line.get("time"), int | float) or not isinstance(line.get("event"), str):
            raise DataError(f'{supervisor_log}: line {number} is no event: it has no "time" in seconds and "event"')
        events.append(Event(line["time"], line["event"]))
    return sorted((event for event in events if event.event in AFTER), key=lambda event: event.time)


def _json_lines(path: Path) -> Iterator[dict]:
    """A file's lines; a torn last one, as a kill leaves it or a run in progress shows it, is left out."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            return
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise DataError(f"{path}: line {number} is not a JSON object")
        yield value


def world_size(run_directory: Path) -> int | None:
    """How many ranks the newest start of the run had, by rank 0's log; None where that does not say."""
    try:
        found = WORLD.findall((run_directory / "logs" / "rank-00000.log").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return int(found[-1]) if found else None


def account(records: Sequence[Record], events: Sequence[Event] = ()) -> Account:
    """Divide a run's wall time, from its first sign of life to its last. Both lists in the order of time.

    A step's record is written while the next one runs, so a step under way at a death has none: with a supervisor's log its
    time is counted as lost, without one as part of the restart.
    """
    programs = _programs(records)
    begin = min(event.time for event in [*events[:1], *records[:1]])
    end = max(event.time for event in [*events[-1:], *records[-1:]])
    gaps = _gaps(programs, begin, end, events)

    seconds = dict.fromkeys(PARTS, 0.0)
    for program in programs:
        for before, record in pairwise(program):
            if record.part:
                seconds[record.part] += record.time - before.time if record.seconds is None else record.seconds
    for gap in gaps:
        for part in ("redone", "starting", "idle"):
            seconds[part] += getattr(gap, part)
    seconds["other"] = max(0.0, end - begin - sum(seconds.values()))

    restarts = [gap for gap in gaps[:-1] if gap.failures]
    steps = [record for record in records if record.part in STEPS]
    saves = [record for record in records if record.part == "checkpoints"]
    intervals = [b.step - a.step for a, b in pairwise(saves) if b.step > a.step]
    return Account(
        begin=begin,
        seconds=seconds,
        failures=sum(gap.failures for gap in gaps),
        steps=sum(record.part == "steps" for record in steps),
        steps_redone=sum(record.part == "redone" for record in steps),
        step_seconds=median(record.seconds for record in steps),
        checkpoint_seconds=median(record.seconds for record in saves) if saves else None,
        restart_seconds=sum(gap.starting for gap in restarts) / sum(gap.failures for gap in restarts) if restarts else None,
        save_every=round(median(intervals)) if intervals else None,
    )


def _programs(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each start of the program."""
    programs: list[list[Record]] = []
    for record in records:
        if record.event == "start" or not programs:
            programs.append([])
        programs[-1].append(record)
    return programs


def _gaps(programs: Sequence[Sequence[Record]], begin: float, end: float, events: Sequence[Event]) -> list[Gap]:
    """What lies before the first program, between two, and after the last."""
    starts, ends = [program[0] for program in programs], [program[-1] for program in programs]
    # events that come before the last record of a program, as another rank's death may, belong to the gap after it
    bounds = [-math.inf, *(start.time for start in starts), math.inf]
    told = [[event for event in events if since < event.time <= until] for since, until in pairwise(bounds)]
    states = ["idle", *("idle" if last.event == "end" else "died" for last in ends)]
    if states[-1] == "died":
        states[-1] = "alive"
    sides = zip([begin, *(last.time for last in ends)], [*(start.time for start in starts), end], states, told, strict=True)
    return [_gap(*side) for side in sides]


def _gap(begin: float, end: float, state: str, events: Sequence[Event]) -> Gap:
    """Divide the time between two programs. `state`: the first one is idle (has ended), has died, or may still be alive.

    A rank works on until its death, and that is lost; one that hangs does not, and its time until the hang is noticed is part
    of the restart. Ranks that die one after another are one failure, until something is started again.
    """
    seconds, cursor, failures, is_down = dict.fromkeys(("redone", "starting", "idle"), 0.0), begin, 0, False
    least_failures = int(state == "died")
    for event in events:
        works = state in ("died", "alive")
        part = state if not works else "redone" if event.event == "death" else "starting"
        seconds[part] += max(0.0, event.time - cursor)
        cursor, state = max(cursor, event.time), AFTER[event.event]
        failures += event.event in FAILURES and not is_down
        is_down = event.event in FAILURES or (is_down and event.event == "end")
    seconds["idle" if state == "idle" else "starting"] += end - cursor
    return Gap(max(failures, least_failures), **seconds)
