"""What the benchmark of the data tools measures with: CPU seconds, peak memory of a program, figures beside their limits."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

POLL_SECONDS = 0.02
CLOCK_TICKS = 100  # of /proc/PID/stat, per second


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def compete(
    actions: dict[str, Callable[[int], object]], rounds: int, check: Callable[[int], None] | None = None
) -> dict[str, list[float]]:
    """The CPU seconds of every action, called with the number of each round, in another order each round.

    `check` looks at what a round has made.
    """
    names, seconds = list(actions), {name: [] for name in actions}
    for number in range(rounds):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            start = cpu_seconds()
            actions[name](number)
            seconds[name].append(cpu_seconds() - start)
        if check is not None:
            check(number)
    return seconds


@dataclass(frozen=True)
class Usage:
    """What a program needed, apart from the processes it started, its workers: seconds, and bytes at the peak."""

    cpu_seconds: float
    parent_cpu_seconds: float
    parent_peak_bytes: int
    worker_peak_bytes: int  # of the largest


def watch(command: Sequence[str]) -> Usage:
    """Runs a program, looking at its processes every 20 ms, so that the parent's CPU time lacks up to that of its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    parent_ticks, peaks = 0, {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for pid in (process.pid, *_children(process.pid)):
                peaks[pid] = max(peaks.get(pid, 0), _peak_bytes(pid))
            parent_ticks = max(parent_ticks, _ticks(process.pid))
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    parent_peak = peaks.pop(process.pid)
    return Usage(cpu, parent_ticks / CLOCK_TICKS, parent_peak, max(peaks.values(), default=0))


def _children(pid: int) -> list[int]:
    return [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]


def _peak_bytes(pid: int) -> int:
    lines = [line for line in _read(f"/proc/{pid}/status").splitlines() if line.startswith("VmHWM")]
    return 1024 * int(lines[0].split()[1]) if lines else 0


def _ticks(pid: int) -> int:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) if fields else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # the process has ended
        return ""


@dataclass(frozen=True)
class Figure:
    """A measured number; `needed` is empty where it is only a peer of another one."""

    section: str
    name: str
    value: float
    low: float  # of the rounds
    high: float
    unit: str
    needed: str
    is_met: bool | None


class Report:
    """Prints figures as they come, and keeps them."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self._section = ""

    def section(self, name: str, what: str) -> None:
        """Begins a section; `what` describes its input."""
        self._section = name
        print(f"\n{name}: {what}", flush=True)

    def add(
        self,
        name: str,
        values: float | Sequence[float],
        unit: str,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """A figure, given by the values of its rounds, of which the median counts, and what it has to be."""
        values = list(values) if isinstance(values, Sequence) else [values]
        value, limit = median(values), at_most if at_least is None else at_least
        needed = "" if limit is None else f"{'at most' if at_least is None else 'at least'} {limit:g}"
        is_met = None if limit is None else (value <= limit if at_least is None else value >= limit)
        figure = Figure(self._section, name, value, min(values), max(values), unit, needed, is_met)
        self.figures.append(figure)
        spread = f"({_short(figure.low)} to {_short(figure.high)})" if len(values) > 1 else ""
        verdict = f"{needed}: {'met' if is_met else 'missed'}" if needed else ""
        print(f"  {name:58s} {_short(value):>9s} {unit:24s} {spread:20s} {verdict}".rstrip(), flush=True)

    def as_json(self) -> list[dict]:
        """All figures as objects."""
        return [asdict(figure) for figure in self.figures]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
