"""A rank of a training whose watching is measured: what heartbeats, verdicts and audits cost, in CPU seconds."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from megatron_llama import train, trainer
from megatron_llama.verdict import Verdict
from megatron_llama.watching.stragglers import Stragglers
from megatron_llama.watching.watch import Criteria, Watch
from parallel.heartbeat import Heartbeat, beat_path, read
from parallel.launch import Launch

WATCHED = {
    "verdict": [
        (Verdict, "read"),
        *((Watch, name) for name in ("before_step", "after_step", "hear")),
        (Criteria, "judge"),
        (Stragglers, "hear"),
    ],
    "audit": [(trainer, "check_replicas")],
}


class AlternatingHeartbeat(Heartbeat):
    """Beats in steps with an even number, does nothing in the others, and notes what each step takes."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.on, self.folder, self.rank = True, folder, rank
        self.steps: list[dict[str, Any]] = []
        self.kinds: Counter[str] = Counter()
        self._before: tuple[float, float, int] | None = None
        super().__init__(beat_path(folder, rank))

    def enter(self, phase: str, step: int = 0) -> None:
        now = time.perf_counter(), time.process_time(), read(self.folder, self.rank).beats if step else 0
        if self._before is not None:
            wall, cpu, beats = (after - before for after, before in zip(now, self._before, strict=True))
            self.steps.append({"beats": beats, "seconds": wall, "cpu_seconds": cpu, "on": self.on})
        self._before = now if phase == "step" else None
        self.on = phase != "step" or step % 2 == 0
        if self.on:
            self.kinds["phase"] += 1
            super().enter(phase, step)

    def act(self, action: str) -> None:
        if self.on:
            self.kinds["action"] += 1
            super().act(action)

    def call(self, kind: str, axis: str, ranks: tuple[int, ...]) -> None:
        if self.on:
            self.kinds["call"] += 1
            super().call(kind, axis, ranks)


def run(launch: Launch, folder: Path, argv: list[str]) -> int:
    """Train, and write what was measured to `folder`."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for what, places in WATCHED.items():
        for owner, name in places:
            whose = owner.__name__.rpartition(".")[2].lower()
            setattr(owner, name, _timed(getattr(owner, name), f"{what}/{whose}.{name}", seconds, calls))
    heartbeat = AlternatingHeartbeat(folder, launch.rank)
    train.launching.open_heartbeat = lambda launch: heartbeat
    with open(folder / f"out-{launch.rank}", "w") as file, redirect_stdout(file):
        code = train.main(launch, argv)
    measured = {"steps": heartbeat.steps, "kinds": heartbeat.kinds, "seconds": seconds, "calls": calls}
    (folder / f"measured-{launch.rank}.json").write_text(json.dumps(measured))
    return code


def _timed(function: Callable, name: str, seconds: Counter[str], calls: Counter[str]) -> Callable:
    def timed(*arguments: Any, **options: Any) -> Any:
        first = time.thread_time()
        began = time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] += time.thread_time() - began - (began - first)  # without what reading the clock takes
            calls[name] += 1

    return timed
