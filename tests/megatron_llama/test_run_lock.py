"""A run directory has one training at a time, and a dead one holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_llama import run_lock
from megatron_llama.config import load_config
from megatron_llama.program import USER_ERROR
from megatron_llama.run_lock import LOCK_FILE, lock_run
from parallel.errors import ConfigError
from tests.megatron_llama.programs import start, succeed


def lock(*flags: str):
    return lock_run(load_config(["--config", "config.toml", *flags]))


def lock_in_another_process(seconds: float) -> int:
    """The id of a process that holds the run directory, and ends after that time."""
    held, begun = os.pipe()
    pid = os.fork()
    if not pid:
        with lock():
            os.write(begun, b"!")
            time.sleep(seconds)
        os._exit(0)
    os.read(held, 1)
    return pid


def test_a_second_training_is_refused_and_told_who_the_first_one_is(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.2)
    pid = lock_in_another_process(60)
    try:
        ended = start("train", "--config", "config.toml", ranks=2)
        assert [rank.code for rank in ended] == [USER_ERROR] * 2
        assert f"error: run belongs to another training, by {os.uname().nodename} process {pid} since 2" in ended[0].err
        assert not (workplace / "run/metrics.jsonl").exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert (workplace / "run" / LOCK_FILE).exists()
    succeed("train", "--config", "config.toml", "--train.steps", 2)


def test_one_that_is_about_to_end_is_waited_for(workplace: Path) -> None:
    began = time.monotonic()
    pid = lock_in_another_process(0.5)
    lock().close()
    assert time.monotonic() - began > 0.5
    os.waitpid(pid, 0)


def test_checkpoints_elsewhere_are_locked_too(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.2)
    with lock("--checkpoint.directory", "elsewhere"), pytest.raises(ConfigError, match="elsewhere belongs to another training"):
        lock("--log.directory", "other", "--checkpoint.directory", "elsewhere")
    lock("--log.directory", "other", "--checkpoint.directory", "elsewhere").close()


def test_another_host_is_given_time_for_its_lock_to_expire(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.0)
    pid = lock_in_another_process(0.5)
    (workplace / "run" / LOCK_FILE).write_text("n99 process 7 since yesterday\n")
    lock().close()
    os.waitpid(pid, 0)


def test_without_locks_in_the_file_system_it_goes_on_with_a_warning(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def flock(file, operation) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock().close()
    assert "warning: run/running.lock cannot be locked (Function not implemented)" in capsys.readouterr().err
