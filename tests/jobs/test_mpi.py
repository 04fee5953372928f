"""Real mpirun jobs, on one node and on two."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.conftest import absent
from tests.jobs.laboratory import CannotHaveIt, Laboratory
from tests.jobs.mpi import Mpi
from tests.jobs.test_slurm import REPORT, ROOT, TOLERANCE, TRAIN, reports
from tests.megatron_llama.programs import values


@pytest.fixture(scope="module")
def mpi(laboratory: Laboratory) -> Iterator[Mpi]:
    try:
        yield Mpi(laboratory)
    except CannotHaveIt as reason:
        absent(reason)


@pytest.fixture(autouse=True)
def project_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)


HIDDEN = [sys.executable, "-c", "import sys, runpy; sys.modules['mpi4py'] = None; runpy.run_module('tests.jobs.rank_report')"]


@pytest.mark.parametrize("with_mpi4py", [True, False], ids=["mpi4py", "given-address"])
def test_ranks_on_two_nodes_find_each_other(mpi: Mpi, with_mpi4py: bool) -> None:
    address = () if with_mpi4py else ("-x", "MASTER_ADDR=n01", "-x", "MASTER_PORT=29511")
    printed = mpi.call(*(REPORT if with_mpi4py else HIDDEN), options=("-n", 4, *address))
    hosts = ["n01", "n01", "n02", "n02"]
    assert reports(printed) == [f"rank {r}/4 local {r % 2}/2 on {hosts[r]} by mpirun: sum 10" for r in range(4)]


def test_without_an_address_the_error_says_what_to_give(mpi: Mpi) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        mpi.call(*HIDDEN, options=("-n", 4))
    assert "give it -x MASTER_ADDR=NAME" in failed.value.stderr


def test_on_one_node_nothing_is_to_be_given(mpi: Mpi) -> None:
    printed = mpi.call(*HIDDEN, options=("-n", 2, "--host", "n02:2"))
    assert reports(printed) == [f"rank {r}/2 local {r}/2 on n02 by mpirun: sum 3" for r in range(2)]


def test_a_training_on_two_nodes_is_that_of_one_process(mpi: Mpi, run: Path, workplace: Path) -> None:
    few = ["--log.directory", "other", "--train.evaluate_every", "3"]
    mpi.call(*TRAIN, *few, "--parallel.pp", 2, options=("-n", 4, "--wdir", workplace))
    assert values(Path("other")) == pytest.approx(values(run), abs=TOLERANCE)


def test_a_slow_link_changes_nothing_but_time(mpi: Mpi, run: Path, workplace: Path) -> None:
    mpi.laboratory.limit("n02", "20mbit")
    try:
        mpi.call(*TRAIN, "--log.directory", "slow", "--train.evaluate_every", "3", options=("-n", 2, "--wdir", workplace))
    finally:
        mpi.laboratory.limit("n02", "10gbit")
    assert values(Path("slow")) == pytest.approx(values(run), abs=TOLERANCE)
