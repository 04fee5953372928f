"""The example scripts as real SLURM jobs: they are stopped, killed, cut off and short of a node, and lose nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.jobs.job import Job, kill_rank, long_run
from tests.jobs.laboratory import wait_until
from tests.jobs.slurm import Slurm
from tests.megatron_llama.programs import values

TWO_NODES = ("--nodelist=n01,n02", "--ntasks-per-node=1")


def test_a_job_that_runs_out_of_time_saves_and_goes_on(slurm: Slurm, undisturbed, workplace: Path) -> None:
    """`scancel --batch --signal` is what `--signal=B:USR1@300` does when the time has come."""
    job = Job(slurm, "many_nodes.sbatch", workplace, *long_run(save_every=0), options=TWO_NODES)
    job.reach(30)
    slurm.call("scancel", "--batch", "--signal=USR1", job.number)
    assert job.end() == ("COMPLETED", "1"), job.text()
    assert "asked to stop after step" in job.text() and "requeued" in job.text()
    assert values(job.run) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_time_limit_stops_a_job_and_it_goes_on(slurm: Slurm, workplace: Path) -> None:
    """SLURM looks at its clock every half a minute, and sends the signal up to a minute early."""
    endless = ("--train.steps", "1000000", "--checkpoint.save_every", "0")
    job = Job(slurm, "many_nodes.sbatch", workplace, *endless, options=(*TWO_NODES, "--signal=B:USR1@60", "--time=2"))
    job.says("asked to stop after step")
    job.says(r"starting at step [1-9]")
    assert "TIMEOUT" not in job.text() and slurm.job(job.number)["Restarts"] == "1"


def test_a_job_that_loses_a_node_goes_on(slurm: Slurm, undisturbed, workplace: Path) -> None:
    job = Job(slurm, "many_nodes.sbatch", workplace, *long_run(), options=TWO_NODES)
    job.reach(45)
    slurm.lose_node("n02")
    slurm.repair_node("n02")
    assert job.end() == ("COMPLETED", "1"), job.text()
    assert values(job.run) == undisturbed
    assert re.search(r"starting at step [1-9]", job.text())


def test_a_job_of_torchruns_that_loses_a_rank_goes_on(slurm: Slurm, undisturbed, workplace: Path) -> None:
    job = Job(slurm, "many_nodes_torchrun.sbatch", workplace, *long_run(), options=TWO_NODES)
    job.reach(45)
    kill_rank(slurm.laboratory, "n02", "torch.distributed.run")
    assert job.end() == ("COMPLETED", "1"), job.text()
    assert values(job.run) == undisturbed


def test_a_job_whose_nodes_lose_sight_of_each_other_goes_on(slurm: Slurm, undisturbed, workplace: Path) -> None:
    """Packets vanish and nobody is told: the ranks end by their time-out, and say in which call."""
    timeouts = ("--train.step_timeout", "10")
    job = Job(slurm, "many_nodes.sbatch", workplace, *long_run(), *timeouts, options=TWO_NODES)
    job.reach(45)
    slurm.laboratory.cut("n02")
    job.says(r"error: rank 0 has lost another rank in \w+ over \w+ \(0, 1\)")
    slurm.laboratory.join("n02")
    assert job.end() == ("COMPLETED", "1"), job.text()
    assert values(job.run) == undisturbed


def test_supervisors_start_again_without_a_requeue(slurm: Slurm, undisturbed, workplace: Path) -> None:
    """First a rank dies, then a node for which another one stands by."""
    options = ("-N3", "--ntasks-per-node=1")
    job = Job(
        slurm, "supervised.sbatch", workplace, *long_run(), options=options, NODES="2", SUPERVISE="--node-timeout 15 --grace 2"
    )
    job.reach(45)
    kill_rank(slurm.laboratory, "n02", "megatron_llama.supervise")
    job.says("start 2 of 2 ranks")
    job.says(r"starting at step [1-9]")
    slurm.lose_node("n02")
    slurm.repair_node("n02")
    assert job.end() == ("COMPLETED", "0"), job.text()
    assert values(job.run) == undisturbed
    assert "start 3 of 2 ranks" in job.text()


def test_a_mistake_is_not_tried_again(slurm: Slurm, workplace: Path) -> None:
    job = Job(slurm, "one_node.sbatch", workplace, "--parallel.tp", "3", options=("--ntasks-per-node=2",))
    assert job.end() == ("FAILED", "0"), job.text()
    assert len(re.findall("^error: ", job.text(), re.MULTILINE)) == 1 and "a restart would not help" in job.text()


def test_a_sweep_has_a_run_for_each_rate(slurm: Slurm, workplace: Path) -> None:
    job = Job(slurm, "sweep.sbatch", workplace, options=("--array=1-2", "--ntasks-per-node=1"))
    rates = ["2e-4", "3e-4"]
    wait_until(lambda: all((job.run / rate / "checkpoints/step_00000006").exists() for rate in rates), "both runs", 240)
