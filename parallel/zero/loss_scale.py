"""Dynamic loss scaling for fp16, whose smallest numbers are larger than many gradients.

Source: Micikevicius et al. 2018 (Mixed Precision Training), section 3.2. All of it stays on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1.0  # where gradients are not finite at this scale, the scale is not the reason


class LossScale:
    """What the loss is multiplied by: halved after a step that was not finite, doubled after `window` finite ones in a row.

    `value` is an fp32 device scalar, a new one after each update.
    """

    def __init__(self, initial: float, window: int, device: torch.device) -> None:
        self.window = window
        self.value = torch.full((), initial, dtype=torch.float32, device=device)
        self._finite_steps = torch.zeros((), dtype=torch.float32, device=device)

    def update(self, norm: Tensor, skipped: Tensor) -> None:
        """Take note of a step by its gradient norm; `skipped` is 1 where it was not applied, for that or another reason.

        What is not finite at the smallest scale changes nothing, so that the step may be run again.
        """
        overflows = (~torch.isfinite(norm) & (self.value > SMALLEST)).float()
        self._finite_steps = (self._finite_steps + 1.0 - skipped) * (1.0 - overflows)
        grows = (self._finite_steps == self.window).float()
        self._finite_steps *= 1.0 - grows
        self.value = (self.value * (1.0 + grows) * (1.0 - 0.5 * overflows)).clamp(min=SMALLEST)

    @property
    def state(self) -> dict[str, float]:
        """What a checkpoint keeps. Reading it waits for the device."""
        return {"value": self.value.item(), "finite_steps": self._finite_steps.item()}

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        self.value.fill_(state["value"])
        self._finite_steps.fill_(state["finite_steps"])
