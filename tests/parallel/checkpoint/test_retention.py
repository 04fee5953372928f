"""Which steps stay, which go, and what is put aside."""

import os

import pytest
import torch

from parallel.checkpoint import SingleProcess, committed_steps, resolve_checkpoint, save_checkpoint, step_directory
from parallel.checkpoint.manifest import DamagedError
from parallel.checkpoint.recovery import confirm_damage, newest_good_step, quarantine, quarantined_steps
from parallel.checkpoint.retention import mark_verified, newest_verified_step, removable_steps, remove_old_steps, verified_time
from parallel.errors import CheckpointError
from parallel.shards import Box, TensorBox


@pytest.fixture
def root(tmp_path):
    """Steps 10, 20, ..., 80."""
    for step in range(10, 90, 10):
        save_one(tmp_path, step)
    return tmp_path


def save_one(root, step, **options):
    boxes = [TensorBox("w", (9,), Box((0,), (9,)), torch.full((9,), float(step)))]
    return save_checkpoint(root, step, {"weights": boxes}, {}, world=SingleProcess(), **options)


def test_the_newest_stay_and_those_of_every_so_many_steps_and_the_last_verified_one(root):
    mark_verified(step_directory(root, 10))
    mark_verified(step_directory(root, 50))
    assert newest_verified_step(root) == 50
    assert removable_steps(root, 0, 30) == [] and removable_steps(root, 8) == []
    assert removable_steps(root, 2) == [10, 20, 30, 40, 60]
    assert removable_steps(root, 2, keep_every=30) == [10, 20, 40]
    remove_old_steps(root, 80, 2, keep_every=30)
    assert committed_steps(root) == [30, 50, 60, 70, 80]
    remove_old_steps(root, 30, 1)  # the one just saved counts as the newest
    assert committed_steps(root) == [30, 50]
    assert sorted(os.listdir(root)) == ["step_00000030", "step_00000050"]


def test_a_save_removes_what_may_go(root):
    mark_verified(step_directory(root, 20))
    save_one(root, 90, keep=3, keep_every=40)
    assert committed_steps(root) == [20, 40, 70, 80, 90]


def test_a_note_counts_for_the_manifest_that_it_was_made_for(root):
    directory = step_directory(root, 30)
    assert verified_time(directory) is None
    mark_verified(directory)
    assert verified_time(directory).endswith("+00:00")
    (step_directory(root, 40) / "VERIFIED").write_bytes((directory / "VERIFIED").read_bytes())
    (step_directory(root, 50) / "VERIFIED").write_bytes(b"\xff")
    (step_directory(root, 60) / "VERIFIED").write_text("[" * 10**5)
    assert newest_verified_step(root) == 30
    os.chmod(directory, 0o755)
    resolve_checkpoint(directory)  # it is no part of the checkpoint


def test_damaged_steps_are_put_aside_and_named(root):
    (step_directory(root, 80) / "COMMIT").unlink()
    os.truncate(step_directory(root, 70) / "weights-00000.safetensors", 20)
    good, damaged = newest_good_step(root)
    assert good == step_directory(root, 60)
    assert [(path.name, error.file) for path, error in damaged] == [
        ("step_00000080", "COMMIT"),
        ("step_00000070", "weights-00000.safetensors"),
    ]
    for path, error in damaged:
        quarantine(path, error)
    assert newest_good_step(root) == (good, [])
    listed = quarantined_steps(root)
    assert [path.name.partition(".bad-")[0] for path in listed] == ["step_00000070", "step_00000080"]
    assert "weights-00000.safetensors has 20 bytes" in list(listed.values())[0]
    save_one(root, 80, keep=1)
    assert committed_steps(root) == [80] and len(quarantined_steps(root)) == 2, "what was put aside is never removed"


def test_no_step_at_all_is_a_new_start_and_damage_is_not(tmp_path):
    assert newest_good_step(tmp_path / "none") == (None, [])
    directory = save_one(tmp_path, 10)
    (directory / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint is left.*manifest.json cannot be read"):
        newest_good_step(tmp_path)
    quarantine(directory, DamagedError("its manifest is gone", "manifest.json"))
    with pytest.raises(CheckpointError, match="step_00000010.bad-.*, put aside: its manifest is gone"):
        newest_good_step(tmp_path)


def test_a_step_of_a_newer_version_is_no_damage(root, monkeypatch):
    monkeypatch.setattr("parallel.checkpoint.manifest.VERSION", 2)
    save_one(root, 90)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 2.*this program reads") as caught:
        newest_good_step(root)
    assert not isinstance(caught.value, DamagedError)


def test_damage_is_confirmed_before_a_step_is_put_aside(root):
    directory, name = step_directory(root, 80), "weights-00000.safetensors"
    error = DamagedError(f"{name}, block 0 is damaged (found by rank 3)", name, 0)
    with pytest.raises(CheckpointError, match="found by rank 3.; rank 0 reads weights-00000.safetensors without a fault"):
        confirm_damage(directory, error)
    data = bytearray((directory / name).read_bytes())
    data[-1] ^= 1
    (directory / name).write_bytes(data)
    confirm_damage(directory, error)
