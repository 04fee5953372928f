"""The table of schedules: the name that a user gives, and what each one asks of the rest of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from parallel.errors import ConfigError
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules.action import Schedule
from parallel.pipeline.schedules.controllable_memory import v_half, v_min
from parallel.pipeline.schedules.dualpipe import dualpipe_v
from parallel.pipeline.schedules.whole_backward import gpipe, interleaved, one_forward_one_backward
from parallel.pipeline.schedules.zero_bubble import zb_h1, zb_h2, zb_v


@dataclass(frozen=True)
class ScheduleKind:
    """One row: the function and its rules.

    `min_chunks` and `max_chunks` per rank (None: any number); `placement_kind` of its stages; `min_micro_batches_per_rank`:
    it needs that many micro-batches times pp. `splits_backward`: has I and W.
    """

    name: str
    make: Callable[[Placement, int], Schedule]
    min_chunks: int = 1
    max_chunks: int | None = 1
    placement_kind: str = "loop"
    min_micro_batches_per_rank: int = 0
    splits_backward: bool = False

    def __call__(self, placement: Placement, micro_batches: int) -> Schedule:
        return self.make(placement, micro_batches)

    def placement(self, pp: int, chunks: int) -> Placement:
        return Placement(pp, chunks, self.placement_kind)

    def allows(self, pp: int, chunks: int, micro_batches: int) -> bool:
        """Whether the schedule can run with these sizes."""
        return self._nearest_chunks(chunks) == chunks and micro_batches >= self.min_micro_batches_per_rank * pp

    def validate(self, pp: int, chunks: int, micro_batches: int, samples_per_micro_batch: int = 1) -> None:
        """Raise ConfigError, with the nearest choices that work, where the schedule cannot run with these sizes.

        `samples_per_micro_batch`: train.micro_batch_size times the data-parallel size.
        """
        others = " or ".join(name for name, kind in SCHEDULES.items() if kind.allows(pp, chunks, micro_batches))
        instead = f", or --parallel.schedule to {others}" if others else ""
        nearest = self._nearest_chunks(chunks)
        if chunks != nearest:
            raise ConfigError(
                f"parallel.schedule = {self.name} cannot have parallel.chunks = {chunks}: "
                f"set --parallel.chunks to {nearest}{instead}"
            )
        needed = self.min_micro_batches_per_rank * pp
        if micro_batches < needed:
            raise ConfigError(
                f"parallel.schedule = {self.name} with parallel.pp = {pp} needs {needed} micro-batches, and "
                f"train.global_batch_size = {micro_batches * samples_per_micro_batch} makes {micro_batches}: set "
                f"--train.global_batch_size to {needed * samples_per_micro_batch}{instead}"
            )

    def _nearest_chunks(self, chunks: int) -> int:
        most = chunks if self.max_chunks is None else self.max_chunks
        return max(self.min_chunks, min(chunks, most))


_V = {"min_chunks": 2, "max_chunks": 2, "placement_kind": "v", "splits_backward": True}

SCHEDULES: Mapping[str, ScheduleKind] = {
    kind.name: kind
    for kind in (
        ScheduleKind("gpipe", gpipe),
        ScheduleKind("1f1b", one_forward_one_backward),
        ScheduleKind("interleaved", interleaved, min_chunks=2, max_chunks=None),
        ScheduleKind("zb-h1", zb_h1, splits_backward=True),
        ScheduleKind("zb-h2", zb_h2, splits_backward=True),
        ScheduleKind("zb-v", zb_v, **_V),
        ScheduleKind("v-half", v_half, **_V),
        ScheduleKind("v-min", v_min, **_V),
        ScheduleKind("dualpipe-v", dualpipe_v, min_micro_batches_per_rank=2, **_V),
    )
}
