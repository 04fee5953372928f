"""The laboratory for a session of tests: skipped, with the reason, where it cannot be had, which REQUIRE_LAB=1 forbids."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.job import long_run
from tests.jobs.laboratory import CannotHaveIt, Laboratory
from tests.jobs.mpi import Mpi
from tests.jobs.slurm import Slurm
from tests.megatron_llama.conftest import project, run, workplace  # noqa: F401
from tests.megatron_llama.programs import succeed, values


def absent(reason: CannotHaveIt) -> None:
    """Skip, or fail where the laboratory must be."""
    if os.environ.get("REQUIRE_LAB") == "1":
        pytest.fail(f"REQUIRE_LAB=1, and {reason}")
    pytest.skip(str(reason))


@pytest.fixture(scope="session")
def laboratory() -> Iterator[Laboratory]:
    """Three nodes and a head."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        try:
            with Laboratory(Path(folder)) as laboratory:
                yield laboratory
        except CannotHaveIt as reason:
            absent(reason)


@pytest.fixture(scope="session")
def slurm(laboratory: Laboratory) -> Iterator[Slurm]:
    """A SLURM cluster of the nodes."""
    try:
        with Slurm(laboratory) as slurm:
            yield slurm
    except CannotHaveIt as reason:
        absent(reason)


@pytest.fixture(autouse=True)
def restored(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails leaves no job and no broken node to the next."""
    slurm = request.getfixturevalue("slurm") if "slurm" in request.fixturenames else None
    yield
    if slurm is not None:
        slurm.restore()


@pytest.fixture(scope="session")
def mpi(laboratory: Laboratory) -> Mpi:
    """Open MPI on the nodes."""
    try:
        return Mpi(laboratory)
    except CannotHaveIt as reason:
        absent(reason)


@pytest.fixture(scope="session")
def undisturbed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:  # noqa: F811
    """The losses of the long run on two ranks."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("long") / "run"
    os.chdir(project)
    try:
        succeed("train", "--config", "config.toml", *long_run(), "--log.directory", folder,
                "--data.valid", "[]", "--data.tokenizer", "", ranks=2)  # fmt: skip
    finally:
        os.chdir(before)
    return values(folder)
