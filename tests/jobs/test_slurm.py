"""Real SLURM steps: how ranks find each other, and how a run goes on with another number of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.jobs.job import REPORT, TOLERANCE, TRAIN, reports
from tests.jobs.slurm import Slurm
from tests.megatron_llama.programs import STEPS, values

AT_ONCE = "--immediate=60"  # rather than wait for nodes that are not there


@pytest.mark.parametrize(
    ("distribution", "hosts"),
    [("cyclic", ["n01", "n02", "n01", "n02"]), ("arbitrary", ["n02", "n01", "n01", "n02"])],  # rank 0 may be elsewhere
)
def test_ranks_find_each_other(slurm: Slurm, distribution: str, hosts: list[str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("\n".join(hosts) + "\n")
    shape = ["-n", "4"] if distribution == "arbitrary" else ["-N2", "--ntasks-per-node=2"]
    environment = {"SLURM_HOSTFILE": str(tmp_path / "hosts")} if distribution == "arbitrary" else {}
    printed = slurm.call("srun", AT_ONCE, *shape, f"--distribution={distribution}", *REPORT, environment=environment)
    local = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    expected = [f"rank {r}/4 local {local[r]}/2 on {host} by srun: sum 10" for r, host in enumerate(hosts)]
    assert reports(printed) == expected


def test_a_batch_script_is_no_rank_and_a_step_may_use_a_part_of_the_job(slurm: Slurm, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    command = " ".join(REPORT)
    script.write_text(f"#!/bin/bash\n{command}\nsrun --nodes=1 --nodelist=n02 --ntasks=1 {command}\n")
    number = slurm.submit("-N2", "--ntasks-per-node=2", "-o", tmp_path / "log", script)
    assert slurm.wait(number)["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert reports((tmp_path / "log").read_text()) == [
        f"rank 0/1 local 0/1 on n01 by one process in SLURM job {number}, not started by srun: sum 1",
        "rank 0/1 local 0/1 on n02 by srun: sum 1",
    ]


def test_a_training_goes_on_with_fewer_ranks_in_another_layout(slurm: Slurm, run: Path, workplace: Path) -> None:
    """Four ranks on two nodes, then two on one: the losses are those of one process. Three cannot do it, and say so at once."""
    few = ["--log.directory", "other", "--train.evaluate_every", "3", "--checkpoint.save_every", "3"]
    slurm.call("srun", AT_ONCE, "-N2", "--ntasks-per-node=2", *TRAIN, *few, "--parallel.tp", 2)
    assert values(Path("other")) == pytest.approx(values(run), abs=TOLERANCE) and len(values(Path("other"))) == STEPS
    shutil.rmtree(f"other/checkpoints/step_{STEPS:08d}")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        slurm.call("srun", AT_ONCE, "-N3", "--ntasks-per-node=1", *TRAIN, *few)
    assert "error: train.global_batch_size" in failed.value.stderr and failed.value.returncode == 78
    printed = slurm.call("srun", AT_ONCE, "-N1", "--ntasks-per-node=2", *TRAIN, *few, "--parallel.pp", 2)
    assert "starting at step 3" in printed
    assert values(Path("other")) == pytest.approx(values(run), abs=TOLERANCE) and len(values(Path("other"))) == STEPS
