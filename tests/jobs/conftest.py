"""The laboratory for a session of tests: skipped, with the reason, where it cannot be had, which REQUIRE_LAB=1 forbids."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.laboratory import CannotHaveIt, Laboratory
from tests.jobs.slurm import Slurm
from tests.megatron_llama.conftest import project, run, workplace  # noqa: F401


def absent(reason: CannotHaveIt) -> None:
    """Skip, or fail where the laboratory must be."""
    if os.environ.get("REQUIRE_LAB") == "1":
        pytest.fail(f"REQUIRE_LAB=1, and {reason}")
    pytest.skip(str(reason))


@pytest.fixture(scope="session")
def laboratory() -> Iterator[Laboratory]:
    """Two nodes and a head."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        try:
            with Laboratory(Path(folder)) as laboratory:
                yield laboratory
        except CannotHaveIt as reason:
            absent(reason)


@pytest.fixture(scope="session")
def slurm(laboratory: Laboratory) -> Iterator[Slurm]:
    """A SLURM cluster of the two nodes."""
    try:
        with Slurm(laboratory) as slurm:
            yield slurm
    except CannotHaveIt as reason:
        absent(reason)
