"""Numbers on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def host_readable(device: torch.device) -> torch.device:
    """Where to put numbers that the host will read: on the device, or in host memory where tensors have no numbers (meta)."""
    return torch.device("cpu") if device.type == "meta" else device


class HostCopy:
    """The values of `make()`, scalars and vectors on `device`: on a GPU their copy starts now, and `read` waits for it alone.

    `stream` makes and copies them there, after what the current stream has been told so far; None is the current one. A CPU
    does its work when it is told, so there the values are made by `read`.
    """

    def __init__(
        self, make: Callable[[], Sequence[Tensor]], device: torch.device, stream: torch.cuda.Stream | None = None
    ) -> None:
        self._make, self._event = make, None  # (what `make` reads is kept alive until the copy has been made)
        if device.type == "cuda":
            stream = stream or torch.cuda.current_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                values = torch.cat([value.double().view(-1) for value in make()])
                self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                self._values.copy_(values, non_blocking=True)
                self._event = stream.record_event()

    def read(self) -> list[float]:
        """All values, one after the other; waits until they have been made, not for work that was launched later."""
        if self._event is None:
            return [float(number) for value in self._make() for number in (value.tolist() if value.dim() else (value.item(),))]
        self._event.synchronize()
        return self._values.tolist()
