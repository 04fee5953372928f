"""Choosing a schedule: all that the sizes allow, costed, and the fastest one that fits the memory given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parallel.errors import ConfigError
from parallel.pipeline.check import Report, check_schedule
from parallel.pipeline.costs import Costs
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import SCHEDULES, ScheduleKind


@dataclass(frozen=True)
class Candidate:
    """A schedule that the sizes allow, and what it would cost."""

    kind: ScheduleKind
    placement: Placement
    report: Report

    def fits(self, memory: Sequence[float]) -> bool:
        """Whether every pp rank's peak is within `memory[rank]`, in the unit of the costs."""
        return all(peak <= limit for peak, limit in zip(self.report.peak_memory, memory, strict=True))

    def __str__(self) -> str:
        return f"{self.kind.name} with parallel.chunks = {self.placement.chunks}"


def candidates(
    pp: int, micro_batches: int, chunk_counts: Sequence[int], costs_of: Callable[[Placement], Costs]
) -> list[Candidate]:
    """Every schedule of the table with these sizes, fastest first; among equally fast ones the one with the least memory first.

    `costs_of` gives the costs of a placement's stages (its layers are split differently in each).
    """
    found = []
    for kind in SCHEDULES.values():
        for chunks in chunk_counts:
            if kind.allows(pp, chunks, micro_batches):
                placement = kind.placement(pp, chunks)
                report = check_schedule(kind(placement, micro_batches), placement, micro_batches, costs_of(placement))
                found.append(Candidate(kind, placement, report))
    return sorted(found, key=lambda one: (round(one.report.makespan_seconds, 9), max(one.report.peak_memory)))


def choose_schedule(found: Sequence[Candidate], memory: Sequence[float], unit: str = "activations") -> Candidate:
    """`parallel.schedule = auto`: the fastest of `candidates` that fits `memory[rank]` on each pp rank.

    Raises ConfigError, with the one that needs least, where none fits. `unit` is that of the costs, for the message.
    """
    return _fastest("auto", found, memory, unit)


def require_fit(wanted: Candidate, found: Sequence[Candidate], memory: Sequence[float], unit: str = "activations") -> None:
    """Raise ConfigError, with the fastest schedule that fits, where the wanted one does not fit `memory[rank]`."""
    if not wanted.fits(memory):
        best = _fastest(wanted.kind.name, found, memory, unit)
        raise ConfigError(
            f"parallel.schedule = {wanted.kind.name}: {_needs(wanted, memory, unit)}; "
            f"set --parallel.schedule to {best.kind.name} with --parallel.chunks {best.placement.chunks}"
        )


def _fastest(asked: str, found: Sequence[Candidate], memory: Sequence[float], unit: str) -> Candidate:
    """The fastest candidate that fits. Raises ConfigError for the schedule that was asked for where none does."""
    fitting = [candidate for candidate in found if candidate.fits(memory)]
    if not fitting:
        least = min(found, key=lambda candidate: max(candidate.report.peak_memory))
        raise ConfigError(
            f"parallel.schedule = {asked}: no schedule fits the memory for activations. {_needs(least, memory, unit)}, and the "
            "others need more: set --parallel.recompute, lower --train.micro_batch_size or raise --parallel.pp"
        )
    return fitting[0]


def _needs(candidate: Candidate, memory: Sequence[float], unit: str) -> str:
    """The first pp rank where a candidate does not fit, with the numbers."""
    peaks = enumerate(candidate.report.peak_memory)
    rank, peak = next((rank, peak) for rank, peak in peaks if peak > memory[rank])
    return f"{candidate} needs {peak:.4g} {unit} on pp rank {rank}, where {memory[rank]:.4g} are free"
