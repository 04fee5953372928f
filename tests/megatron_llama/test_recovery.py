"""A run goes on from its newest good checkpoint, puts damaged ones aside, and starts from other weights where it is told to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from parallel.checkpoint import SingleProcess, save_checkpoint
from parallel.checkpoint.manifest import read_manifest
from parallel.checkpoint.recovery import REASON_NAME
from parallel.checkpoint.retention import verified_time
from parallel.checkpoint.steps import committed_steps
from parallel.shards import Box, TensorBox
from tests.megatron_llama.programs import full_weights, records, start, succeed, values

CONFIG = ("--config", "config.toml")
EVERY = ("--checkpoint.save_every", 2, "--checkpoint.keep", 0)
LOSS_TOLERANCE = 1e-5  # nats; see test_train.py


def flip(path: Path, position: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def root(run: Path, workplace: Path) -> Path:
    """The checkpoints of steps 2, 4 and 6 of the undisturbed run, in the folder of the run that is about to start."""
    return Path(shutil.copytree(run / "checkpoints", "run/checkpoints"))


def put_aside(root: Path) -> list[str]:
    return sorted(path.name.partition(".bad-")[0] for path in root.iterdir() if ".bad-" in path.name)


DAMAGES = {
    "a byte of the weights": lambda step: flip(step / "weights-00000.safetensors"),
    "a byte of the optimizer": lambda step: flip(step / "optimizer-00000.safetensors"),
    "a byte of the manifest": lambda step: flip(step / "manifest.json"),
    "no COMMIT": lambda step: (step / "COMMIT").unlink(),
    "a truncated file": lambda step: os.truncate(step / "optimizer-00000.safetensors", 100),
    "no tokenizer": lambda step: (step / "tokenizer.model").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_step_is_put_aside_and_the_one_before_taken(damage: str, ranks: int, root: Path, run: Path) -> None:
    DAMAGES[damage](root / "step_00000006")
    if ranks == 2:  # two in a row
        DAMAGES[damage](root / "step_00000004")
    out = succeed("train", *CONFIG, *EVERY, ranks=ranks)
    bad = ["step_00000004", "step_00000006"][2 - ranks :]
    assert put_aside(root) == bad and out.count("DAMAGED CHECKPOINT") == len(bad)
    for step in bad:
        assert any(step in line and "DAMAGED" in line for line in out.splitlines())
    if "byte of the weights" in damage:
        assert "weights-00000.safetensors, block 0 " in out
    assert f"starting at step {6 - 2 * len(bad)}" in out
    assert committed_steps(root) == [2, 4, 6], "the steps are saved again"
    assert values(Path("run")) == pytest.approx(values(run)[6 - 2 * len(bad) :], abs=LOSS_TOLERANCE)
    whole, expected = full_weights(root / "step_00000006"), full_weights(run / "checkpoints/step_00000006")
    assert all(torch.allclose(whole[name], expected[name], atol=1e-5) for name in expected)


def test_data_goes_on_as_the_older_checkpoint_has_it(root: Path) -> None:
    """The data was changed at step 4; going on from step 2, it changes there."""
    shutil.rmtree(root / "step_00000006")
    changed = (*CONFIG, *EVERY, "--data.seed", 5, "--data.allow_changed", "true")
    succeed("train", *changed)
    succeed("train", *changed, "--checkpoint.load", root / "step_00000002", "--log.directory", "other")
    for step in (4, 6):
        flip(root / f"step_{step:08d}/weights-00000.safetensors")  # found while loading, when the data has been opened
    out = succeed("train", *changed)
    assert "starting at step 2" in out and put_aside(root) == ["step_00000004", "step_00000006"]
    assert values(Path("run")) == values(Path("other"))
    stored = [read_manifest(Path(name, "checkpoints/step_00000006")).state["dataset"] for name in ("run", "other")]
    assert stored[0] == stored[1]


def test_nothing_good_left_is_an_error_that_lists_what_was_found(root: Path) -> None:
    flip(root / "step_00000006/optimizer-00000.safetensors")
    flip(root / "step_00000004/weights-00000.safetensors")
    shutil.rmtree(root / "step_00000002")
    for _ in range(2):  # the second time, both have been put aside: it is no new start either
        ended = start("train", *CONFIG, ranks=2)
        said = "".join(rank.err for rank in ended)
        assert [rank.code for rank in ended] == [78, 78] and said.count("\n") == 1
        assert "no good checkpoint is left" in said
        assert "optimizer-00000.safetensors, block 0 " in said and "weights-00000.safetensors, block 0 " in said
    assert put_aside(root) == ["step_00000004", "step_00000006"]
    assert all((path / REASON_NAME).exists() for path in root.iterdir())


def test_a_named_checkpoint_is_never_replaced_by_another(root: Path) -> None:
    flip(root / "step_00000006/weights-00000.safetensors")
    for path in (root / "step_00000006", root, "run"):
        ended = start("train", *CONFIG, "--checkpoint.load", path, "--log.directory", "other", ranks=2)
        said = "".join(rank.err for rank in ended)
        assert [rank.code for rank in ended] == [78, 78] and said.count("\n") == 1
        assert "weights-00000.safetensors, block 0 " in said
    assert put_aside(root) == []


def bad_memory(rank: int) -> None:
    """The second rank sees a flipped bit that is on no disk."""
    preadv = os.preadv

    def reading(descriptor, buffers, position):
        count = preadv(descriptor, buffers, position)
        buffers[0][count // 2] ^= 1
        return count

    if rank == 1:
        os.preadv = reading


def test_what_one_node_alone_finds_condemns_no_checkpoint(root: Path) -> None:
    ended = start("train", *CONFIG, ranks=2, change=bad_memory)
    said = "".join(rank.err for rank in ended)
    assert [rank.code for rank in ended] == [78, 78] and said.count("\n") == 1
    assert "found by rank 1" in said and "rank 0 reads" in said and "left where it is" in said
    assert committed_steps(root) == [2, 4, 6] and put_aside(root) == []


def lose_rights(rank: int) -> None:
    def reading(*_):
        raise PermissionError(13, "Permission denied")

    if rank == 1:
        os.preadv = reading


def test_a_rank_that_cannot_read_is_named_by_all(root: Path) -> None:
    ended = start("train", *CONFIG, ranks=2, change=lose_rights)
    said = "".join(rank.err for rank in ended)
    assert [rank.code for rank in ended] == [78, 78] and said.count("\n") == 1
    assert "Permission denied (found by rank 1)" in said
    assert put_aside(root) == []


def test_the_step_that_was_loaded_is_marked_and_kept(root: Path) -> None:
    succeed("train", *CONFIG, "--train.steps", 9, "--checkpoint.save_every", 1, "--checkpoint.keep", 2)
    assert verified_time(root / "step_00000006") and committed_steps(root) == [6, 8, 9]


START_LAYOUTS = {
    "tp2-pp2": (4, ["--parallel.tp", 2, "--parallel.pp", 2]),
    "bf16": (1, ["--train.dtype", "bf16"]),
    "zero stage 0": (2, ["--zero.stage", 0]),
}


@pytest.mark.parametrize("layout", START_LAYOUTS)
def test_weights_of_bf16_start_runs_of_any_layout(layout: str, run: Path, workplace: Path) -> None:
    """As a converted checkpoint has them: no optimizer, and bf16, which the fp32 masters take exactly."""
    source = full_weights(run / "checkpoints/step_00000006")
    rounded = {name: tensor.bfloat16() for name, tensor in source.items()}
    boxes = [TensorBox(name, tuple(t.shape), Box.whole(tuple(t.shape)), t) for name, t in rounded.items()]
    state = read_manifest(run / "checkpoints/step_00000006").state
    save_checkpoint(Path("converted"), 0, {"weights": boxes}, state, world=SingleProcess())
    ranks, flags = START_LAYOUTS[layout]
    flags = ["--checkpoint.weights_from", "converted", "--optimizer.learning_rate", 1e-30, "--train.exit_step", 1, *flags]
    succeed("train", *CONFIG, *flags, ranks=ranks)
    new = full_weights(Path("run/checkpoints/step_00000001"))
    assert all(torch.equal(new[name], rounded[name].float()) for name in source)


def test_a_new_run_starts_from_the_weights_of_another(run: Path, workplace: Path) -> None:
    source = run / "checkpoints/step_00000006"
    weights = shutil.copytree(source, "weights-only")
    for path in Path(weights).glob("optimizer-*"):
        path.unlink()
    flags = ("--checkpoint.weights_from", "weights-only", "--optimizer.learning_rate", 1e-30)  # (it moves no weight)
    out = succeed("train", *CONFIG, *flags, "--train.exit_step", 2, *EVERY, ranks=2)
    assert "weights from weights-only" in out and "starting at step 0" in out
    new, old = full_weights(Path("run/checkpoints/step_00000002")), full_weights(source)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert list(records(Path("run"))) == [1, 2]
    out = succeed("train", *CONFIG, *flags, "--train.exit_step", 3, *EVERY)  # again: its own checkpoint comes first
    assert "weights from" not in out and "starting at step 2" in out


def test_weights_that_cannot_be_started_from(run: Path, workplace: Path) -> None:
    for flags, texts in (
        (["elsewhere"], ["elsewhere does not exist"]),
        ([run, "--model.ffn_hidden_size", 64], ["another model: model.ffn_hidden_size = 48", "--checkpoint.weights_from"]),
        ([run, "--checkpoint.load", run], ["checkpoint.weights_from", "checkpoint.load", "--checkpoint.load auto"]),
    ):
        ended = start("train", *CONFIG, "--checkpoint.weights_from", *flags, "--log.directory", "other", ranks=2)
        said = "".join(rank.err for rank in ended)
        assert [rank.code for rank in ended] == [78, 78] and said.count("\n") == 1, said
        assert all(text in said for text in texts), said
