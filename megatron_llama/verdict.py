"""The numbers of a training step on their way from the device to the host, and when it ended there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_llama.state import Position
from megatron_llama.watching.watch import Criteria
from parallel.checkpoint.background import Progress
from parallel.host_copy import HostCopy
from parallel.zero.engine import StepInfo


class Moment:
    """A point in the device's work: an event on a GPU, the time on a CPU, which does its work when it is told."""

    def __init__(self, device: torch.device) -> None:
        self._event, self._seconds = None, time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Return when the device has got there."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds of the device's work from `earlier` to here; both must have been waited for."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000.0  # milliseconds
        return self._seconds - earlier._seconds


class HostSums(NamedTuple):
    """What a rank's host adds to a step's sums, and these sums over the ranks."""

    stop_wishes: float = 0.0  # ranks
    data_wait_seconds: float = 0.0
    saved_parts: float = 0.0  # `saving`, of which this and the rest are the fields
    saved_commits: float = 0.0
    failed_saves: float = 0.0

    @property
    def saving(self) -> Progress:
        """How far the save under way is."""
        return Progress(*self[2:])


NO_SUMS = HostSums()


@dataclass(frozen=True)
class StepNumbers:
    """What the device knows about a step, summed over the ranks that it concerns."""

    loss: float  # token mean of the global batch
    loss_limit: float  # above which the step is a spike
    norm_limit: float
    sums: HostSums
    grad_norm: float
    skipped: float  # 1.0 where the update was masked
    squared_lengths: float  # sum over the documents of length^2; exact below 2^53
    loss_scale: float | None = None  # what the loss was multiplied by (fp16)


class Verdict:
    """The numbers of one step on their way to the host.

    `before` is where the run was, and `criteria` are what the step is judged by: with both it may be run again.
    """

    def __init__(
        self, before: Position, rate: float, info: StepInfo, squared_lengths: Tensor, criteria: Criteria
    ) -> None:
        self.before, self.rate, self.info, self.criteria = before, rate, info, criteria
        self.step = before.step + 1
        device = squared_lengths.device
        self.finished = Moment(device)

        def values() -> list[Tensor]:
            scale = [] if info.loss_scale is None else [info.loss_scale]
            return [info.sums, info.norm, info.skipped, squared_lengths, *scale]

        self._numbers = HostCopy(values, device, info.stream)

    def read(self) -> StepNumbers:
        """Wait for this step (not for later ones) and return its numbers."""
        loss, *others = self._numbers.read()
        count = len(HostSums._fields)
        numbers = StepNumbers(loss, *self.criteria.limits, HostSums(*others[:count]), *others[count:])
        self.finished.wait()
        return numbers
