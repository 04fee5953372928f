"""Contestants of a benchmark as teams of processes, one per rank, that take steps in turn: the others sleep meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)
CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Measured:
    """What a team needed for one step: the slowest rank's wall seconds, CPU seconds of all ranks, bytes of the largest.

    `parts` are wall and CPU seconds by name, likewise. The peak is what the contestant added to its process.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    loss: float
    norm: float
    parts: dict[str, tuple[float, float]]


class Clock:
    """Wall and CPU seconds of the parts of a step in this process."""

    def __init__(self) -> None:
        self.wall, self.cpu = Counter(), Counter()

    def clear(self) -> None:
        self.wall.clear()
        self.cpu.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] += time.perf_counter() - wall
        self.cpu[name] += time.process_time() - cpu

    def wrap(self, owner: object, method: str, name: str) -> None:
        """From now on, calls of a method are a part."""
        original = getattr(owner, method)

        def timed(*arguments: object) -> object:
            with self.part(name):
                return original(*arguments)

        setattr(owner, method, timed)


class Contestant(Protocol):
    """One rank's part of a contestant."""

    def run(self, number: int) -> tuple[float, float]:
        """Make step `number`. Returns the loss and the gradient norm of the global batch; rank 0's count."""


Build = Callable[[int, Clock], Contestant]  # rank, clock -> contestant; what it is made of must be picklable


def _memory_bytes(key: str) -> int:
    """VmRSS or VmHWM (the peak since the last reset) of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) * 1024


def _peak_bytes(before: int) -> int:
    """Of the GPU's memory where that is used, else of this process's beyond `before`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _memory_bytes("VmHWM") - before


def _requests(connection: Connection) -> Iterator[int]:
    """The numbers of the steps that the parent asks for, until it closes its end."""
    with suppress(EOFError):
        while True:
            yield connection.recv()


def _serve(rank: int, size: int, folder: str, threads: int, build: Build, connection: Connection) -> None:
    """A rank's process."""
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size, timeout=TIMEOUT)
    before, clock = _memory_bytes("VmRSS"), Clock()
    contestant = build(rank, clock)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the set-up does not count
    for number in _requests(connection):
        clock.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        loss, norm = contestant.run(number)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        parts = {name: (clock.wall[name], clock.cpu[name]) for name in clock.wall}
        connection.send(Measured(wall, cpu, _peak_bytes(before), loss, norm, parts))


def preload(modules: Sequence[str]) -> None:
    """Import modules once, before the first team starts, instead of in each of its processes. Absent ones are left out."""
    os.environ["PYTHONWARNINGS"] = "ignore"  # of all processes: those of imports, many times over
    CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", *modules])


class Team:
    """The processes of one contestant."""

    def __init__(self, name: str, size: int, threads: int, build: Build) -> None:
        self.name, self._connections, self._processes = name, [], []
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(size):
            connection, other = CONTEXT.Pipe()
            arguments = (rank, size, self._folder.name, threads, build, other)
            process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self._processes.append(process)
            self._connections.append(connection)

    def step(self, number: int) -> Measured:
        """Make a step on all ranks together. Ends the program where a rank has ended."""
        try:
            for connection in self._connections:
                connection.send(number)
            ranks: list[Measured] = [connection.recv() for connection in self._connections]
        except (EOFError, OSError):
            sys.exit(f"error: a process of {self.name} ended; its message is above")
        names = {name: None for measured in ranks for name in measured.parts}
        parts = {name: [measured.parts.get(name, (0.0, 0.0)) for measured in ranks] for name in names}
        return Measured(
            max(measured.wall_seconds for measured in ranks),
            sum(measured.cpu_seconds for measured in ranks),
            max(measured.peak_bytes for measured in ranks),
            ranks[0].loss,
            ranks[0].norm,
            {name: (max(w for w, _ in seconds), sum(c for _, c in seconds)) for name, seconds in parts.items()},
        )

    def close(self) -> None:
        """End the processes, which gives back their memory."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


def compete(
    teams: Sequence[Team], rounds: int, check: Callable[[dict[str, Measured]], None]
) -> dict[str, list[Measured]]:
    """What each team needs in each of `rounds`, in another order each time: going first may be an advantage.

    A round before them is not counted; `check` looks at what it has made.
    """
    check({team.name: team.step(0) for team in teams})
    results: dict[str, list[Measured]] = {team.name: [] for team in teams}
    for number in range(1, 1 + rounds):
        first = number % len(teams)
        for team in (*teams[first:], *teams[:first]):
            results[team.name].append(team.step(number))
    return results
