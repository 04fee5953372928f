"""The training program from outside: its run directory, its losses, stopping and resuming in any layout."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import megatron_llama
from megatron_llama.config import help_text, load_config
from megatron_llama.config.file import SECTIONS
from megatron_llama.data.blend import build_blend
from megatron_llama.step import TrainStep
from parallel.checkpoint import save
from parallel.checkpoint.manifest import read_manifest
from parallel.checkpoint.steps import committed_steps
from tests.megatron_llama.programs import (
    BATCH_SIZE,
    SEQUENCE_LENGTH,
    STEPS,
    full_weights,
    model_config,
    records,
    start,
    succeed,
    values,
)
from tests.parity import hugging_face

TOKENS_PER_STEP = BATCH_SIZE * SEQUENCE_LENGTH
LAYOUT_TOLERANCE = 1e-5  # of losses in nats; fp32 sums in another order differ by about 1e-6 after a few updates
LAYOUTS = {
    "alone": (1, []),
    "tp2-pp2": (4, ["--parallel.tp", 2, "--parallel.pp", 2]),
    "dp2": (2, []),
}


SAVES = ("--checkpoint.save_every", 2)


def train(*argv: object, ranks: int = 1, config: str = "config.toml", **options) -> str:
    return succeed("train", "--config", config, *argv, ranks=ranks, **options)


def steps_in(run_directory: Path) -> list[int]:
    return committed_steps(run_directory / "checkpoints")


def stored_bytes(run_directory: Path, step: int) -> dict[str, bytes]:
    """Weights and optimizer files of a step."""
    return {path.name: path.read_bytes() for path in (run_directory / f"checkpoints/step_{step:08d}").glob("*.safetensors")}


def assert_same_run(found: Path, expected: Path, last_step: int = STEPS) -> None:
    """Bit for bit: what metrics.jsonl says of each step, clocks apart, and the final state."""
    for field in ("loss", "grad_norm", "learning_rate", "tokens", "step"):
        assert values(found, field) == values(expected, field)
    assert stored_bytes(found, last_step) == stored_bytes(expected, last_step)


# what a run leaves behind


def test_run_directory(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        *("config.toml", "metrics.jsonl", "tensorboard", "logs", "checkpoints", "tokenizer.model", "running.lock"),
    }
    assert [path.name for path in (run / "logs").iterdir()] == ["rank-00000.log"]
    assert steps_in(run) == [2, 4, 6]
    assert list((run / "tensorboard").glob("events.*"))
    tokenizer = (run / "tokenizer.model").read_bytes()
    assert (run / "checkpoints/step_00000006/tokenizer.model").read_bytes() == tokenizer


def test_stored_config_starts_the_same_run(run: Path, workplace: Path) -> None:
    train("--log.directory", "again", "--checkpoint.load", "none", config=str(run / "config.toml"))
    assert_same_run(workplace / "again", run)


def test_metrics(run: Path) -> None:
    steps, evaluations = records(run), records(run, "valid_loss")
    assert list(steps) == [1, 2, 3, 4, 5, 6] and list(evaluations) == [3, 6]
    speeds = ["step_seconds", "tokens_per_second", "data_wait_seconds"]
    fields = ["step", "loss", "grad_norm", "learning_rate", "tokens", *speeds, "time"]
    for step, line in steps.items():
        assert list(line) == fields  # and no mfu: a CPU's peak is not known
        assert line["tokens"] == step * TOKENS_PER_STEP
        assert line["tokens_per_second"] == TOKENS_PER_STEP / line["step_seconds"]
    assert all(list(line) == ["step", "valid_loss", "valid", "time"] for line in evaluations.values())
    assert all(line["valid"]["valid"]["loss"] == line["valid_loss"] for line in evaluations.values())
    assert steps[6]["loss"] < steps[1]["loss"] - 0.05


def test_loss_is_the_token_mean_of_the_global_batch(run: Path, project: Path) -> None:
    """Step 3 against transformers with the weights of step 2, over the samples that step 3 reads."""
    model = model_config()
    blend = build_blend([(str(project / "train"), None)], SEQUENCE_LENGTH, 1234, model.vocab_size)
    samples = torch.stack([torch.from_numpy(blend.sample(i)) for i in range(2 * BATCH_SIZE, 3 * BATCH_SIZE)])
    module = hugging_face.build(model, full_weights(run / "checkpoints/step_00000002"))
    with torch.no_grad():
        logits = module(samples[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
    assert abs(records(run)[3]["loss"] - expected.item()) < 2e-6  # fp32 noise; a wrong weighting is off by 1e-2


def test_log_files_and_standard_output(workplace: Path) -> None:
    out = train("--train.steps", 2, ranks=2)
    for rank in range(2):
        text = (workplace / f"run/logs/rank-{rank:05d}.log").read_text()
        assert "2 x cpu (torchrun)" in text and "saved run/checkpoints/step_00000002" in text
    assert out.count("step 2/2 | loss ") == 1 and out.count("held-out loss") == 1


# stopping and resuming


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_in_the_same_layout_bit_for_bit(layout: str, workplace: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    train(*flags, "--log.directory", "undisturbed", "--checkpoint.save_every", 3, ranks=ranks)
    train(*flags, "--train.exit_step", 4, ranks=ranks)
    assert steps_in(workplace / "run") == [4] and list(records(workplace / "run")) == [1, 2, 3, 4]
    train(*flags, ranks=ranks)
    assert_same_run(workplace / "run", workplace / "undisturbed")


def test_change_of_layout_continues_the_run(run: Path, workplace: Path) -> None:
    for exit_step, layout in ((2, "tp2-pp2"), (4, "dp2"), (0, "alone")):
        ranks, flags = LAYOUTS[layout]
        train(*flags, "--train.exit_step", exit_step, ranks=ranks)
    differences = [abs(a - b) for a, b in zip(values(workplace / "run"), values(run), strict=True)]
    assert max(differences) < LAYOUT_TOLERANCE
    assert values(workplace / "run", "learning_rate") == values(run, "learning_rate")


def test_metrics_are_cut_back_to_the_checkpoint(run: Path, workplace: Path) -> None:
    """As a kill after step 6 leaves it that lost the last checkpoint: later lines, the last one torn."""
    shutil.copytree(run, "run")
    shutil.rmtree("run/checkpoints/step_00000006")
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 9.0}\n{"step": 8, "lo')
    train("--train.evaluate_every", 3)
    assert_same_run(workplace / "run", run)
    assert values(workplace / "run", "valid_loss") == values(run, "valid_loss")


def at_step(number: int, action: Callable[[], object]) -> Callable[[int], None]:
    """A change for rank 1, or the only one: `action` during the training step of that number."""

    def change(rank: int) -> None:
        if rank != int(os.environ.get("WORLD_SIZE", 1)) - 1:
            return
        original, seen = TrainStep.run, []

        def run_step(*arguments):
            seen.append(None)
            if len(seen) == number:
                action()
            return original(*arguments)

        TrainStep.run = run_step

    return change


def test_a_kill_between_checkpoints_loses_nothing(run: Path, workplace: Path) -> None:
    with pytest.raises(AssertionError, match="exit code -9"):
        train(*SAVES, "--checkpoint.asynchronous", "false", change=at_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert steps_in(workplace / "run") == [2]
    train()
    assert_same_run(workplace / "run", run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_and_saves(number: signal.Signals, workplace: Path) -> None:
    long = ["--config", "config.toml", "--train.steps", 9]
    succeed("train", *long, "--log.directory", "undisturbed", ranks=2)
    ended = start("train", *long, ranks=2, change=at_step(3, lambda: os.kill(os.getpid(), number)))
    assert [rank.code for rank in ended] == [75, 75] and not ended[0].err + ended[1].err
    (stopped_at,) = steps_in(workplace / "run")
    assert 3 <= stopped_at < 9 and f"asked to stop after step {stopped_at}" in ended[0].out
    assert list(records(workplace / "run")) == list(range(1, stopped_at + 1))
    succeed("train", *long, ranks=2)
    assert_same_run(workplace / "run", workplace / "undisturbed", last_step=9)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_control_c_ends_without_a_stack(workplace: Path) -> None:
    (ended,) = start("train", "--config", "config.toml", change=at_step(3, interrupt))
    assert ended.code == 130 and ended.err == ""


def test_exit_step_keeps_the_schedule(run: Path, workplace: Path) -> None:
    train("--train.exit_step", 3)
    assert values(workplace / "run") == values(run)[:3]
    assert values(workplace / "run", "learning_rate") == values(run, "learning_rate")[:3]
    train("--train.exit_step", 3)  # again: nothing to do
    assert steps_in(workplace / "run") == [3] and len(records(workplace / "run")) == 3


def test_tokens_instead_of_steps(workplace: Path) -> None:
    train("--train.tokens", 3 * TOKENS_PER_STEP - 1)
    assert values(workplace / "run", "tokens") == [TOKENS_PER_STEP * step for step in (1, 2, 3)]


def test_where_a_run_starts(run: Path, workplace: Path) -> None:
    """`checkpoint.load`: a step directory, a run directory, none."""
    middle = run / "checkpoints/step_00000004"
    train("--log.directory", "a", "--checkpoint.load", middle)
    assert values(workplace / "a") == values(run)[4:]
    train("--log.directory", "b", "--checkpoint.load", run, "--train.steps", 7)
    assert list(records(workplace / "b")) == [7]
    train("--log.directory", "c", "--checkpoint.load", "none", "--train.exit_step", 1)
    assert values(workplace / "c") == values(run)[:1]


def test_other_data_on_resume_is_said(run: Path, workplace: Path) -> None:
    (workplace / "moved").mkdir()
    for suffix in (".bin", ".idx"):
        (workplace / f"train{suffix}").rename(workplace / f"moved/text{suffix}")
    flags = ["--checkpoint.load", run / "checkpoints/step_00000004", "--train.exit_step", 5]
    assert "warning" not in train(*flags, "--data.train", "moved/text", "--log.directory", "a")  # the same, elsewhere
    assert values(workplace / "a") == values(run)[4:5]
    changed = [*flags, "--data.train", "moved/text", "--data.seed", 5, "--log.directory", "b"]
    ended = start("train", "--config", "config.toml", *changed, ranks=2)
    assert [rank.code for rank in ended] == [78, 78]
    said = "".join(rank.err for rank in ended)
    assert said.count("\n") == 1 and "data.seed 1234 in the checkpoint, now 5" in said and "--data.allow_changed true" in said
    out = train(*changed, "--data.allow_changed", "true", ranks=2)
    assert out.count("now 5: read as a new source, from its beginning") == 1


def fail_writing(rank: int) -> None:
    def write(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        save.write_safetensors = write


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_save_that_fails_on_one_rank_is_said_once(asynchronous: str, workplace: Path) -> None:
    flags = ("--checkpoint.failures_allowed", 0, "--checkpoint.asynchronous", asynchronous, "--train.global_batch_size", 6)
    ended = start("train", "--config", "config.toml", *flags, *SAVES, ranks=3, change=fail_writing)
    said = "".join(rank.err for rank in ended)
    assert [rank.code for rank in ended] == [78, 78, 78] and said.count("\n") == 1
    assert said.startswith("error (rank 1): checkpoint run/checkpoints/step_00000002") and "No space left" in said
    assert steps_in(workplace / "run") == []


def test_keep_leaves_the_newest(workplace: Path) -> None:
    train("--checkpoint.save_every", 1, "--checkpoint.keep", 2, "--checkpoint.directory", "elsewhere/states")
    assert committed_steps(workplace / "elsewhere/states") == [5, 6] and not (workplace / "run/checkpoints").exists()


def test_position_and_settings_are_in_the_checkpoint(run: Path) -> None:
    state = read_manifest(run / "checkpoints/step_00000004").state
    samples = {"samples": 4 * BATCH_SIZE, "skipped_samples": []}
    assert state["position"] == {"step": 4, "tokens": 4 * TOKENS_PER_STEP, **samples}
    assert state["config"]["model"]["hidden_size"] == 32 and state["optimizer_steps"] == 4
    assert state["code"].startswith(megatron_llama.__version__)


# print and help


def test_print_config_feeds_back(workplace: Path) -> None:
    data = '[{prefix = "a \\"b", weight = 0.5}]'
    flags = ["--config", "config.toml", "--data.train", data, "--parallel.layers_per_stage", "[1]"]
    ended = start("train", *flags, "--print-config", ranks=2)
    assert [rank.code for rank in ended] == [0, 0] and ended[1].out == ""
    (workplace / "printed.toml").write_text(ended[0].out)
    assert load_config(["--config", "printed.toml"]) == load_config(flags)
    assert succeed("train", "--config", "printed.toml", "--print-config") == ended[0].out
    assert not (workplace / "run").exists()


@pytest.mark.parametrize("program", ["train", "evaluate", "generate"])
def test_help_is_printed_once(program: str, workplace: Path) -> None:
    ended = start(program, "--help", ranks=2)
    assert [rank.code for rank in ended] == [0, 0] and ended[1].out == ended[0].err == ended[1].err == ""
    assert ended[0].out.startswith(f"usage: python -m megatron_llama.{program} ")


def test_help_names_every_field_once() -> None:
    text = help_text()
    fields = [f"  --{section}.{name} " for section, items in SECTIONS.items() for name in items]
    assert len(fields) > 60 and [field for field in fields if text.count(field) != 1] == []


# under the real launcher


def torchrun(*argv: object) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "megatron_llama.train", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_torchrun(run: Path, workplace: Path) -> None:
    result = torchrun("--config", "config.toml", "--parallel.pp", 2, "--train.exit_step", 2)
    assert result.returncode == 0, result.stderr
    assert values(workplace / "run")[0] == values(run)[0]  # a pipeline computes the first loss bit for bit
    assert steps_in(workplace / "run") == [2]


def test_torchrun_with_a_mistake(workplace: Path) -> None:
    result = torchrun("--config", "config.toml", "--parallel.tp", 3)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "parallel.tp" in errors[0]
    assert "megatron_llama/" not in result.stderr  # torchrun shows its own stack, there is none of ours


def test_a_complete_run_that_is_started_again_has_nothing_to_do(run: Path, workplace: Path) -> None:
    """A job that is submitted once more must not look failed, and must not touch the run."""
    shutil.copytree(run, "again")
    said = train("--log.directory", "again", ranks=2)
    assert "step 6 of 6: this run is complete; raise --train.steps to go on" in said
    assert (Path("again") / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert steps_in(Path("again")) == steps_in(run)


def test_each_step_is_timed_by_itself(workplace: Path) -> None:
    """A step's numbers are read one step late; its time must be its own all the same, at the end and around saving too."""
    pause_seconds = 0.05

    def slow_steps(rank: int) -> None:
        original = TrainStep.run

        def run_step(self, *arguments):
            time.sleep(pause_seconds)
            return original(self, *arguments)

        TrainStep.run = run_step

    train("--log.directory", "slow", "--checkpoint.save_every", 4, change=slow_steps)
    seconds = values(Path("slow"), "step_seconds")
    assert len(seconds) == STEPS and min(seconds) >= pause_seconds


def test_a_rank_that_dies_is_missed_by_name_of_the_call(workplace: Path) -> None:
    """The others say in one line what they were at, and end with a code that asks for a restart."""

    def die_in_the_third_step(rank: int) -> None:
        steps, run = [], TrainStep.run

        def run_or_die(self, *arguments):
            steps.append(1)
            if rank == 1 and len(steps) == 3:
                raise RuntimeError("planted")
            return run(self, *arguments)

        TrainStep.run = run_or_die

    ended = start("train", "--config", "config.toml", ranks=2, change=die_in_the_third_step)
    assert ended[1].code == 1 and "planted" in ended[1].err
    assert ended[0].code == 69 and "Traceback" not in ended[0].err
    said = r"error: rank 0 has lost another rank in \w+ over \w+ .*, or before it: .*\n"
    assert re.fullmatch(said, ended[0].err), ended[0].err
