"""The report of an incident: which rank died or hangs, what it was doing, and what the others wait for."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_llama.program import CORRUPTED, LOST, STOPPED, USER_ERROR
from parallel.heartbeat import Beat, Event, suspects, waited_for

SHOWN_EVENTS = 12  # of the rank that it began with
MEANINGS = {
    LOST: "it has lost another rank",
    USER_ERROR: "something has to be mended first; its log says what",
    STOPPED: "it was asked to stop",
    CORRUPTED: "its state is not that of its copies",
}


@dataclass(frozen=True)
class Incident:
    """What was found when ranks of this node died or stood still. Times are of the monotonic clock.

    `codes`: exit codes of the ranks that had ended. `overdue`: those that stood still for too long, with the limit in seconds.
    `beats`: the last beat of every rank that had begun. `stacks`: of those that were alive; empty where one did not answer.
    `events`: the flight recorders. `noticed`: when it was found, by the wall clock, before all this was asked for.
    """

    codes: Mapping[int, int]
    overdue: Mapping[int, float]
    beats: Mapping[int, Beat]
    stacks: Mapping[int, str]
    time: float
    events: Mapping[int, Sequence[Event]] = field(default_factory=dict)
    noticed: float = 0.0

    @property
    def kind(self) -> str:
        """death, hang, or elsewhere: on another node."""
        if self.overdue or self._given_up:
            return "hang"
        return "death" if self._failed else "elsewhere"

    @property
    def _failed(self) -> list[int]:
        return [rank for rank, code in self.codes.items() if code not in (0, STOPPED)]

    @property
    def _silent(self) -> list[int]:
        return [rank for rank, text in self.stacks.items() if not text]

    @property
    def _given_up(self) -> list[int]:
        """Ranks that are alive, but have not come to a call, or to the start, for so long that others have given them up."""
        if any(self.codes[rank] != LOST for rank in self._failed):
            return []
        waiting, late = waited_for(self.beats.values()), set(self._silent)
        for rank in self._failed:
            late.update(other for _, others in waiting.get(rank, []) for other in others)
            beat = self.beats.get(rank)
            if beat is not None and beat.phase == "start" and beat.waits():
                late.update(other.rank for other in self.beats.values() if other.phase == "start" and not other.waits())
        return [rank for rank in late if rank not in self.codes]

    @property
    def rank(self) -> int:
        """The rank that it began with, as far as can be seen from this node.

        Of dead ones the first that did not die of another's death; of hanging ones see `parallel.heartbeat.suspects`.
        """
        if self.kind == "death":
            return min(self._failed, key=lambda rank: (self.codes[rank] == LOST, rank))
        not_begun = [rank for rank in self.overdue if rank not in self.beats]
        alive = [beat for rank, beat in self.beats.items() if rank not in self.codes]
        return [*not_begun, *suspects(alive, self._given_up), *self.codes][0]

    @property
    def began_here(self) -> bool:
        """Whether a rank of this node is to blame: not where its ranks have only lost contact with others."""
        return self.kind == "hang" or (self.kind == "death" and self.codes[self.rank] != LOST)

    @property
    def step(self) -> int:
        """The step that the rank was in; 0 before the first one."""
        beat = self.beats.get(self.rank)
        return 0 if beat is None else beat.step

    def headline(self) -> str:
        """One line for the log."""
        place = _place(self.beats.get(self.rank))
        if self.kind == "death":
            return f"rank {self.rank} {_ended(self.codes[self.rank])}, {place}"
        if self.kind == "elsewhere":
            return f"ranks of another node have failed; of this node, rank {self.rank} was {place}"
        return f"rank {self.rank} hangs {place}"

    def report(self, facts: Mapping[str, str]) -> str:
        """One page, then the stacks. `facts` are further lines of the page."""
        lines = [self.headline(), ""]
        lines += [f"{name:<12} {text}" for name, text in {"time": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}.items()]
        if self.kind == "hang":
            limits = sorted(set(self.overdue.values()))
            lines.append(f"{'limit':<12} {', '.join(f'{limit:.1f} s' for limit in limits)} without a sign of life")
        if self.rank in self.stacks and not self.stacks[self.rank]:
            lines.append(f"{'silent':<12} rank {self.rank} does not answer signals: stopped, or in the kernel (disk, device)")
        lines += ["", "what they wait for", *self._waiting_lines(), "", *self._table(), ""]
        if self.events.get(self.rank):
            latest = self.events[self.rank][-SHOWN_EVENTS:]
            lines += [f"what rank {self.rank} did last", *(f"    {self.time - e.time:8.3f} s before  {e}" for e in latest), ""]
        for rank in sorted(self.stacks, key=lambda rank: (rank != self.rank, rank)):
            lines += [f"stacks of rank {rank}", self.stacks[rank] or "(no answer)", ""]
        return "\n".join(lines)

    def timeline(self) -> str:
        """The events of all ranks as JSON objects, a line each, in the order of time; seconds count back from the incident."""
        events = [(event, rank) for rank, found in self.events.items() for event in found]
        lines = []
        for event, rank in sorted(events, key=lambda pair: pair[0].time):
            record = {"seconds_before": round(self.time - event.time, 6), "rank": rank, event.what: event.name}
            if event.what == "call":
                record |= {"axis": event.axis, "number": event.number}
            elif event.what == "phase":
                record["step"] = event.number
            lines.append(json.dumps(record) + "\n")
        return "".join(lines)

    def _waiting_lines(self) -> list[str]:
        found = waited_for(self.beats.values())
        lines = []
        for beat in self.beats.values():
            if self.codes.get(beat.rank, LOST) != LOST:
                continue
            for call, late in found.get(beat.rank, []):
                others = "rank " + ", ".join(map(str, late))
                lines.append(f"    rank {beat.rank}: {call}; {others} {'has' if len(late) == 1 else 'have'} not come")
            if beat.waits():
                source = "" if beat.phase == "start" else ", whose input comes from another stage"
                lines.append(f"    rank {beat.rank}: {beat.action}{source}")
        return lines or ["    nothing that this node can see"]

    def _table(self) -> list[str]:
        rows = [("rank", "phase", "step", "action", "still for", "state", "last call")]
        for rank in sorted({*self.beats, *self.codes, *self.overdue}):
            beat = self.beats.get(rank)
            state = _ended(self.codes[rank]) if rank in self.codes else "alive"
            if beat is None:
                rows.append((str(rank), "-", "-", "-", "-", state, "-"))
                continue
            still = f"{self.time - beat.time:.1f} s"
            rows.append((str(rank), beat.phase, str(beat.step), beat.action or "-", still, state, str(beat.last_call or "-")))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _place(beat: Beat | None) -> str:
    if beat is None:
        return "before it has begun"
    step = f" {beat.step}" if beat.step and "step" in beat.phase else f" (step {beat.step})" if beat.step else ""
    action = f", action {beat.action}" if beat.action else ""
    return f"in {beat.phase}{step}{action}; its last call is {beat.last_call or 'none'}"


def _ended(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    meaning = f" ({MEANINGS[code]})" if code in MEANINGS else ""
    return f"ended with code {code}{meaning}"


def write_report(directory: Path, incident: Incident, facts: Mapping[str, str]) -> Path:
    """Write the report into a new file of `directory`, the flight recorders beside it, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{incident.kind}-rank-{incident.rank:05d}"
    taken = sum(1 for _ in directory.glob(f"{name}*.txt"))  # of the same second
    path = directory / f"{name}{f'-{taken + 1}' if taken else ''}.txt"
    path.write_text(incident.report(facts), encoding="utf-8")
    path.with_name(f"{path.stem}-flight.jsonl").write_text(incident.timeline(), encoding="utf-8")
    return path
