"""Slow ranks: all ranks of a step take equally long, so what tells them apart is how long each was busy rather than waiting."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import Protocol

import torch

from megatron_llama.metrics import MetricsWriter
from megatron_llama.program import LOGGER
from parallel.collectives import all_gather, gather_objects
from parallel.groups import ProcessGroups
from parallel.host_copy import HostCopy
from parallel.topology import Topology
from parallel.waiting import DeviceWaitClock, WaitClock

LEAST_EXCESS_SECONDS = 0.005  # of a step, by which a slow rank is busy longer than its peers: below, it is noise


class Stopwatch(Protocol):
    """Measures what part of its steps a rank is busy."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def read(self) -> float:
        """Busy seconds of a step, the mean of those measured since the last reading."""


class HostStopwatch:
    """The host's time outside of waits: for a CPU, where it does the work."""

    def __init__(self, clock: WaitClock) -> None:
        self._clock, self._busy, self._steps = clock, 0.0, 0

    def begin(self) -> None:
        self._began, self._waited = time.perf_counter(), self._clock.seconds

    def end(self) -> None:
        self._busy += time.perf_counter() - self._began - (self._clock.seconds - self._waited)
        self._steps += 1

    def read(self) -> float:
        mean, self._busy, self._steps = self._busy / max(self._steps, 1), 0.0, 0
        return mean


class DeviceStopwatch:
    """A GPU's time in the latest step but for the waits of its stream; idle time, in which its host was late, counts as busy.

    Reading it needs a device that is through with the step.
    """

    def __init__(self, clock: DeviceWaitClock) -> None:
        self._clock = clock

    def begin(self) -> None:
        self._began = torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        self._clock.begin()

    def end(self) -> None:
        self._clock.end()
        self._ended = torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))

    def read(self) -> float:
        return self._began.elapsed_time(self._ended) / 1000.0 - self._clock.marked_seconds()  # milliseconds


@dataclass(frozen=True)
class Slow:
    """A rank that is busy for longer than the peers at its pipeline stage: `seconds` of a step, beside their median."""

    rank: int
    seconds: float
    median: float


def slow_ranks(busy: Sequence[float], topology: Topology, factor: float) -> list[Slow]:
    """The ranks that are busy for more than `factor` times the median of their stage, the slowest first.

    The lower of two medians: of two ranks one can be slow. A rank without peers has nothing to be compared with.
    """
    found = []
    for stage in topology.groups("dp", "cp", "tp"):
        median = median_low(busy[rank] for rank in stage)
        limit = max(factor * median, median + LEAST_EXCESS_SECONDS)
        found += [Slow(rank, busy[rank], median) for rank in stage if busy[rank] > limit]
    return sorted(found, key=lambda slow: slow.median - slow.seconds)


class Stragglers:
    """Measures steps, compares the ranks every `every` steps, and names those that are slow in two looks in a row.

    All ranks make it and call its methods alike. The seconds of a look are on their way for a step, so nobody waits for them.
    """

    def __init__(
        self, groups: ProcessGroups, device: torch.device, every: int, factor: float, metrics: MetricsWriter | None
    ) -> None:
        self.groups, self.device, self.every, self.factor, self.metrics = groups, device, every, factor, metrics
        self._samples = device.type == "cuda"  # the last step before a look; on a CPU, all
        if self._samples:
            groups.ledger.clock = DeviceWaitClock()
            self._stopwatch: Stopwatch = DeviceStopwatch(groups.ledger.clock)
        else:
            self._stopwatch = HostStopwatch(groups.ledger.clock)
        self._look: tuple[int, HostCopy] | None = None  # under way, of that step
        self._slow_before: set[int] = set()
        self._named: set[int] = set()
        self._log = logging.getLogger(LOGGER)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """What happens inside this context is the work of the step."""
        measures = not self._samples or step % self.every == 0
        if measures:
            self._stopwatch.begin()
        yield
        if measures:
            self._stopwatch.end()

    def hear(self, step: int) -> None:
        """The device is through with `step`: take a look where one is due, and end the one before."""
        if self._look is not None:
            self._conclude(*self._look)
            self._look = None
        if step % self.every == 0:
            busy = torch.tensor([self._stopwatch.read()], dtype=torch.float64).to(self.device)
            self._look = step, HostCopy(lambda: [all_gather(busy, self.groups.world)], self.device)

    def _conclude(self, step: int, seconds: HostCopy) -> None:
        slow = slow_ranks(seconds.read(), self.groups.topology, self.factor)
        still_slow = [rank for rank in slow if rank.rank in self._slow_before]
        new = [rank for rank in still_slow if rank.rank not in self._named]
        self._slow_before = {rank.rank for rank in slow}
        self._named = {rank.rank for rank in still_slow}
        if not new:
            return
        hosts = gather_objects(socket.gethostname(), self.groups.world)  # (all ranks have found the same)
        for rank in new:
            self._log.warning(
                f"SLOW RANK {rank.rank} ({hosts[rank.rank]}) at step {step}: busy for {rank.seconds:.3f} s of each step, its "
                f"peers for {rank.median:.3f} s. The others wait for it"
            )
            if self.metrics is not None:
                values = {"busy_seconds": rank.seconds, "peers_busy_seconds": rank.median}
                self.metrics.write_event(step, "straggler", rank=rank.rank, host=hosts[rank.rank], **values)
