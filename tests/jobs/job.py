"""What the jobs of the tests run: a report of the ranks, and trainings that last long enough to be disturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

from tests.jobs.laboratory import Laboratory, wait_until
from tests.jobs.slurm import ROOT, Slurm

REPORT = [sys.executable, "-m", "tests.jobs.rank_report"]
TRAIN = [sys.executable, "-m", "megatron_llama.train", "--config", "config.toml"]
TOLERANCE = 1e-6  # of losses in nats, between layouts
LONG = 150  # steps of a run that is to be disturbed
PATIENCE = 240  # seconds for whatever a job does, on a machine that has much else to do
LABORATORY = ["--cpus-per-task=1", "--gpus-per-node=0", "--time=15"]  # in place of a GPU cluster's sizes


def reports(text: str) -> list[str]:
    """What the ranks of REPORT have said."""
    return sorted(line for line in text.splitlines() if line.startswith("rank "))


def long_run(save_every: int = 20) -> list[str]:
    return ["--train.steps", str(LONG), "--checkpoint.save_every", str(save_every)]


def data_of(folder: Path) -> list[str]:
    """Flags for a training that runs elsewhere than in the folder of its data, and evaluates nothing."""
    return ["--data.train", json.dumps([str(folder / "train")]), "--data.valid", "[]", "--data.tokenizer", ""]


class Job:
    """A training submitted by one of the example scripts, or one to look at; `folder` has config.toml and data."""

    def __init__(self, slurm: Slurm, script: str, folder: Path, *flags: str, options: tuple = (), **environment: str) -> None:
        self.slurm, self.run, self.log = slurm, folder / "job", folder / "log"
        arguments = [*LABORATORY, *options, "-o", self.log, ROOT / "examples/slurm" / script, folder / "config.toml"]
        given = {"RUN": str(self.run), "PYTHON": sys.executable, "GPUS_PER_NODE": "1"} | environment
        self.number = slurm.submit(*arguments, *flags, *data_of(folder), environment=given)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def reach(self, step: int) -> None:
        """Wait until the run has done that step."""
        wait_until(lambda: has_step(self.run, step), f"step {step}: {self.text()}", PATIENCE)

    def says(self, pattern: str) -> None:
        """Wait until the log has it."""
        wait_until(lambda: re.search(pattern, self.text()), pattern, PATIENCE)

    def end(self) -> tuple[str, str]:
        """Its state and the number of its restarts once it has ended."""
        facts = self.slurm.wait(self.number, PATIENCE)
        return facts["JobState"], facts["Restarts"]


def has_step(run: Path, step: int) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def kill_rank(laboratory: Laboratory, node: str, launcher: str) -> None:
    """SIGKILL for a rank on the node, which runs one; `launcher` is the module that has started it."""
    (rank,) = laboratory.children(node, launcher)
    os.kill(rank, signal.SIGKILL)
