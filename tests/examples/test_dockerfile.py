"""The Dockerfile, without a container engine: its parts fit together, and the shell of its steps does what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.kernels.providers import ApexPackage
from parallel.kernels.table import ROWS

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """(FROM, COPY, ..., the rest of the line), without comments, continued lines joined as the shell gets them."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


INSTRUCTIONS = instructions()


def of_kind(kind: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == kind]


def test_what_it_copies_is_there() -> None:
    sources = [word for rest in of_kind("COPY") if not rest.startswith("--from") for word in rest.split()[:-1]]
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert len(sources) > 5 and [source for source in sources if not (ROOT / source).exists()] == []
    assert let_through == set(sources)


def test_stages_are_copied_from_once_they_exist() -> None:
    stages, copied = [], []
    for name, rest in INSTRUCTIONS:
        if name == "FROM":
            stages += re.findall(r" AS (\w+)$", rest)
        copied += re.findall(r"--from=(\S+)", rest) if name == "COPY" else []
        assert set(copied) <= set(stages), rest
    assert copied and set(copied) == set(stages)


def test_what_it_takes_from_elsewhere_is_pinned() -> None:
    arguments = dict(rest.split("=", 1) for rest in of_kind("ARG"))
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", arguments["BASE"])
    assert re.fullmatch(r"[0-9a-f]{40}", arguments["APEX_COMMIT"])
    assert {rest.split()[0] for rest in of_kind("FROM")} == {"${BASE}"}
    names = re.search(r"for name in ([\w .-]+);", "".join(of_kind("RUN")))[1].split()
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert len(names) > 5 and [name for name in names if name not in pinned] == []


def test_it_checks_the_torch_that_setup_py_wants() -> None:
    low, high = re.search(r'"torch>=(\d+\.\d+),<(\d+\.\d+)"', (ROOT / "setup.py").read_text()).groups()
    wanted = f"({low.replace('.', ', ')}) <= version < ({high.replace('.', ', ')})"
    assert wanted in "".join(of_kind("RUN"))


@pytest.mark.parametrize("command", of_kind("RUN"))
def test_a_step_is_valid_shell(command: str) -> None:
    assert subprocess.run(["sh", "-n", "-c", command]).returncode == 0


class Build:
    """A folder to run the steps of the stage `apex` in, with stand-ins for python, pip and git."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.check, self.build = (self.moved(rest) for rest in of_kind("RUN")[:2])
        self.calls = folder / "calls"
        self.calls.touch()
        (folder / "bin").mkdir()
        for name, script in {
            "git": f'echo git "$@" >> {self.calls}',
            "python": f'[ "$1" = -m ] || exec {sys.executable} "$@"\nshift; env >> {self.calls}; echo "$@" >> {self.calls}',
        }.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / "bin" / name).chmod(0o755)

    def moved(self, command: str) -> str:
        return command.replace("/wheels", f"{self.folder}/wheels").replace("/opt/", f"{self.folder}/")

    def run(self, apex: str, modules: list[str]) -> subprocess.CompletedProcess:
        """Run both steps, where the base has these modules."""
        for name in modules:
            (self.folder / f"{name}.py").touch()
        environment = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(self.folder)}
        environment |= {"APEX": apex, "APEX_COMMIT": "c0ffee", "MAX_JOBS": "2"}
        command = f"set -e; {self.check}\n{self.build}"
        return subprocess.run(["sh", "-c", command], env=environment, cwd=self.folder, capture_output=True, text=True)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path)


EXTENSIONS = {
    extension
    for providers in ROWS.values()
    for provider in providers
    if isinstance(provider.package, ApexPackage)
    for extension in provider.package.modules
}


@pytest.mark.parametrize("apex", ["auto", "base"])
def test_a_base_with_apex_is_taken_as_it_is(build: Build, apex: str) -> None:
    assert build.run(apex, sorted(EXTENSIONS)).returncode == 0
    assert build.calls.read_text() == ""


@pytest.mark.parametrize("missing", sorted(EXTENSIONS))
def test_apex_is_built_where_the_base_lacks_an_extension(build: Build, missing: str) -> None:
    ended = build.run("auto", sorted(EXTENSIONS - {missing}))
    assert ended.returncode == 0 and f"NVIDIA Apex lacks ['{missing}']" in ended.stderr
    calls = build.calls.read_text().splitlines()
    assert "git fetch --quiet --depth 1 https://github.com/NVIDIA/apex c0ffee" in calls
    assert {"APEX_CPP_EXT=1", "APEX_CUDA_EXT=1", "APEX_XENTROPY=1", "APEX_PARALLEL_BUILD=2"} <= set(calls)
    assert calls[-1].startswith("pip wheel ") and calls[-1].endswith(f"--wheel-dir {build.folder}/wheels .")


def test_apex_can_be_built_anyway(build: Build) -> None:
    assert build.run("build", sorted(EXTENSIONS)).returncode == 0
    assert "pip wheel" in build.calls.read_text()


def test_a_build_that_must_take_the_base_as_it_is_fails_without_apex(build: Build) -> None:
    ended = build.run("base", [])
    assert ended.returncode == 1 and "NVIDIA Apex lacks" in ended.stderr and build.calls.read_text() == ""
