"""Real SLURM jobs on two nodes: how ranks find each other, how runs stop, go on and end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.laboratory import wait_until
from tests.jobs.slurm import Slurm
from tests.megatron_llama.programs import STEPS, values

ROOT = Path(__file__).parents[2]
REPORT = [sys.executable, "-m", "tests.jobs.rank_report"]
TRAIN = [sys.executable, "-m", "megatron_llama.train", "--config", "config.toml"]
AT_ONCE = "--immediate=20"
TOLERANCE = 1e-5  # of losses in nats, between layouts
LONG = 400  # steps of a run that is to be disturbed


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are submitted from the project's root."""
    monkeypatch.chdir(ROOT)


def reports(text: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line.startswith("rank "))


@pytest.mark.parametrize(
    ("distribution", "hosts"),
    [
        ([], ["n01", "n01", "n02", "n02"]),
        (["--distribution=cyclic"], ["n01", "n02", "n01", "n02"]),
        (["--distribution=arbitrary"], ["n02", "n01", "n01", "n02"]),  # rank 0 is not on the first node
    ],
    ids=["block", "cyclic", "arbitrary"],
)
def test_ranks_find_each_other(slurm: Slurm, distribution, hosts, at_root, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("\n".join(hosts) + "\n")
    shape = ["-n", "4"] if "--distribution=arbitrary" in distribution else ["-N2", "--ntasks-per-node=2"]
    environment = {"SLURM_HOSTFILE": str(tmp_path / "hosts")} if "-n" in shape else {}
    printed = slurm.call("srun", AT_ONCE, *shape, *distribution, *REPORT, environment=environment)
    local = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    expected = [f"rank {r}/4 local {local[r]}/2 on {host} by srun: sum 10" for r, host in enumerate(hosts)]
    assert reports(printed) == expected


def test_a_batch_script_is_no_rank_and_a_step_may_use_a_part_of_the_job(slurm: Slurm, at_root, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    command = " ".join(REPORT)
    script.write_text(f"#!/bin/bash\n{command}\nsrun --nodes=1 --nodelist=n02 --ntasks=1 {command}\n")
    number = slurm.submit("-N2", "--ntasks-per-node=2", "-o", tmp_path / "log", script)
    assert slurm.wait(number)["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert reports((tmp_path / "log").read_text()) == [
        f"rank 0/1 local 0/1 on n01 by one process in SLURM job {number}, not started by srun: sum 1",
        "rank 0/1 local 0/1 on n02 by srun: sum 1",
    ]


def test_a_training_on_two_nodes_is_that_of_one_process(slurm: Slurm, run: Path, workplace: Path) -> None:
    few = ["--log.directory", "other", "--train.evaluate_every", "3"]
    slurm.call("srun", AT_ONCE, "-N2", "--ntasks-per-node=2", *TRAIN, *few, "--parallel.tp", 2, timeout=120)
    assert values(Path("other")) == pytest.approx(values(run), abs=TOLERANCE) and len(values(Path("other"))) == STEPS


# ---- the example scripts ----------------------------------------------------------------------------------------------

LABORATORY = ["--cpus-per-task=1", "--gpus-per-node=0", "--time=10"]  # in place of a GPU cluster's sizes


class Job:
    """A training submitted by one of the example scripts; `folder` has config.toml and data."""

    def __init__(
        self, slurm: Slurm, script: str, folder: Path, *flags: object, options: tuple = (), **environment: str
    ) -> None:
        self.slurm, self.run, self.log = slurm, folder / "job", folder / "log"
        arguments = [*options, *LABORATORY, "-o", self.log, ROOT / "examples/slurm" / script, folder / "config.toml", *flags]
        data = ["--data.train", json.dumps([str(folder / "train")]), "--data.valid", "[]", "--data.tokenizer", ""]
        given = {"RUN": str(self.run), "PYTHON": sys.executable, "GPUS_PER_NODE": "1"} | environment
        self.number = slurm.submit(*arguments, *data, environment=given)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def has_step(self, step: int) -> bool:
        metrics = self.run / "metrics.jsonl"
        return metrics.exists() and any(f'"step": {step},' in line for line in metrics.read_text().splitlines())

    def end(self, seconds: float = 150) -> dict[str, str]:
        return self.slurm.wait(self.number, seconds)


def long_run(save_every: int = 20) -> list[object]:
    return ["--train.steps", LONG, "--checkpoint.save_every", save_every]


@pytest.fixture(scope="module")
def undisturbed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the long run on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *TRAIN[1:]]
    flags = [*long_run(), "--log.directory", folder, "--data.valid", "[]", "--data.tokenizer", ""]
    subprocess.run([*command, *map(str, flags)], cwd=project, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return values(folder)


TWO_RANKS = ("-N2", "--ntasks-per-node=1")


def test_a_job_that_runs_out_of_time_saves_and_goes_on(slurm: Slurm, undisturbed, workplace: Path, at_root) -> None:
    """`scancel --batch --signal` is what `--signal=B:USR1@300` does when the time has come."""
    job = Job(slurm, "many_nodes.sbatch", workplace, *long_run(save_every=0), options=TWO_RANKS)
    wait_until(lambda: job.has_step(30), "step 30")
    slurm.call("scancel", "--batch", "--signal=USR1", job.number)
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.text()
    assert "asked to stop after step" in job.text() and "requeued" in job.text()
    assert values(job.run) == undisturbed


def test_a_job_that_loses_a_node_goes_on(slurm: Slurm, undisturbed, workplace: Path, at_root) -> None:
    job = Job(slurm, "many_nodes.sbatch", workplace, *long_run(), options=TWO_RANKS)
    wait_until(lambda: job.has_step(45), "step 45")
    slurm.lose_node("n02")
    slurm.repair_node("n02")
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.text()
    assert values(job.run) == undisturbed
    assert re.search(r"starting at step [1-9]", job.text())


def test_a_job_of_torchruns_that_loses_a_rank_goes_on(slurm: Slurm, undisturbed, workplace: Path, at_root) -> None:
    job = Job(slurm, "many_nodes_torchrun.sbatch", workplace, *long_run(), options=TWO_RANKS)
    wait_until(lambda: job.has_step(45), "step 45")
    slurm.laboratory.run("n02", "pkill", "-KILL", "-f", "megatron_llama.train --config.*RANK|-m megatron_llama.train")
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.text()
    assert values(job.run) == undisturbed


def test_a_mistake_is_not_tried_again(slurm: Slurm, workplace: Path, at_root) -> None:
    job = Job(slurm, "one_node.sbatch", workplace, "--parallel.tp", 3, options=("--ntasks-per-node=2",))
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), job.text()
    assert len(re.findall("^error: ", job.text(), re.MULTILINE)) == 1 and "a restart would not help" in job.text()


def test_a_sweep_has_a_run_for_each_rate(slurm: Slurm, workplace: Path, at_root) -> None:
    job = Job(slurm, "sweep.sbatch", workplace, options=("--array=1-2", "--ntasks-per-node=1"))
    wait_until(lambda: job.run.exists() and len(list(job.run.glob("*/checkpoints/step_00000006"))) == 2, "both runs", 120)
    assert sorted(path.name for path in job.run.iterdir()) == ["2e-4", "3e-4"]
