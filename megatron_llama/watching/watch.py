"""Watching a run's numbers: which steps are not finite, and which are spikes.

A step is a *spike* where its loss or its gradient norm lies far above the mean of the steps before it. The device judges each
step and masks its update where the settings ask for it; the host keeps the statistics, of steps that it has heard of. It hears
of a step while the next one runs, so a step is judged by those up to the last but one before it, whatever it has heard besides:
nobody waits, and a resumed run judges alike. `remedies` says what is done then.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_llama.config.sections import WatchConfig
from parallel.zero.engine import StepInfo, not_finite
from parallel.zero.loss_scale import SMALLEST

KINDS = ("losses", "grad_norms")  # the rows of the statistics
Limits = tuple[float, float]  # of the loss and the gradient norm; a step above one of them is a spike
NO_LIMITS = (math.inf, math.inf)
LATE = 2  # steps after which a step's numbers count


def is_fault(info: StepInfo) -> Tensor:
    """Whether a step is not finite (device scalar), and not because of a loss scale that will fall."""
    bad = not_finite(info)
    return bad if info.loss_scale is None else bad & (info.loss_scale <= SMALLEST)


@dataclass
class Criteria:
    """What one step is judged by. With `held` (device scalar) it is void, until the host has decided about an earlier one."""

    limits: Limits
    held: Tensor
    skips_spikes: bool
    _void: Tensor | None = None

    def void(self, info: StepInfo) -> Tensor:
        """Whether the step is held, or not finite."""
        if self._void is None:
            self._void = not_finite(info) | self.held
        return self._void

    def judge(self, info: StepInfo) -> Tensor:
        """Whether the update of the step is to be masked (a `Judge`)."""
        void = self.void(info)
        if not self.skips_spikes or self.limits == NO_LIMITS:
            return void
        numbers = torch.stack([info.sums[0], info.norm])  # the loss is the first of a step's sums
        limits = torch.tensor(self.limits, dtype=numbers.dtype).to(numbers.device, non_blocking=True)
        return void | (numbers > limits).any()


class Watch:
    """Keeps the statistics of a run: `before_step` gives the criteria of a step, `hear` takes its numbers in.

    What is not finite does not count, and a spike counts as the limit that it exceeded: so it does not hide the next one, and
    yet a run whose level has changed for good gets used to it. There are no limits until a whole window of steps is known.
    """

    def __init__(self, settings: WatchConfig, device: torch.device) -> None:
        self.settings = settings
        self._values: deque[Limits] = deque(maxlen=settings.window)  # losses and norms, the newest at the end
        self._limits: dict[int, Limits] = {}  # of the next steps
        self._last: StepInfo | None = None  # read late: totals may arrive during the next step only
        self.criteria = Criteria(NO_LIMITS, torch.zeros((), dtype=torch.bool, device=device), settings.spikes == "skip")

    def before_step(self, step: int) -> Criteria:
        """The criteria of a step that is about to be launched."""
        held = self.criteria.held
        if self._last is not None and self.settings.non_finite == "rerun":
            # what is void holds the next step, but for a loss scale that will fall
            held = self.criteria.void(self._last) if self._last.loss_scale is None else held | is_fault(self._last)
        self._last = None
        self.criteria = Criteria(self._limits.get(step, NO_LIMITS), held, self.criteria.skips_spikes)
        return self.criteria

    def after_step(self, info: StepInfo) -> None:
        """A step was launched; its numbers may still be on their way."""
        self._last = info

    def hear(self, step: int, loss: float, grad_norm: float) -> None:
        """The numbers of a step that counts."""
        if self.settings.spikes == "off":
            return
        if math.isfinite(loss) and math.isfinite(grad_norm):
            loss_limit, norm_limit = self._limits.get(step, NO_LIMITS)
            self._values.append((min(loss, loss_limit), min(grad_norm, norm_limit)))
        self._limits = {later: limits for later, limits in self._limits.items() if later > step}
        if len(self._values) == self.settings.window:
            values = np.array(self._values)
            limits = values.mean(axis=0) + self.settings.spike_deviations * values.std(axis=0)
            self._limits[step + LATE] = limits[0].item(), limits[1].item()

    def set_back(self, criteria: Criteria) -> None:
        """Forget what was launched since the step that had these criteria."""
        self.criteria, self._last = criteria, None

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        limits = {str(step): list(limits) for step, limits in self._limits.items()}
        rows = zip(*self._values, strict=True) if self._values else ((), ())
        return {kind: list(row) for kind, row in zip(KINDS, rows, strict=True)} | {"limits": limits}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        """Of a checkpoint whose window was another one the newest steps count, as many as there are."""
        self._values.clear()
        self._limits = {}
        if self.settings.spikes != "off":
            self._values.extend(zip(*(state[kind] for kind in KINDS), strict=True))
            self._limits = {int(step): (loss, norm) for step, (loss, norm) in state["limits"].items()}
        self.set_back(Criteria(NO_LIMITS, torch.zeros_like(self.criteria.held), self.criteria.skips_spikes))
