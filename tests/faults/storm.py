"""A storm: SIGKILL to ranks and supervisors at random moments, again and again, until so many have hit a longer run."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.faults.campaign import DEADLINE_SECONDS, LAYOUTS, Campaign, Result, await_end, differences, lines_of, log_of

STORM_STEPS = ("--train.steps", "40", "--checkpoint.save_every", "4")
PAUSE_SECONDS = (0.3, 2.0)  # between two kills
SUPERVISORS_SHARE = 0.1  # of the kills


@dataclass(frozen=True)
class Storm:
    """`kills` at moments, and of processes, that the seed decides."""

    layout: str
    seed: int
    kills: int

    def __str__(self) -> str:
        return f"F20 [{self.layout}] {self.kills} kills at random moments, seed {self.seed}"


def blow(campaign: Campaign, storm: Storm) -> Result:
    """Let a run meet with the storm, then end; compare it with one that nothing happens to."""
    expected = campaign.unbroken(storm.layout, STORM_STEPS)
    generator = random.Random(storm.seed)
    result, began, workplace = Result(str(storm), "F20", 0), time.monotonic(), campaign.new_workplace()
    kills, starts = 0, 0
    while starts <= storm.kills:
        supervisor = campaign.launch(workplace, LAYOUTS[storm.layout], STORM_STEPS, ("--max-restarts", str(storm.kills)))
        starts += 1
        while kills < storm.kills and _lives_after(supervisor, generator.uniform(*PAUSE_SECONDS)):
            kills += _kill_one(supervisor, generator)
        if await_end(supervisor) == 0:
            break
    result.seconds, result.faults = time.monotonic() - began, kills
    result.redone_steps = [sum("loss" in line for line in lines_of(workplace / "run/discarded.jsonl"))]
    if supervisor.exitcode != 0:
        result.wrong.append(f"the run has not ended well after {starts} starts: code {supervisor.exitcode}")
    else:
        result.wrong += differences(workplace, expected)
    if result.wrong:
        result.log = log_of(workplace)
    return result


def _lives_after(supervisor: BaseProcess, seconds: float) -> bool:
    supervisor.join(min(seconds, DEADLINE_SECONDS))
    return supervisor.exitcode is None


def _kill_one(supervisor: BaseProcess, generator: random.Random) -> int:
    """Kill a random rank, or the supervisor; returns how many were there to be killed."""
    try:
        ranks = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    except FileNotFoundError:
        return 0
    victim = supervisor.pid if generator.random() < SUPERVISORS_SHARE else int(generator.choice(ranks)) if ranks else None
    if victim is None:
        return 0
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
        return 1
    return 0
