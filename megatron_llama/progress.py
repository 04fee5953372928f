"""One line per log interval, the same for every layout."""

import math
from dataclasses import dataclass
from typing import TextIO

GIB = 2**30
NOTABLE_WAIT = 0.01  # share of the time; below it, waiting for data is not mentioned


@dataclass(frozen=True)
class Interval:
    """What a progress line says. `flops_per_second` is per device; `mfu` and `memory_bytes` are None where unknown."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    flops_per_second: float
    remaining_seconds: float
    mfu: float | None = None
    memory_bytes: int | None = None
    data_wait_share: float = 0.0
    skipped_steps: int = 0


def format_interval(interval: Interval) -> str:
    """The progress line: step, loss, learning rate, gradient norm, speed, utilisation, time left, memory, and what is wrong."""
    width = len(str(interval.total_steps))
    parts = [
        f"step {interval.step:>{width}}/{interval.total_steps}",
        f"loss {interval.loss:.4f}",
        f"lr {interval.learning_rate:.2e}",
        f"norm {interval.grad_norm:.3f}",
        f"{interval.tokens_per_second:,.0f} tokens/s",
        f"{format_flops(interval.flops_per_second)} per device" if interval.mfu is None else f"MFU {interval.mfu:.1%}",
        f"{format_duration(interval.remaining_seconds)} left",
    ]
    if interval.memory_bytes is not None:
        parts.append(f"memory {interval.memory_bytes / GIB:.2f} GiB")
    if interval.data_wait_share > NOTABLE_WAIT:
        parts.append(f"waits for data {interval.data_wait_share:.0%}")
    if interval.skipped_steps:
        parts.append(f"SKIPPED {interval.skipped_steps} (not finite, or a spike)")
    return " | ".join(parts)


def format_flops(flops_per_second: float) -> str:
    """FLOP/s in the unit that reads best: GFLOP/s on a laptop, TFLOP/s on an accelerator."""
    if flops_per_second < 1e12:
        return f"{flops_per_second / 1e9:.3g} GFLOP/s"
    return f"{flops_per_second / 1e12:.3g} TFLOP/s"


def format_duration(seconds: float) -> str:
    """Seconds as 12s, 3m05s, 2h03m or 21d04h: the two largest units."""
    if not math.isfinite(seconds):
        return "unknown time"
    whole = round(seconds)
    for size, name, small_size, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // small_size:02d}{small_name}"
    return f"{whole}s"


@dataclass
class Gathered:
    """What has gathered since the last line."""

    steps: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    skipped_steps: int = 0


class Progress:
    """Prints progress lines; only rank 0 makes one.

    `peak` is the dense FLOP/s of one device or None; `stream` None is standard output.
    """

    def __init__(
        self, total_steps: int, device_count: int, peak: float | None = None, stream: TextIO | None = None
    ) -> None:
        self.total_steps = total_steps
        self.device_count = device_count
        self.peak = peak
        self.stream = stream
        self._gathered = Gathered()

    def add(self, tokens: int, flops: int, seconds: float, data_wait_seconds: float = 0.0, skipped: bool = False) -> None:
        """Takes note of one step: its tokens and FLOPs on all devices, its wall time and the part of it waited for data."""
        gathered = self._gathered
        gathered.steps += 1
        gathered.tokens += tokens
        gathered.flops += flops
        gathered.seconds += seconds
        gathered.data_wait_seconds += data_wait_seconds
        gathered.skipped_steps += skipped

    def report(
        self, step: int, loss: float, learning_rate: float, grad_norm: float, memory_bytes: int | None = None
    ) -> None:
        """Prints the line of the interval that ends with `step`, and begins the next one."""
        done, self._gathered = self._gathered, Gathered()
        flops_per_second = done.flops / done.seconds / self.device_count
        interval = Interval(
            step=step,
            total_steps=self.total_steps,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_second=done.tokens / done.seconds,
            flops_per_second=flops_per_second,
            remaining_seconds=(self.total_steps - step) * done.seconds / done.steps,
            mfu=flops_per_second / self.peak if self.peak else None,
            memory_bytes=memory_bytes,
            data_wait_share=done.data_wait_seconds / done.seconds,
            skipped_steps=done.skipped_steps,
        )
        print(format_interval(interval), file=self.stream, flush=True)
