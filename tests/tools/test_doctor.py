"""tools/doctor.py: what it finds of an installation, of ranks and of a directory, and what it says where something is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_llama.doctor import installation, ranks, storage
from megatron_llama.doctor.finding import Finding
from megatron_llama.doctor.ranks import RankFacts, rank_findings, world_axis
from megatron_llama.doctor.storage import storage_findings
from parallel.groups import Axis
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
CPU, ALONE = torch.device("cpu"), Axis.single("world")


def by_subject(findings: list[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def test_the_tool_prints_a_line_for_each_check(tmp_path: Path) -> None:
    words = ["--directory", tmp_path / "checkpoints", "--mib", 1, "--json"]
    command = [sys.executable, ROOT / "tools/doctor.py", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    subjects = {finding["subject"] for finding in found}
    assert {"python", "torch", "cuda", "apex", "triton", "deepspeed", "mpi", "slurm", "cores", "storage", "locks"} <= subjects
    assert not [finding for finding in found if finding["state"] == "FAIL"]
    assert all(finding["fix"] for finding in found if finding["state"] != "PASS")
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which no program and no optional package is found."""
    monkeypatch.setattr(installation, "is_installed", lambda module: False)
    monkeypatch.setattr("parallel.kernels.providers.is_installed", lambda module: False)
    monkeypatch.setattr(shutil, "which", lambda program, **_: None)


def test_a_laptop_without_anything_can_run(bare: None) -> None:
    found = list(installation.installation_findings(CPU, 1))
    assert {finding.state for finding in found} <= {"PASS", "WARN"}
    assert "zero.engine = deepspeed cannot be had" in by_subject(found, "deepspeed")[0].text


def test_what_a_gpu_would_use_is_missed_there(bare: None) -> None:
    found = list(installation._kernels(torch.device("cuda", 0)))
    assert {finding.state for finding in found} == {"WARN"}
    (apex,) = by_subject(found, "apex")
    assert "NVIDIA's Apex from source" in apex.fix


def test_a_stranger_named_apex_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_installed(module: str) -> bool:
        return module == "apex"

    monkeypatch.setattr(installation, "is_installed", is_installed)
    monkeypatch.setattr("parallel.kernels.providers.is_installed", is_installed)
    (apex,) = by_subject(list(installation._kernels(CPU)), "apex")
    assert apex.state == "FAIL" and "not NVIDIA's" in apex.text and "pip uninstall apex" in apex.fix


def test_wrong_versions_and_tight_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert installation._torch().state == "FAIL" and "2.11 to 2.13" in installation._torch().text
    monkeypatch.setattr("sys.version_info", (3, 14, 0))
    assert installation._python().state == "WARN"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    found = list(installation._limits(4))
    assert by_subject(found, "cores")[0].fix == "export OMP_NUM_THREADS=2"
    assert "--shm-size" in by_subject(found, "shared memory")[0].fix


def test_a_driver_whose_gpus_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(installation, "_output", lambda *command: "GPU 0: H200")
    (finding,) = installation._cuda()
    assert finding.state == "FAIL" and "torch (a build for CPUs) sees none" in finding.text


# ---- a job --------------------------------------------------------------------------------------------------------------


def _examine(rank: int, world_size: int, folder: Path, wrong: str) -> list[Finding]:
    world = world_axis(rank, world_size)
    if wrong == "sum" and rank == 1:
        ranks.all_reduce = _off_by_one(ranks.all_reduce)
    if wrong == "link":
        ranks._send = _slow_link(ranks._send)
    if wrong == "folder" and rank == 1:
        storage.SEEN_SECONDS = 0.2
        folder = folder / "another"
    return [*rank_findings(world, CPU, 1), *storage_findings(folder, world, CPU, 1)]


def _off_by_one(all_reduce):
    return lambda tensor, world: all_reduce(tensor + (tensor.numel() == 1024), world)


def _slow_link(send):
    import time

    def slow(tensor, world, source, target):
        send(tensor, world, source, target)
        if source == 1:
            time.sleep(0.1)

    return slow


def test_ranks_examine_one_another(tmp_path: Path) -> None:
    found, *others = run_ranks(3, _examine, tmp_path, "")
    assert others == [[], []]
    subjects = [finding.subject for finding in found]
    assert subjects == ["ranks", "clocks", "all-reduce", "links", "storage", "locks", "shared folder"]
    assert {finding.state for finding in found if finding.subject not in ("links", "storage")} == {"PASS"}  # (a busy machine)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "subject", "state", "text"),
    [
        ("sum", "all-reduce", "FAIL", "wrong sum"),
        ("link", "links", "WARN", "rank 1 on "),
        ("folder", "shared folder", "FAIL", "not the same folder"),
    ],
)
def test_what_is_wrong_with_a_job_is_named(wrong: str, subject: str, state: str, text: str, tmp_path: Path) -> None:
    found = run_ranks(3, _examine, tmp_path, wrong)[0]
    (finding,) = by_subject(found, subject)
    assert finding.state == state and text in finding.text and finding.fix


def facts(rank: int, host: str, **changed: object) -> RankFacts:
    usual = RankFacts(rank, host, "10.0.0.1", "3.11.7", "2.13.0", "H100", 1000.0)
    return dataclasses.replace(usual, **changed)


@pytest.mark.parametrize(
    ("everyone", "subject", "text"),
    [
        ([facts(0, "a"), facts(1, "a"), facts(2, "b")], "ranks", "b has 1 of them only"),
        ([facts(0, "a"), facts(1, "b"), facts(2, "a"), facts(3, "b")], "ranks", "tp groups cross nodes"),
        ([facts(0, "a"), facts(1, "b", address="127.0.1.1")], "host names", "b takes its own name for 127.0.1.1"),
        ([facts(0, "a"), facts(1, "b", torch="2.12.0")], "torch", "2.12.0, 2.13.0"),
        ([facts(0, "a"), facts(1, "b", device="A100")], "device", "A100, H100"),
        ([facts(0, "a"), facts(1, "b", clock=990.0)], "clocks", "b is 10.0 s behind a"),
    ],
)
def test_nodes_are_compared(everyone: list[RankFacts], subject: str, text: str) -> None:
    bad = [finding for finding in ranks._compare(everyone) if finding.state != "PASS"]
    assert len(bad) == 1 and bad[0].subject == subject and text in bad[0].text and bad[0].fix


def test_a_directory_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = storage_findings(tmp_path / "file" / "checkpoints", ALONE, CPU, 1)
    assert finding.state == "FAIL" and "Not a directory" in finding.text


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    (locks,) = by_subject(list(storage_findings(tmp_path, ALONE, CPU, 1)), "locks")
    assert locks.state == "WARN" and "would not be noticed" in locks.text
