"""Real mpirun jobs, on one node and on several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.job import REPORT, TOLERANCE, has_step, kill_rank, long_run, reports
from tests.jobs.laboratory import wait_until
from tests.jobs.mpi import Mpi
from tests.megatron_llama.programs import values

HIDDEN = [sys.executable, "-c", "import sys, runpy; sys.modules['mpi4py'] = None; runpy.run_module('tests.jobs.rank_report')"]
ONE_PER_NODE = ("-n", 2, "--map-by", "ppr:1:node")


def test_ranks_on_two_nodes_find_each_other(mpi: Mpi) -> None:
    printed = mpi.call(*REPORT, options=("-n", 4))
    hosts = ["n01", "n01", "n02", "n02"]
    assert reports(printed) == [f"rank {r}/4 local {r % 2}/2 on {hosts[r]} by mpirun: sum 10" for r in range(4)]


def test_ranks_without_mpi4py_are_given_an_address(mpi: Mpi) -> None:
    printed = mpi.call(*HIDDEN, options=(*ONE_PER_NODE, "-x", "MASTER_ADDR=n01", "-x", "MASTER_PORT=29511"))
    assert reports(printed) == [f"rank {r}/2 local 0/1 on n0{r + 1} by mpirun: sum 3" for r in range(2)]


def test_without_an_address_the_error_says_what_to_give(mpi: Mpi) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        mpi.call(*HIDDEN, options=ONE_PER_NODE)
    assert "give it -x MASTER_ADDR=NAME" in failed.value.stderr


def test_on_one_node_nothing_is_to_be_given(mpi: Mpi) -> None:
    printed = mpi.call(*HIDDEN, options=("-n", 2, "--host", "n02:2"))
    assert reports(printed) == [f"rank {r}/2 local {r}/2 on n02 by mpirun: sum 3" for r in range(2)]


def test_a_training_on_two_nodes_is_that_of_one_process(mpi: Mpi, run: Path, workplace: Path) -> None:
    mpi.script("train.sh", workplace, "--parallel.pp", "2", slots=2)
    assert values(workplace / "job") == pytest.approx(values(run), abs=TOLERANCE)


def test_a_slow_link_changes_nothing_but_time(mpi: Mpi, run: Path, workplace: Path) -> None:
    mpi.laboratory.limit("n02", "20mbit")
    try:
        mpi.script("train.sh", workplace)
    finally:
        mpi.laboratory.limit("n02", "10gbit")
    assert values(workplace / "job") == pytest.approx(values(run), abs=TOLERANCE)


def test_supervisors_start_again_when_a_rank_dies(mpi: Mpi, undisturbed, workplace: Path) -> None:
    with mpi.running("supervised.sh", workplace, *long_run(), GPUS_PER_NODE="1") as job:
        wait_until(lambda: has_step(workplace / "job", 45), "step 45", 240)
        kill_rank(mpi.laboratory, "n02", "megatron_llama.supervise")
        assert job.wait(240) == 0, (workplace / "log").read_text()
    assert values(workplace / "job") == undisturbed
    assert "rank 1 killed by SIGKILL" in (workplace / "log").read_text()
