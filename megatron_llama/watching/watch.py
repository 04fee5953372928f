"""Watching a run's numbers on the device: which steps are not finite, and which are spikes.

A step is a *spike* where its loss or its gradient norm lies far above the mean of the steps before it. The device judges each
step, masks its update where the settings ask for it, and waits for nobody: the host hears of it while the next step runs
(`remedies` says what is done then).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_llama.config.sections import WatchConfig
from parallel.zero.engine import StepInfo, not_finite
from parallel.zero.loss_scale import SMALLEST

KINDS = ("losses", "grad_norms")  # the rows of the statistics


def is_fault(info: StepInfo) -> Tensor:
    """Whether a step is not finite (device scalar), and not because of a loss scale that will fall."""
    bad = not_finite(info)
    return bad if info.loss_scale is None else bad & (info.loss_scale <= SMALLEST)


@dataclass(frozen=True)
class Statistics:
    """The steps before one that is to be judged. Tensors on the device, never changed: each step has its own.

    `limits`: a step above them is a spike; infinite until as many steps are known as there is room for. With `held` each step
    is void, until the host has decided about one that was not finite.
    """

    values: Tensor  # [2, window] fp64, the newest at the end
    count: Tensor  # [] int64; of steps that are known
    limits: Tensor  # [2, 1] fp64
    held: Tensor  # [] bool
    skips_spikes: bool

    def judge(self, info: StepInfo) -> Tensor:
        """Whether the update of the step is to be masked (a `Judge`)."""
        void = not_finite(info) | self.held
        return void | (numbers_of(info) > self.limits).any() if self.skips_spikes else void


def numbers_of(info: StepInfo) -> Tensor:  # [2, 1] fp64
    """What the statistics are about: the loss, which is the first of a step's sums, and the gradient norm."""
    return torch.stack([info.sums[:1], info.norm[None]])


class Watch:
    """Keeps the statistics of a run: `before_step` gives those that the next step is judged by, `after_step` takes it in.

    What is not finite does not count, and a spike counts as the limit that it exceeded: so it does not hide the next one, and
    yet a run whose level has changed for good gets used to it.
    """

    def __init__(self, settings: WatchConfig, device: torch.device) -> None:
        self.settings = settings
        self._last: StepInfo | None = None  # read late: totals may arrive during the next step only
        nothing = torch.zeros(2, settings.window, dtype=torch.float64, device=device)
        self.statistics = Statistics(
            nothing,
            torch.zeros((), dtype=torch.int64, device=device),
            torch.full((2, 1), torch.inf, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.bool, device=device),
            skips_spikes=settings.spikes == "skip",
        )

    def before_step(self) -> Statistics:
        """What is known before the next step's update."""
        if self._last is not None:
            self.statistics, self._last = self._after(self._last), None
        return self.statistics

    def after_step(self, info: StepInfo) -> None:
        """A step was launched; its numbers may still be on their way."""
        self._last = info

    def set_back(self, statistics: Statistics) -> None:
        """Forget what has happened since these statistics were made."""
        self.statistics, self._last = statistics, None

    @torch.no_grad()
    def _after(self, info: StepInfo) -> Statistics:
        statistics, settings = self.statistics, self.settings
        if settings.non_finite == "rerun":
            statistics = replace(statistics, held=statistics.held | is_fault(info))
        if settings.spikes == "off":
            return statistics
        newest = torch.minimum(numbers_of(info), statistics.limits)
        values = torch.where(info.is_finite, torch.cat([statistics.values[:, 1:], newest], dim=1), statistics.values)
        count = statistics.count + info.is_finite
        return replace(statistics, values=values, count=count, limits=self._limits(values, count))

    def _limits(self, values: Tensor, count: Tensor) -> Tensor:
        deviations, means = torch.std_mean(values, dim=1, correction=0, keepdim=True)
        limits = torch.add(means, deviations, alpha=self.settings.spike_deviations)
        return torch.where(count >= self.settings.window, limits, torch.inf)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able. Reading it waits for the device."""
        statistics = self.before_step()
        known = min(int(statistics.count.item()), self.settings.window)
        return {kind: row[len(row) - known :] for kind, row in zip(KINDS, statistics.values.tolist(), strict=True)}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        """Of a checkpoint whose window was another one the newest steps count, as many as there are."""
        rows = [state[kind][-self.settings.window :] for kind in KINDS]
        old, known = self.statistics, len(rows[0])
        values = torch.zeros_like(old.values)
        values[:, values.shape[1] - known :] = torch.tensor(rows, dtype=values.dtype)
        count = torch.full_like(old.count, known)
        self.set_back(replace(old, values=values, count=count, limits=self._limits(values, count), held=old.held & False))
