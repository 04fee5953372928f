"""Where faults strike: every beat of a rank's heartbeat, and the moments of reading, updating, saving and loading.

The product has no hook for this. A rank's heartbeat is called at each phase, action, collective and message as it is; here it,
and the functions of MOMENTS, are wrapped in the process that the ranks are then forked from.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from megatron_llama import resume, state
from megatron_llama.data.loader import Loader
from megatron_llama.metrics import MetricsWriter
from parallel.checkpoint import files, save
from parallel.checkpoint.background import BackgroundSaver, HostMemory
from parallel.checkpoint.voting import GroupVoter
from parallel.heartbeat import Heartbeat
from parallel.zero.update import ShardedUpdate

# Each is reached twice: as "before NAME" and as "after NAME".
MOMENTS: dict[str, tuple[Any, str]] = {
    "reading data": (Loader, "micro_batches"),
    "update": (ShardedUpdate, "apply"),
    "part of the update": (ShardedUpdate, "_apply"),
    "flush of metrics": (MetricsWriter, "flush"),
    "copy": (HostMemory, "copy"),
    "part": (save.Draft, "write"),
    "block": (files._BlockWriter, "write"),
    "vote": (GroupVoter, "all_ok"),
    "hearing of sums": (BackgroundSaver, "hear"),
    "commit": (save.Draft, "commit"),
    "removal of old steps": (save, "remove_old_steps"),
    "loading": (state, "load_tensors"),
    "note of the verified step": (resume, "mark_verified"),
}
OF_A_SAVE = ("part", "block", "vote", "hearing of sums", "commit", "removal of old steps")
STEP_DIRECTORY = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Place:
    """The `visit`-th time that a rank reaches a point in a step (0: in any step); in a save that is the step to be saved."""

    point: str
    rank: int
    step: int = 0
    visit: int = 1

    def __str__(self) -> str:
        step = f", step {self.step}" if self.step else ""
        visit = f", visit {self.visit}" if self.visit > 1 else ""
        return f"{self.point}, rank {self.rank}{step}{visit}"


class Journey:
    """Follows this process, a rank, through the points; `on_arrival` is told of each as it is reached, in its thread."""

    def __init__(self, on_arrival: Callable[[Journey, Place, Place], None]) -> None:
        self.on_arrival = on_arrival
        self.phase, self.step, self.saving = "", 0, 0
        self._visits: Counter[tuple[str, int]] = Counter()

    @property
    def complete_steps(self) -> int:
        """The steps that are done, as far as this rank knows."""
        return self.step - 1 if "step" in self.phase else self.step

    def arrive(self, point: str, step: int) -> None:
        """This rank is at a point: for the how many-th time in this step, and in all."""
        rank, visits = int(os.environ.get("RANK", 0)), self._visits
        visits.update([(point, 0), (point, step)] if step else [(point, 0)])
        self.on_arrival(self, Place(point, rank, step, visits[point, step]), Place(point, rank, 0, visits[point, 0]))

    def begin(self) -> None:
        """Wrap what is to be followed, in this process and those that are forked from it."""
        self._follow_heartbeat()
        for name, (owner, attribute) in MOMENTS.items():
            self._follow(name, owner, attribute)
        self._follow_files()

    def _follow_heartbeat(self) -> None:
        enter, act, call = Heartbeat.enter, Heartbeat.act, Heartbeat.call

        def followed_enter(heartbeat: Heartbeat, phase: str, step: int = 0) -> None:
            enter(heartbeat, phase, step)
            self.phase, self.step = phase, step
            self.arrive(phase, step)

        def followed_act(heartbeat: Heartbeat, action: str) -> None:
            act(heartbeat, action)
            self.arrive(action, self.step)

        def followed_call(heartbeat: Heartbeat, kind: str, axis: str, ranks: tuple[int, ...]) -> None:
            call(heartbeat, kind, axis, ranks)
            self.arrive(f"{kind} over {axis}", self.step)

        Heartbeat.enter, Heartbeat.act, Heartbeat.call = followed_enter, followed_act, followed_call

    def _follow(self, name: str, owner: Any, attribute: str) -> None:
        """Arrive before and after each call of a function."""
        function = getattr(owner, attribute)

        @wraps(function)
        def followed(*args: Any, **kwargs: Any) -> Any:
            step = self._step_of(name, args)
            self.arrive(f"before {name}", step)
            result = function(*args, **kwargs)
            self.arrive(f"after {name}", step)
            return result

        setattr(owner, attribute, followed)

    def _step_of(self, name: str, args: tuple) -> int:
        if name == "reading data":  # it is read ahead
            loader, first_sample = args
            return first_sample // loader.global_batch_size + 1
        if name in ("part", "commit"):
            self.saving = args[0].step
        return self.saving if name in OF_A_SAVE else self.step

    def _follow_files(self) -> None:
        """Arrive before and after a checkpoint's files, and its directory's new name, are made durable."""
        fsync, rename = os.fsync, os.rename

        def followed_fsync(descriptor: int) -> None:
            self._around(fsync, Path(os.readlink(f"/proc/self/fd/{descriptor}")), "fsync of", descriptor)

        def followed_rename(source: Any, target: Any) -> None:
            name = Path(target).name
            if STEP_DIRECTORY.fullmatch(name):
                self._around(rename, Path(target), "rename to", source, target)
            else:
                rename(source, target)

        os.fsync, os.rename = followed_fsync, followed_rename

    def _around(self, function: Callable, path: Path, what: str, *args: Any) -> None:
        found = STEP_DIRECTORY.search(str(path))
        if found is None:
            function(*args)
            return
        # weights-00002.safetensors: weights; step_00000004.tmp-2f: step
        point = f"{what} {re.split(r'[-_.]', path.name)[0]}"
        self.arrive(f"before {point}", int(found[1]))
        function(*args)
        self.arrive(f"after {point}", int(found[1]))
