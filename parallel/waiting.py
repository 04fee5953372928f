"""How long a rank waits for others: the time of its waits for collectives and messages, told from that of its own work."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Handle(Protocol):
    """What an asynchronous collective returns."""

    def wait(self) -> object: ...


class WaitClock:
    """Adds up the `seconds` that this thread spends in waits: on a CPU, all that a rank stands still for others.

    `longest` bounds the waits for messages over gloo (0: as long as when their group was made).
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.longest = timedelta(0)

    def wait(self, handle: Handle) -> None:
        """Wait for what is under way, and count it."""
        started = time.perf_counter()
        handle.wait()
        self.seconds += time.perf_counter() - started


class DeviceWaitClock(WaitClock):
    """Between `begin` and `end`, marks on a GPU's stream how long it stands still in waits; the host never does.

    Waits on other streams hold no computation up, and what a CUDA graph replays is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stream: torch.cuda.Stream | None = None  # while it is being watched
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """Watch the current stream from here on."""
        self._stream, self._marks = torch.cuda.current_stream(), []

    def end(self) -> None:
        """Watch no more; the marks stay until the next `begin`."""
        self._stream = None

    def wait(self, handle: Handle) -> None:
        """Let the stream wait for what is under way, between two marks where it is being watched."""
        stream = self._stream
        if stream is None or torch.cuda.current_stream(stream.device) != stream:
            handle.wait()
            return
        before = stream.record_event(torch.cuda.Event(enable_timing=True))
        handle.wait()
        self._marks.append((before, stream.record_event(torch.cuda.Event(enable_timing=True))))

    def marked_seconds(self) -> float:
        """The seconds between the marks, all of which the device must have passed."""
        return sum(before.elapsed_time(after) for before, after in self._marks) / 1000.0  # milliseconds


class ClockedHandle:
    """A handle whose wait a clock measures; that of a message knows whether it `is_completed`."""

    __slots__ = ("_clock", "_handle")

    def __init__(self, handle: Any, clock: WaitClock) -> None:
        self._handle, self._clock = handle, clock

    def wait(self) -> None:
        self._clock.wait(self._handle)

    def is_completed(self) -> bool:
        return self._handle.is_completed()


class GlooMessage:
    """A message on its way over gloo, which bounds its collectives by their group's timeout, and messages by the first one."""

    __slots__ = ("_clock", "_work")

    def __init__(self, work: dist.Work, clock: WaitClock) -> None:
        self._work, self._clock = work, clock

    def wait(self) -> None:
        self._work.wait(self._clock.longest)

    def is_completed(self) -> bool:
        return self._work.is_completed()
