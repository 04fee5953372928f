"""Where a rank's steps go: forward, backward, weight gradients, update, and the times in which it stands still.

A recorder marks the beginning of each step, the executor's actions, regions around them and every wait for others. Afterwards
each wait belongs to what it interrupts, so that the phases of a step add up to it. On a GPU all marks are events of the compute
stream: times are the device's, and recording makes nobody wait.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from parallel.groups import ProcessGroups
from parallel.pipeline.layout import Placement
from parallel.pipeline.trace import Mark, Trace
from parallel.topology import Topology
from parallel.waiting import Handle, WaitClock

# What a step's time goes into; together they are all of it.
PHASES = {
    "forward": "forward",
    "backward": "backward (with what is computed again)",
    "weight_gradients": "weight gradients (W of a split backward pass)",
    "update": "norm, update, reductions begun",
    "bubble": "bubble: waiting for a message not yet made",
    "messages": "messages between pipeline stages",
    "collectives": "collectives, and who comes late to them",
    "data": "next batch",
    "other": "anything else",
}
EXPOSED = ("messages", "collectives")  # communication that no computation hides
STANDING = ("bubble", *EXPOSED, "data")  # the rest is a rank's own work
PHASE_OF = {"F": "forward", "B": "backward", "I": "backward", "W": "weight_gradients", "wait": "received"}
RUN, UPDATE, DATA = "run", "update", "data"  # regions: of the executor, of the engine's part, of the loader's


class Interval(NamedTuple):
    """Seconds on one rank's clock."""

    name: str
    start: float
    end: float


class Recorder(Trace):
    """A trace of several steps, with regions and waits besides. Wait on `clock` only where it is the ledger's."""

    def __init__(self, groups: ProcessGroups, placement: Placement, device: torch.device) -> None:
        super().__init__(groups, placement, device)
        self.clock = RecordingClock(self)
        self.restart()

    def restart(self) -> None:
        """Forget all; waits for the device."""
        self._synchronize()
        self._origin_seconds, self._origin = time.perf_counter(), self._mark()
        self._spans, self.clock.marks = [], []
        self._steps: list[Mark] = []
        self._regions: list[tuple[str, Mark, Mark]] = []

    def begin_step(self) -> None:
        """A step begins here, or, after the last one, nothing."""
        self._steps.append(self._mark())

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = self._mark()
        yield
        self._regions.append((name, start, self._mark()))

    def surround(self, owner: object, method: str, name: str) -> None:
        """From now on, calls of a method are regions of that name."""
        original = getattr(owner, method)

        def recorded(*arguments: Any, **options: Any) -> Any:
            with self.region(name):
                return original(*arguments, **options)

        setattr(owner, method, recorded)

    def keep_last_step(self) -> None:
        """Forget the actions of all steps but the last: what `write` is to show."""
        start = self._seconds(self._steps[-2])
        self._spans = [span for span in self._spans if self._seconds(span[2]) >= start]

    def read(self) -> tuple[list[float], list[Counter[str]]]:
        """Seconds of each step and of its phases; waits for the device."""
        self._synchronize()
        starts = [self._seconds(mark) for mark in self._steps]
        spans = [Interval(PHASE_OF[kind], self._seconds(start), self._seconds(end)) for kind, _, start, end in self._spans]
        regions = [Interval(name, self._seconds(start), self._seconds(end)) for name, start, end in self._regions]
        waits = [Interval("wait", self._seconds(start), self._seconds(end)) for start, end in self.clock.marks]
        return seconds_by_phase(starts, spans, regions, waits)


class RecordingClock(WaitClock):
    """Marks every wait of the compute stream on the recorder's clock; those of other streams hold no computation up."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self.marks: list[tuple[Mark, Mark]] = []
        self._stream = torch.cuda.current_stream(recorder.device) if recorder.device.type == "cuda" else None

    def wait(self, handle: Handle) -> None:
        if self._stream is not None and torch.cuda.current_stream(self._stream.device) != self._stream:
            handle.wait()
            return
        start = self._recorder._mark()
        handle.wait()
        self.marks.append((start, self._recorder._mark()))


def seconds_by_phase(
    starts: Sequence[float], spans: Sequence[Interval], regions: Sequence[Interval], waits: Sequence[Interval]
) -> tuple[list[float], list[Counter[str]]]:
    """Seconds of each step, and of it in each phase; `starts` are the steps' and the end of the last one.

    Waits inside actions and updates are for collectives ("collectives", "update_collectives"), those between actions for what
    was sent. "received" are the waits for messages, in which lies the bubble.
    """
    inner = sorted([*spans, *(region for region in regions if region.name != RUN)], key=lambda one: one.start)
    begins = [one.start for one in inner]
    running = sorted((region for region in regions if region.name == RUN), key=lambda one: one.start)
    run_begins = [one.start for one in running]
    steps: list[Counter[str]] = [Counter() for _ in starts[1:]]

    def add(name: str, moment: float, seconds: float) -> None:
        steps[min(max(bisect_right(starts, moment) - 1, 0), len(steps) - 1)][name] += seconds

    for one in inner:
        add(one.name, one.start, one.end - one.start)
    for wait in waits:
        holder = _holder(inner, begins, wait)
        if holder is not None and holder.name in ("received", DATA):
            continue
        seconds = wait.end - wait.start
        if holder is not None:
            add(holder.name, wait.start, -seconds)
            add("update_collectives" if holder.name == UPDATE else "collectives", wait.start, seconds)
        else:
            add("messages" if _holder(running, run_begins, wait) else "collectives", wait.start, seconds)
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    for length, phases in zip(lengths, steps, strict=True):
        phases["other"] = length - sum(phases.values())
    return lengths, steps


def _holder(intervals: Sequence[Interval], begins: Sequence[float], inside: Interval) -> Interval | None:
    """Which of disjoint intervals, sorted by their begins, holds that one."""
    place = bisect_right(begins, inside.start) - 1
    return intervals[place] if place >= 0 and inside.start < intervals[place].end else None


# ---- the bubble ---------------------------------------------------------------------------------------------------------


class Idle(NamedTuple):
    """Of a rank in one step, seconds: what it waited for messages, how much of that while nobody had made them yet, and how
    long after its last action other ranks of its pipeline still had some."""

    received: float
    unmade: float
    tail: float


def idle_ranks(chrome: Mapping[str, Any], topology: Topology) -> dict[int, Idle]:
    """By rank, from the trace of one step (`Trace.write`). A message is made when the action ends that sends it."""
    ends: dict[tuple, float] = {}
    last: dict[int, float] = defaultdict(float)
    spans = [event for event in chrome["traceEvents"] if event["ph"] == "X"]
    for event in spans:
        if event["cat"] != "wait":
            end = event["ts"] + event["dur"]
            ends[_made_by(event, topology)] = end
            last[event["tid"]] = max(last[event["tid"]], end)
    kinds = _kinds_waited_for(spans)
    received, unmade = Counter(), Counter()
    for event, kind in zip(spans, kinds, strict=True):
        if kind is None:
            continue
        source = _made_by(event, topology, kind, -1 if kind == "F" else 1)
        received[event["tid"]] += event["dur"]
        unmade[event["tid"]] += min(max(ends.get(source, 0.0) - event["ts"], 0.0), event["dur"])
    found = {}
    for pipeline in topology.groups("pp"):
        finish = max(last[rank] for rank in pipeline)
        for rank in pipeline:
            micro = received[rank], unmade[rank], finish - last[rank]
            found[rank] = Idle(*(seconds / 1e6 for seconds in micro))
    return found


def _made_by(event: Mapping[str, Any], topology: Topology, kind: str | None = None, shift: int = 0) -> tuple:
    """The key of the action that the event is, or of the one `shift` stages on that makes what it waits for."""
    place, arguments = topology.coordinates(event["tid"]), event["args"]
    passes = "F" if (kind or event["cat"]) == "F" else "W" if event["cat"] == "W" else "B"
    return passes, arguments["micro_batch"], arguments["stage"] + shift, (place.dp, place.cp, place.tp)


def _kinds_waited_for(spans: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Of each wait whether an F or a backward pass comes after it on its rank; None for what is no wait."""
    kinds: list[str | None] = [None] * len(spans)
    following: dict[int, str] = {}
    for place in sorted(range(len(spans)), key=lambda one: spans[one]["ts"], reverse=True):
        event = spans[place]
        if event["cat"] == "wait":
            kinds[place] = "F" if following.get(event["tid"], "F") == "F" else "B"
        else:
            following[event["tid"]] = event["cat"]
    return kinds
