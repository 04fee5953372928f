"""The figures of benchmark_pipeline.py: what was predicted, what the stages did, and whether that is what their lists say."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from _pipeline_stages import Work

from parallel.pipeline.check import Report, ScheduleError, check_schedule
from parallel.pipeline.costs import Costs
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import SCHEDULES, Action, Schedule

Spans = list[list[tuple[Action, float, float]]]  # per rank: action, start, end


@dataclass(frozen=True)
class Setting:
    """Times of the stages, and how many steps count."""

    sleep_seconds: float
    link_seconds: float
    steps: int

    def costs(self, overhead_seconds: float = 0.0, blocking_sends: bool = False) -> Costs:
        half, whole = self.sleep_seconds + overhead_seconds, 2 * self.sleep_seconds + overhead_seconds
        return Costs(half, whole, half, half, send=self.link_seconds, blocking_sends=blocking_sends)

    def work_seconds(self, action: Action) -> float:
        return self.sleep_seconds * (2 if action.kind == "B" else 1)


@dataclass(frozen=True)
class Case:
    """A schedule with its sizes, and with as few chunks as it can have."""

    name: str
    pp: int
    micro_batches: int

    def __str__(self) -> str:
        return f"{self.name}, {self.micro_batches} micro-batches"

    @property
    def placement(self) -> Placement:
        kind = SCHEDULES[self.name]
        return kind.placement(self.pp, kind.min_chunks)

    @property
    def schedule(self) -> Schedule:
        return SCHEDULES[self.name](self.placement, self.micro_batches)

    def predict(self, costs: Costs) -> Report:
        return check_schedule(self.schedule, self.placement, self.micro_batches, costs)

    def predict_blocking(self, costs: Costs) -> float | None:
        """Seconds with blocking sends; None for a deadlock."""
        try:
            return self.predict(costs).makespan_seconds
        except ScheduleError:
            return None


@dataclass(frozen=True)
class Step:
    """What each rank did in one step, and the most activations that it kept."""

    works: list[list[Work]]
    peaks: list[int]


@dataclass(frozen=True)
class Measurement:
    """Steps between barriers, of "ours", "blocking" (where that ends) and torch's by name; steps of ours without barriers."""

    isolated: dict[str, list[Step]]
    in_a_row: list[Step]


def spans_of(step: Step) -> Spans:
    """The actions."""
    ranks: Spans = []
    for works in step.works:
        spans: list[tuple[Action, float, float]] = []
        for before, work in zip([None, *works], works, strict=False):
            if before is not None and _continues(before, work):
                spans[-1] = Action("B", work.micro_batch, work.chunk), before.start, work.end
            else:
                spans.append((Action(work.kind, work.micro_batch, work.chunk), work.start, work.end))
        ranks.append(spans)
    return ranks


def check_order(case: Case, schedule: Schedule, steps: Sequence[Step]) -> None:
    """Every rank of every step ran its list, in its order."""
    for step in steps:
        for rank, (spans, wanted) in enumerate(zip(spans_of(step), schedule, strict=True)):
            ran = [action for action, _, _ in spans]
            if ran != wanted:
                pairs = zip(ran, wanted, strict=False)
                place = next((place for place, (one, other) in enumerate(pairs) if one != other), len(ran))
                sys.exit(f"error: {case}: pp rank {rank} left its list at place {place} of {len(wanted)}")


def check_peaks(case: Case, predicted: Sequence[float], steps: Sequence[Step]) -> None:
    for step in steps:
        for rank, (peak, most) in enumerate(zip(step.peaks, predicted, strict=True)):
            if peak > most:
                sys.exit(f"error: {case}: pp rank {rank} kept {peak} activations, and {most:g} were predicted")


def check_complete(case: Case, name: str, steps: Sequence[Step]) -> None:
    """Each rank did F, I and W of each micro-batch and chunk once: who does less does not compete."""
    chunks = case.placement.chunks
    wanted = sorted((kind, m, chunk) for kind in "FIW" for m in range(case.micro_batches) for chunk in range(chunks))
    for step in steps:
        for rank, works in enumerate(step.works):
            if sorted((work.kind, work.micro_batch, work.chunk) for work in works) != wanted:
                sys.exit(f"error: {case}: pp rank {rank} of {name} did not do all the work once")


def overhead_seconds(steps: Sequence[Step]) -> float:
    """How much later an action starts than the end of the one before and its message allow.

    The mean of a step's actions, the median of the steps.
    """
    return median(mean(late for of_rank in step.works for late in _late(of_rank)) for step in steps)


def _late(works: Sequence[Work]) -> list[float]:
    pairs = zip(works, works[1:], strict=False)
    return [work.start - max(before.end, work.arrival) for before, work in pairs if not _continues(before, work)]


def _continues(before: Work, work: Work) -> bool:
    """Whether they are one whole backward pass: W, then I. A split one has I first."""
    return (before.kind, work.kind) == ("W", "I") and before[1:3] == work[1:3]


def makespan(spans: Spans) -> float:
    return max(of_rank[-1][2] for of_rank in spans) - min(of_rank[0][1] for of_rank in spans)


def idle_and_bubble(spans: Spans, setting: Setting) -> tuple[float, float]:
    """The share of all ranks' own spans, and of the makespan, in which no stage sleeps."""
    work = sum(setting.work_seconds(action) for of_rank in spans for action, _, _ in of_rank)
    own = sum(of_rank[-1][2] - of_rank[0][1] for of_rank in spans)
    return 1 - work / own, 1 - work / (makespan(spans) * len(spans))


def predict_in_a_row(case: Case, setting: Setting, overhead_seconds: float) -> float:
    """Seconds per step of the lists repeated."""
    steps, count = range(1 + setting.steps), case.micro_batches
    repeated = [
        [Action(kind, step * count + micro_batch, chunk) for step in steps for kind, micro_batch, chunk in actions]
        for actions in case.schedule
    ]
    report = check_schedule(repeated, case.placement, len(steps) * count, setting.costs(overhead_seconds))
    return _seconds_per_step(case, report.spans)


def measured_in_a_row(case: Case, steps: Sequence[Step]) -> float:
    ranks = zip(*map(spans_of, steps), strict=True)
    return _seconds_per_step(case, [[span for spans in of_rank for span in spans] for of_rank in ranks])


def _seconds_per_step(case: Case, spans: Spans) -> float:
    """`spans`: of several steps. A step ends when its last rank does."""
    lengths = [len(actions) for actions in case.schedule]
    steps = range(len(spans[0]) // lengths[0])
    pairs = list(zip(spans, lengths, strict=True))
    ends = [max(of_rank[(step + 1) * length - 1][2] for of_rank, length in pairs) for step in steps]
    return median(end - start for start, end in zip(ends, ends[1:], strict=False))


@dataclass(frozen=True)
class Peer:
    """A schedule of torch's on the same stages."""

    schedule: str
    executed_seconds: list[float]
    peak_executed: int
    ours_over_this: float


@dataclass(frozen=True)
class Row:
    """The figures of a case: seconds (executed: of every step), shares of 1, activations of chunks."""

    schedule: str
    chunks: int
    micro_batches: int
    predicted_seconds: float
    executed_seconds: list[float]
    executed_over_predicted: float
    idle_predicted: float
    idle_executed: float
    bubble_predicted: float
    bubble_executed: float
    peak_predicted: float
    peak_executed: int
    in_a_row_predicted_seconds: float
    in_a_row_executed_seconds: float
    blocking_predicted_over_predicted: float | None
    blocking_executed_over_predicted: float | None
    torch: list[Peer]


def row_of(case: Case, setting: Setting, overhead_seconds: float, measurement: Measurement) -> Row:
    report = case.predict(setting.costs(overhead_seconds))
    predicted = report.makespan_seconds
    counted = {name: steps[1:] for name, steps in measurement.isolated.items()}
    seconds = {name: [makespan(spans_of(step)) for step in steps] for name, steps in counted.items()}
    peaks = {name: max(max(step.peaks) for step in steps) for name, steps in counted.items()}
    ours = median(seconds["ours"])
    idle_predicted, bubble_predicted = idle_and_bubble(report.spans, setting)
    idle_executed, bubble_executed = zip(*(idle_and_bubble(spans_of(step), setting) for step in counted["ours"]), strict=True)
    blocking = case.predict_blocking(setting.costs(overhead_seconds, blocking_sends=True))
    return Row(
        schedule=case.name,
        chunks=case.placement.chunks,
        micro_batches=case.micro_batches,
        predicted_seconds=predicted,
        executed_seconds=seconds["ours"],
        executed_over_predicted=ours / predicted,
        idle_predicted=idle_predicted,
        idle_executed=median(idle_executed),
        bubble_predicted=bubble_predicted,
        bubble_executed=median(bubble_executed),
        peak_predicted=max(report.peak_memory),
        peak_executed=peaks["ours"],
        in_a_row_predicted_seconds=predict_in_a_row(case, setting, overhead_seconds),
        in_a_row_executed_seconds=measured_in_a_row(case, measurement.in_a_row),
        blocking_predicted_over_predicted=None if blocking is None else blocking / predicted,
        blocking_executed_over_predicted=None if blocking is None else median(seconds["blocking"]) / predicted,
        torch=[
            Peer(name, of_torch, peaks[name], ours / median(of_torch))
            for name, of_torch in seconds.items()
            if name not in ("ours", "blocking")
        ],
    )
