"""Timelines: what each pp rank does when, predicted from a schedule or measured in a trace; as text for a terminal.

Times and memory are per rank: F of a rank with two chunks is two actions of half the cost, so schedules of different chunk
counts compare.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from parallel.errors import DataError
from parallel.pipeline.check import Report, check_schedule
from parallel.pipeline.choice import candidates
from parallel.pipeline.costs import Costs
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import ScheduleKind

KINDS = ("F", "B", "I", "W", "wait")


class Bar(NamedTuple):
    """An action, or the wait for the message that it needs (`kind` "wait")."""

    kind: str
    micro_batch: int
    chunk: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What is drawn: `rows[pp rank]` in the order of time; what the times are, as the label of their axis; their unit."""

    name: str
    rows: list[list[Bar]]
    time_label: str
    unit: str = ""

    @cached_property
    def chunks(self) -> int:
        """Chunks per rank."""
        return 1 + max(bar.chunk for row in self.rows for bar in row)

    @cached_property
    def micro_batches(self) -> int:
        return 1 + max(bar.micro_batch for row in self.rows for bar in row)

    @cached_property
    def makespan(self) -> float:
        """From the start of the clock to the end of the last action."""
        return max(bar.end for row in self.rows for bar in row)

    @cached_property
    def bubble(self) -> float:
        """The share of all ranks' time in which no action runs."""
        busy = sum(bar.end - bar.start for row in self.rows for bar in row if bar.kind != "wait")
        return 1.0 - busy / (self.makespan * len(self.rows))

    @cached_property
    def peaks(self) -> list[float]:
        """Per rank, the most micro-batches' activations of all its layers at once, kept from F to B or W, as papers count."""
        return [self._peak(row) / self.chunks for row in self.rows]

    def _peak(self, row: list[Bar]) -> int:
        kept = peak = 0
        for bar in row:
            kept += {"F": 1, "B": -1, "W": -1}.get(bar.kind, 0)
            peak = max(peak, kept)
        return peak

    @property
    def sizes(self) -> str:
        chunks = f"chunks {self.chunks}, " if self.chunks > 1 else ""
        return f"pp {len(self.rows)}, {chunks}micro-batches {self.micro_batches}"

    @property
    def figures(self) -> str:
        return f"time {self.time}, bubble {self.bubble:.1%}, peak activations {max(self.peaks):.3g}"

    @property
    def time(self) -> str:
        """The makespan with its unit."""
        return f"{self.makespan:.4g}{self.unit}"


def predict(kind: ScheduleKind, pp: int, chunks: int, micro_batches: int, costs: Costs) -> Timeline:
    """The timeline of a schedule. `costs` are those of one micro-batch on all layers of a rank, whatever its chunks.

    Raises ConfigError where the schedule cannot have these sizes.
    """
    kind.validate(pp, chunks, micro_batches)
    placement = kind.placement(pp, chunks)
    report = check_schedule(kind(placement, micro_batches), placement, micro_batches, _of_chunk(costs, placement))
    return _predicted(kind.name, report, costs)


def compare(pp: int, chunks: int, micro_batches: int, costs: Costs) -> list[Timeline]:
    """Timelines of all schedules that can have 1 or `chunks` chunks per rank and these sizes, the fastest first.

    `costs` as in `predict`.
    """
    found = candidates(pp, micro_batches, sorted({1, chunks}), lambda placement: _of_chunk(costs, placement))
    return [_predicted(one.kind.name, one.report, costs) for one in found]


def _of_chunk(costs: Costs, placement: Placement) -> Costs:
    """The costs of one of a rank's chunks, where `costs` are those of all of them."""
    actions = ("forward", "backward", "input_backward", "weight_backward")
    return replace(costs, **{name: getattr(costs, name) / placement.chunks for name in actions})


def _predicted(name: str, report: Report, costs: Costs) -> Timeline:
    """The spans of a report, and the waits between them."""
    rows = []
    for spans in report.spans:
        row: list[Bar] = []
        for action, start, end in spans:
            free = row[-1].end if row else 0.0
            if start > free:
                row.append(Bar("wait", action.micro_batch, action.chunk, free, start))
            row.append(Bar(*action, start, end))
        rows.append(row)
    return Timeline(name, rows, f"predicted time; one micro-batch on one rank: {_cost_text(costs)}")


def _cost_text(costs: Costs) -> str:
    values = {"F": costs.forward, "B": costs.backward, "I": costs.input_backward, "W": costs.weight_backward}
    message = f" and {costs.send:g} for each message" if costs.send else ""
    return ", ".join(f"{kind} = {value:g}" for kind, value in values.items()) + message


def read_trace(path: Path) -> Timeline:
    """The timeline of a trace file (RUN/traces/step_N.json) in milliseconds: per stage, the first of its ranks.

    Raises DataError where the file is not such a trace.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        spans = [event for event in events if event["ph"] == "X" and event["cat"] in KINDS]
        first_rank: dict[int, int] = {}
        for event in spans:
            stage = event["args"]["pp_rank"]
            first_rank[stage] = min(event["tid"], first_rank.get(stage, event["tid"]))
        rows = [[_bar(event) for event in spans if event["tid"] == first_rank[stage]] for stage in sorted(first_rank)]
    except OSError as error:
        raise DataError(f"{path}: cannot read the trace: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not a trace as log.trace_steps makes them: {error!r}") from error
    if not rows:
        raise DataError(f"{path}: the trace has no actions")
    rows = [sorted(row, key=lambda bar: bar.start) for row in rows]
    return Timeline(path.stem, rows, "measured time, milliseconds", " ms")


def _bar(event: dict[str, Any]) -> Bar:
    """Microseconds to milliseconds."""
    start, end = event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3
    return Bar(event["cat"], event["args"]["micro_batch"], event["args"]["chunk"], start, end)


def text_lines(timeline: Timeline, width: int) -> list[str]:
    """The timeline as text: a letter and a number per action, or what fits of them; dots where none runs.

    Odd chunks are in small letters. As wide as `width` columns allow, wider where most actions would have less than one.
    """
    labels = [f"rank {rank} " for rank in range(len(timeline.rows))]
    scale = _columns_per_second(timeline, max(20, width - len(labels[-1])))
    lines = [f"{timeline.name}: {timeline.sizes}; {timeline.figures}"]
    for label, row in zip(labels, timeline.rows, strict=True):
        cells = ["."] * _column(timeline.makespan * scale)
        for bar in row:
            start, end = _column(bar.start * scale), _column(bar.end * scale)
            if bar.kind != "wait":
                cells[start:end] = _cell(bar, end - start)
        lines.append(label.ljust(len(labels[-1])) + "".join(cells))
    return lines


def _columns_per_second(timeline: Timeline, columns: int) -> float:
    """Whole columns for a short action (nine in ten are no shorter): then equal actions look equal."""
    lengths = sorted(bar.end - bar.start for row in timeline.rows for bar in row if bar.kind != "wait")
    short = lengths[len(lengths) // 10]
    return max(1, math.floor(short * columns / timeline.makespan + 1e-6)) / short


def _column(place: float) -> int:
    """Always rounded down, so that equal lengths of whole columns stay equal wherever they begin."""
    return math.floor(place + 1e-6)


def _cell(bar: Bar, columns: int) -> str:
    letter = bar.kind.lower() if bar.chunk % 2 else bar.kind
    name = f"{letter}{bar.micro_batch}"
    return (name if len(name) <= columns else letter).ljust(columns, "-")[:columns]
