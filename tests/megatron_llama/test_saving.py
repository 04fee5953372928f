"""When a run saves: in the background as at once, what it does where a save fails or is slow, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_llama import trainer
from megatron_llama.saving import Saver
from megatron_llama.step import TrainStep
from megatron_llama.trainer import Trainer
from parallel.checkpoint import save
from parallel.checkpoint.steps import committed_steps
from tests.megatron_llama.programs import STEPS, records, start, succeed, values
from tests.parity.test_parity import layout
from tests.parity.training import Case, Session

CONFIG = ("--config", "config.toml", "--checkpoint.keep", 0)
NARROW = ("--train.dtype", "bf16", "--optimizer.moment_dtype", "bf16", "--optimizer.master_weights", "remainder")
EVERY = "--checkpoint.save_every"
BACKGROUND = "--checkpoint.asynchronous"


def steps_in(run: str) -> list[int]:
    return committed_steps(Path(run) / "checkpoints")


def stored(run: str) -> dict[str, bytes]:
    """Every file of every checkpoint; manifests without the run's own settings."""
    found = {}
    for path in sorted(Path(run, "checkpoints").rglob("*")):
        name = str(path.relative_to(run))
        if path.name == "manifest.json":
            manifest = json.loads(path.read_bytes())
            del manifest["state"]["config"]
            found[name] = json.dumps(manifest).encode()
        elif path.is_file() and path.name != "COMMIT":
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("numbers", [(), NARROW], ids=["fp32", "narrow"])
def test_a_save_in_the_background_is_the_synchronous_one(numbers: tuple, workplace: Path) -> None:
    for run, background in (("at-once", "false"), ("background", "true")):
        flags = (*CONFIG, *numbers, EVERY, 2, BACKGROUND, background, "--log.directory", run)
        out = succeed("train", *flags, ranks=2)
        assert [out.count(f"step {step}: saved {run}/checkpoints/step_{step:08d} in ") for step in (2, 4, 6)] == [1, 1, 1]
        assert list(records(run, "checkpoint_seconds")) == [2, 4, 6] and min(values(run, "checkpoint_seconds")) > 0
    assert values("background") == values("at-once")
    assert stored("background") == stored("at-once") and steps_in("at-once") == [2, 4, 6]


def leave_out_audits() -> None:
    """The audit before each save, which talks to the other ranks and takes its time."""
    trainer.check_replicas = lambda *_: None


def counted_steps(rank: int) -> None:
    """Write the number of collective calls in and between training steps, up to the last save, to calls-RANK."""
    calls: list[str] = []
    names = ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "barrier")
    for name in (*names, "all_gather", "send", "recv", "batch_isend_irecv"):
        if hasattr(dist, name):
            original = getattr(dist, name)

            def call(*arguments, name=name, original=original, **options):
                calls.append(name)
                return original(*arguments, **options)

            setattr(dist, name, call)
    run, finish = Trainer.run, Saver.finish
    leave_out_audits()

    def counted_run(its_trainer):
        calls.clear()
        return run(its_trainer)

    def counted_finish(saver, position):
        Path(f"calls-{saver.settings.save_every}-{rank}").write_text(" ".join(calls))
        return finish(saver, position)

    Trainer.run, Saver.finish = counted_run, counted_finish


def test_saves_in_the_background_cost_steps_no_communication(workplace: Path) -> None:
    for every in (0, 1):
        flags = (*CONFIG, EVERY, every, "--checkpoint.when_busy", "skip", "--log.directory", f"every-{every}")
        succeed("train", *flags, ranks=2, change=counted_steps)
    for rank in range(2):
        calls = Path(f"calls-0-{rank}").read_text()
        assert calls.count("all_reduce") >= STEPS and Path(f"calls-1-{rank}").read_text() == calls
    assert steps_in("every-0") == [STEPS] and {1, STEPS} <= set(steps_in("every-1"))


def test_steps_carry_a_save_to_its_end(workplace: Path) -> None:
    """Nobody waits for it: what a thread has done by the end of a step is said in the next one."""

    def steps_without_writing(rank: int) -> None:
        leave_out_audits()
        run = TrainStep.run

        def waiting_run(*arguments):
            while any(thread.name == "checkpoint" for thread in threading.enumerate()):
                time.sleep(0.01)
            return run(*arguments)

        TrainStep.run = waiting_run

    flags = (*CONFIG, EVERY, 1, "--checkpoint.when_busy", "skip", "--train.steps", 10)
    out = succeed("train", *flags, ranks=2, change=steps_without_writing)
    lines = [line for line in out.splitlines() if "saved" in line]
    assert [line.partition(",")[0] for line in lines[:3]] == [f"step {step}: not saved" for step in (2, 3, 4)]
    assert lines[3].startswith("step 1: saved") and "for step 1 to be written" not in out


# slow and failing


def fail_writes(*numbers: int, rank: int = 1) -> Callable[[int], None]:
    """A change for one rank: its writes with these numbers, from 1 on, fail."""

    def change(this_rank: int) -> None:
        original, seen = save.write_safetensors, []

        def write(path, *arguments):
            if path.name.startswith("weights"):
                seen.append(path)
                if len(seen) in numbers:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return original(path, *arguments)

        if this_rank == rank:
            save.write_safetensors = write

    return change


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize("rank", [0, 1])
def test_training_goes_on_after_a_failed_save(rank: int, background: str, workplace: Path) -> None:
    flags = (*CONFIG, EVERY, 2, BACKGROUND, background)
    ended = start("train", *flags, ranks=2, change=fail_writes(1, rank=rank))
    assert [e.code for e in ended] == [0, 0] and steps_in("run") == [4, 6]
    assert [e.err.count("No space left") for e in ended] == [rank == 0, rank == 1]
    assert ended[rank].err.startswith("error") and ended[1 - rank].err == ""
    (line,) = [line for line in ended[0].out.splitlines() if "not saved" in line]
    for part in (f"rank {rank}", "No space left", "step_00000002", "failure 1 in a row, checkpoint.failures_allowed = 3"):
        assert part in line
    assert "No space left" in Path(f"run/logs/rank-{rank:05d}.log").read_text()
    assert values("run") and os.listdir("run/checkpoints") != []


@pytest.mark.parametrize("background", ["true", "false"])
def test_too_many_failures_in_a_row_stop_the_run(background: str, workplace: Path) -> None:
    flags = (*CONFIG, EVERY, 1, BACKGROUND, background, "--train.steps", 9, "--checkpoint.failures_allowed", 1)
    ended = start("train", *flags, ranks=2, change=fail_writes(1, 3, 5, 6))
    assert [e.code for e in ended] == [78, 78] and steps_in("run") == [2, 4]
    assert "failure 2 in a row, checkpoint.failures_allowed = 1" in ended[1].err.splitlines()[-1] and ended[0].err == ""
    assert ended[0].out.count("failure 2 in a row") == 1


@pytest.mark.parametrize("background", ["true", "false"])
def test_the_last_save_must_not_fail(background: str, workplace: Path) -> None:
    flags = (*CONFIG, EVERY, 3, BACKGROUND, background)
    ended = start("train", *flags, ranks=2, change=fail_writes(2))
    assert [e.code for e in ended] == [78, 78] and steps_in("run") == [3]
    assert ended[1].err.count("\n") == 1 and "the last save of the run" in ended[1].err and ended[0].err == ""
    succeed("train", *CONFIG, ranks=2)
    assert steps_in("run") == [3, 6]


def slow_first_write(rank: int) -> None:
    """The write of step 1 ends when step 4 is launched, or when the program waits for it."""
    go_on, write, run, join = threading.Event(), save.write_part, TrainStep.run, threading.Thread.join
    steps: list[None] = []

    def slow_write(temporary, *arguments):
        if "step_00000001" in str(temporary):
            assert go_on.wait(20)
        return write(temporary, *arguments)

    def counted_run(*arguments):
        steps.append(None)
        if len(steps) == 4:
            go_on.set()
        return run(*arguments)

    def opening_join(thread, *arguments):
        if thread.name == "checkpoint":
            go_on.set()
        return join(thread, *arguments)

    save.write_part, TrainStep.run, threading.Thread.join = slow_write, counted_run, opening_join


def test_a_save_that_is_due_while_one_is_under_way_is_skipped(workplace: Path) -> None:
    flags = (*CONFIG, EVERY, 1, "--checkpoint.when_busy", "skip")
    out = succeed("train", *flags, ranks=2, change=slow_first_write)
    assert {2, 3}.isdisjoint(steps_in("run")) and {1, STEPS} <= set(steps_in("run"))
    for step in (2, 3):
        assert out.count(f"step {step}: not saved, as step 1 is still being written") == 1
    assert {2, 3}.isdisjoint(records("run", "checkpoint_seconds"))


def test_a_save_that_is_due_while_one_is_under_way_waits_for_it(workplace: Path) -> None:
    out = succeed("train", *CONFIG, EVERY, 1, ranks=2, change=slow_first_write)
    assert steps_in("run") == [1, 2, 3, 4, 5, 6] and "s for step 1 to be written" in out


def test_a_stop_waits_for_the_save_under_way(workplace: Path) -> None:
    def stop_at_3(rank: int) -> None:
        slow_first_write(rank)
        run, steps = TrainStep.run, []

        def stopping_run(*arguments):
            steps.append(None)
            if rank == 1 and len(steps) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return run(*arguments)

        TrainStep.run = stopping_run

    flags = (*CONFIG, EVERY, 1, "--checkpoint.when_busy", "skip", "--train.steps", 9)
    ended = start("train", *flags, ranks=2, change=stop_at_3)
    assert [e.code for e in ended] == [75, 75] and not ended[0].err + ended[1].err
    assert steps_in("run") == [1, 3]


def test_what_a_killed_save_has_left_is_removed_by_the_next_start(workplace: Path) -> None:
    def kill_in_commit(rank: int) -> None:
        save.commit = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError, match="exit code -9"):
        succeed("train", *CONFIG, EVERY, 4, ranks=2, change=kill_in_commit)
    assert steps_in("run") == [] and len(os.listdir("run/checkpoints")) == 1
    succeed("train", *CONFIG, ranks=2)  # which saves at other steps
    assert os.listdir("run/checkpoints") == ["step_00000006"]


def test_an_update_waits_on_the_device_for_the_copy_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's part, with a stream that takes notes: forward and backward first, the update last."""
    events: list[str] = []

    class Stream:
        def wait_event(self, event: str) -> None:
            events.append(event)

    session = Session(0, 1, Case("alone", layout()))
    session.step_runner.state_copied = "copied"
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    for owner, name in ((session.step_runner.executor, "run"), (session.engine, "step")):
        original = getattr(owner, name)

        def noting(*arguments, name=name, original=original):
            events.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, noting)
    session.step(0)
    assert events == ["run", "copied", "step"]
