"""A save either appears whole, durably and at once, or not at all, and every rank knows which."""

import errno
import itertools
import os
import random
import resource
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.checkpoint import (
    SingleProcess,
    committed_steps,
    load_tensors,
    newest_checkpoint,
    resolve_checkpoint,
    retention,
    save,
    save_checkpoint,
    verify_checkpoint,
)
from parallel.checkpoint.manifest import FileInfo, Manifest, StoredBox, TensorInfo, find_overlap
from parallel.errors import CheckpointError
from parallel.shards import Box, TensorBox

LAYOUT = (2, 1, 1)


def box_of(name, tensor, offset=None, shape=None):
    shape = shape or tuple(tensor.shape)
    return TensorBox(name, shape, Box(offset or (0,) * tensor.dim(), tuple(tensor.shape)), tensor)


def save_one(root, step, **options):
    return save_checkpoint(root, step, {"weights": [box_of("w", torch.full((9,), step))]}, {}, world=SingleProcess(), **options)


# Order on disk


def test_files_are_durable_before_the_rename_and_the_rename_before_the_return(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(("fsync", path, os.fstat(descriptor).st_size if os.path.isfile(path) else sorted(os.listdir(path))))
        fsync(descriptor)

    def recorded_rename(source, target):
        events.append(("rename", str(source), str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    groups = {"weights": [box_of("w", torch.ones(9))], "optimizer": [box_of("m.w", torch.ones(9))]}
    root = tmp_path / "checkpoints"
    directory = save_checkpoint(root, 1, groups, {}, world=SingleProcess(), extra_files={"tokenizer.model": b"abc"})
    names = {path.name: path.stat().st_size for path in directory.iterdir()}
    at = next(index for index, event in enumerate(events) if event[0] == "rename")
    temporary = events[at][1]
    files = [(os.path.basename(path), size) for _, path, size in events[:at] if os.path.dirname(path) == temporary]
    assert dict(files) == names and len(files) == len(names) == 5
    assert files[-1][0] == "COMMIT" and files[-2][0] == "manifest.json"
    assert events[0][:2] == ("fsync", str(tmp_path))  # the new root itself
    assert events[at - 1] == ("fsync", temporary, sorted(names))  # the directory, when it was complete
    assert events[at] == ("rename", temporary, str(directory))
    assert events[at + 1][:2] == ("fsync", str(root)) and directory.name in events[at + 1][2]
    assert len(events) == at + 2


# Failures


def fail(error_number):
    def failing(*_):
        raise OSError(error_number, os.strerror(error_number))

    return failing


def fail_fsync_of(name):
    real = os.fsync

    def failing(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.basename(path).startswith(name) and TEMPORARY not in os.path.basename(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    return failing


TEMPORARY = ".tmp-"
def limit_files(size):
    """Writing past `size` bytes fails in this process, after a short write, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


LARGEST = "step_00000001/optimizer-00001.safetensors"  # of the step saved before, in the same layout
FAILURES = {  # the rank, what it patches before it saves
    "no space in mid-file, rank 1": (1, lambda: limit_files(20_000)),
    "no space in mid-file, rank 0": (0, lambda: limit_files(20_000)),
    "no space for the last bytes, rank 1": (1, lambda: limit_files(os.path.getsize(LARGEST) - 10)),
    "fsync of a data file, rank 1": (1, lambda: setattr(os, "fsync", fail_fsync_of("weights"))),
    "fsync of the manifest": (0, lambda: setattr(os, "fsync", fail_fsync_of("manifest.json"))),
    "fsync of COMMIT": (0, lambda: setattr(os, "fsync", fail_fsync_of("COMMIT"))),
    "rename": (0, lambda: setattr(os, "rename", fail(errno.ENOSPC))),
    "fsync of the root after the rename": (0, lambda: setattr(os, "fsync", fail_fsync_of("root"))),
    "making the directory": (0, lambda: setattr(save, "prepare", fail(errno.EROFS))),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_on_one_rank_is_known_to_all_and_publishes_nothing(tmp_path, model, failure):
    failing_rank, patch = FAILURES[failure]
    root = tmp_path / "root"
    first = model.save_layout(root, 1, LAYOUT)

    def body(voter):
        os.chdir(root)  # of this fork alone
        if voter.rank == failing_rank:
            patch()
        message = None
        try:
            save_checkpoint(root, 2, model.RankState(LAYOUT, voter.rank, True).groups(), {}, world=voter)
        except CheckpointError as error:
            message = str(error)
        assert message, "no CheckpointError"
        assert "nothing was published" in message and "step_00000002" in message
        assert ("another rank" in message) == (voter.rank != failing_rank), message
        if voter.rank in (0, failing_rank):  # rank 0 tells what the other one has left
            assert "Errno" in message and f"rank {failing_rank}" in message

    assert model.run_ranks(2, body, tmp_path) == [(0, "")] * 2
    assert os.listdir(root) == [first.name]
    verify_checkpoint(newest_checkpoint(root))
    model.save_layout(root, 2, LAYOUT)  # the same step can be saved afterwards
    assert committed_steps(root) == [1, 2]


def kill_at(module, name, before=True, matching=""):
    """Replace module.name by one that kills this process before or after the first call whose arguments match."""
    real = getattr(module, name)

    def killing(*arguments, **options):
        target = f"/proc/self/fd/{arguments[0]}" if name == "fsync" else None
        matches = matching in (os.readlink(target) if target else str(arguments))
        if matches and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if matches:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, killing)


KILLS = {  # rank, what it patches, the newest step afterwards
    "before the directory is made": (0, lambda: kill_at(save, "prepare"), 1),
    "before writing": (1, lambda: kill_at(save, "write_part"), 1),
    "before fsync of data": (1, lambda: kill_at(os, "fsync", matching="optimizer-"), 1),
    "after writing, before the vote": (1, lambda: kill_at(save, "write_part", before=False), 1),
    "rank 0 after writing": (0, lambda: kill_at(save, "write_part", before=False), 1),
    "rank 0 before COMMIT": (0, lambda: kill_at(save, "write_durably", matching="COMMIT"), 1),
    "rank 0 after COMMIT, before the rename": (0, lambda: kill_at(os, "rename"), 1),
    "rank 0 after the rename": (0, lambda: kill_at(os, "rename", before=False), 2),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_rank_killed_in_a_save_leaves_a_usable_newest_step(tmp_path, model, moment):
    killed_rank, patch, newest = KILLS[moment]
    root = tmp_path / "root"
    model.save_layout(root, 1, LAYOUT)

    def body(voter):
        if voter.rank == killed_rank:
            patch()
        save_checkpoint(root, 2, model.RankState(LAYOUT, voter.rank, True).groups(), {"step": 2}, world=voter)

    outcomes = model.run_ranks(2, body, tmp_path)
    assert outcomes[killed_rank][0] == -signal.SIGKILL
    assert outcomes[1 - killed_rank][0] == 1, "the survivor must fail, not hang or succeed"
    assert committed_steps(root) == list(range(1, newest + 1))
    loaded = model.RankState((1, 1, 1), 0, filled=False)
    manifest = load_tensors(newest_checkpoint(root), loaded.targets())
    assert manifest.step == newest and loaded.equals(model.RankState((1, 1, 1), 0, filled=True))
    if newest == 1:
        model.save_layout(root, 2, LAYOUT)  # what the dead save left is swept
    assert sorted(os.listdir(root)) == ["step_00000001", "step_00000002"]


def test_an_existing_step_is_left_alone(tmp_path):
    directory = save_one(tmp_path, 5)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()}
    with pytest.raises(CheckpointError, match="step_00000005 is already committed"):
        save_one(tmp_path, 5)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()} == before
    (directory / "COMMIT").unlink()
    with pytest.raises(CheckpointError, match="without COMMIT"):
        save_one(tmp_path, 5)
    assert os.listdir(tmp_path) == ["step_00000005"] and not (directory / "COMMIT").exists()


def test_a_defect_in_the_caller_reaches_every_rank_and_keeps_its_type(tmp_path, model):
    def boxes(rank):
        yield box_of("w", torch.ones(4, 2), (4 * rank, 0), (8, 2))
        if rank == 1:
            raise ZeroDivisionError("a defect")

    outcomes = model.run_threads(
        2, lambda voter: save_checkpoint(tmp_path, 1, {"weights": boxes(voter.rank)}, {}, world=voter)
    )
    assert isinstance(outcomes[1], ZeroDivisionError)
    assert isinstance(outcomes[0], CheckpointError) and "another rank" in str(outcomes[0])
    assert os.listdir(tmp_path) == []


HALF = torch.ones(4, 2)
BAD_BOXES = {  # what ranks 0 and 1 write of an [8, 2] tensor, and rank 0's message
    "overlap": ([box_of("w", HALF, (0, 0), (8, 2))], [box_of("w", HALF, (3, 0), (8, 2))], "overlap.*-00000.*-00001"),
    "hole": ([box_of("w", HALF, (0, 0), (8, 2))], [], r"boxes of w \[8, 2\] cover 8 of its 16 elements"),
    "replica": ([box_of("w", torch.ones(8, 2))], [box_of("w", torch.ones(8, 2))], "overlap"),
    "shape": ([box_of("w", HALF, (0, 0), (8, 2))], [box_of("w", HALF, (4, 0), (9, 2))], r"part of rank 1.*\[9, 2\].*\[8, 2\]"),
    "dtype": ([box_of("w", HALF, (0, 0), (8, 2))], [box_of("w", HALF.half(), (4, 0), (8, 2))], "float16.*float32"),
    "outside": ([box_of("w", HALF, (0, 0), (8, 2))], [box_of("w", HALF, (6, 0), (8, 2))], "does not lie in w"),
    "name": ([box_of("w w", torch.ones(3))], [], "name of a tensor"),
}


@pytest.mark.parametrize("case", BAD_BOXES)
def test_boxes_that_do_not_tile_a_tensor_are_refused_at_the_save(tmp_path, model, case):
    *given_boxes, text = BAD_BOXES[case]
    outcomes = model.run_threads(
        2, lambda voter: save_checkpoint(tmp_path, 1, {"weights": given_boxes[voter.rank]}, {}, world=voter)
    )
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    with pytest.raises(CheckpointError, match=text):
        raise outcomes[0]
    assert "another rank" in str(outcomes[1]) and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("groups", "state", "extra", "text"),
    [
        ({"weights": [box_of("w", torch.ones(2))] * 2}, {}, {}, "two boxes of w start at"),
        ({"a": [box_of("w", torch.ones(2))], "b": [box_of("w", torch.ones(2))]}, {}, {}, "in group b, elsewhere"),
        ({"../a": [box_of("w", torch.ones(2))]}, {}, {}, "name of a group"),
        ({"weights": [box_of("w", torch.ones(2, dtype=torch.complex64))]}, {}, {}, "complex64 has no stored form"),
        ({"weights": []}, {"loss": float("nan")}, {}, "JSON"),
        ({"weights": []}, {"tensor": torch.ones(1)}, {}, "JSON"),
        ({"weights": []}, {}, {"../x": b""}, "name of an extra file"),
        ({"weights": []}, {}, {"manifest.json": b""}, "name of an extra file"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, groups, state, extra, text):
    with pytest.raises(CheckpointError, match=text):
        save_checkpoint(tmp_path, 1, groups, state, world=SingleProcess(), extra_files=extra)
    assert os.listdir(tmp_path) == []


# Steps on disk


def test_only_temporary_directories_of_the_same_step_are_swept(tmp_path):
    for name in ("step_00000001.tmp-aa", "step_00000002.tmp-bb", "step_00000002.bad-cc", "step_000000020.tmp-dd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "COMMIT").touch()
    assert committed_steps(tmp_path) == [] and newest_checkpoint(tmp_path) is None
    save_one(tmp_path, 2)
    left = ["step_00000001.tmp-aa", "step_00000002", "step_00000002.bad-cc", "step_000000020.tmp-dd"]
    assert sorted(os.listdir(tmp_path)) == left
    assert committed_steps(tmp_path) == [2]


def test_keep_leaves_the_newest_and_always_the_one_just_saved(tmp_path):
    for step in (1, 2, 3, 10):
        save_one(tmp_path, step)
    assert committed_steps(tmp_path) == [1, 2, 3, 10]
    save_one(tmp_path, 11, keep=3)
    assert committed_steps(tmp_path) == [3, 10, 11]
    (tmp_path / "step_00000002.tmp-removed-ab").mkdir()  # of a removal that was interrupted
    save_one(tmp_path, 5, keep=2)  # after going back to an earlier step
    assert sorted(os.listdir(tmp_path)) == ["step_00000005", "step_00000011"]
    save_one(tmp_path, 6, keep=1)
    assert os.listdir(tmp_path) == ["step_00000006"]


def test_a_failed_removal_is_a_warning_since_the_new_step_is_safe(tmp_path, monkeypatch):
    save_one(tmp_path, 1)
    monkeypatch.setattr(retention.shutil, "rmtree", fail(errno.EACCES))
    with pytest.warns(RuntimeWarning, match="could not be removed"):
        save_one(tmp_path, 2, keep=1)
    assert committed_steps(tmp_path) == [2]


def test_resolve_accepts_a_step_a_root_and_a_run_directory(tmp_path, monkeypatch):
    root = tmp_path / "run" / "checkpoints"
    save_one(root, 1)
    newest = save_one(root, 2)
    assert resolve_checkpoint(newest) == newest
    assert resolve_checkpoint(root) == resolve_checkpoint(tmp_path / "run") == newest
    assert resolve_checkpoint(root / "step_00000001").name == "step_00000001"
    monkeypatch.chdir(newest)
    assert resolve_checkpoint(".").resolve() == newest


def test_resolve_says_what_it_looked_for_and_what_it_found(tmp_path):
    (tmp_path / "model.bin").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "step_00000003.tmp-abc").mkdir()
    (tmp_path / "step_00000004").mkdir()
    for name, text in {
        "nowhere": "does not exist: looked for a step directory",
        "model.bin": "is a file: looked for",
        "empty": r"no checkpoint in .*empty: looked for .*step_\*.*; found it empty",
        "step_00000003.tmp-abc": "a save that did not finish",
        "step_00000004": "step_00000004: manifest.json cannot be read",
    }.items():
        with pytest.raises(CheckpointError, match=text):
            resolve_checkpoint(tmp_path / name)
    (tmp_path / "step_00000004").rmdir()
    with pytest.raises(CheckpointError, match=r"found empty, model.bin, step_00000003.tmp-abc"):
        resolve_checkpoint(tmp_path)


# The cover check


@st.composite
def some_boxes(draw):
    dims = draw(st.integers(0, 3))
    boxes = []
    for _ in range(draw(st.integers(0, 6))):
        offset = tuple(draw(st.integers(0, 5)) for _ in range(dims))
        boxes.append(Box(offset, tuple(draw(st.integers(1, 4)) for _ in range(dims))))
    return boxes


@settings(max_examples=400)
@given(some_boxes())
def test_find_overlap_agrees_with_all_pairs(boxes):
    meet = any(a.intersect(b) for a, b in itertools.combinations(boxes, 2))
    found = find_overlap(boxes)
    assert (found is not None) == meet
    assert found is None or found[0].intersect(found[1])


@settings(max_examples=60)
@given(st.lists(st.integers(1, 29), max_size=4), st.lists(st.integers(1, 19), max_size=4), st.randoms())
def test_find_overlap_accepts_grids_of_boxes(rows, columns, generator):
    """Disjoint boxes that tile a matrix, shuffled: no pair; one of them grown by a column: a pair."""
    rows, columns = ([0, *sorted(set(cuts)), end] for cuts, end in ((rows, 30), (columns, 20)))
    boxes = [
        Box((top, left), (bottom - top, right - left))
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]
    generator.shuffle(boxes)
    assert find_overlap(boxes) is None
    inner = next((box for box in boxes if box.end[1] < 20), None)
    if inner:
        grown = Box(inner.offset, (inner.shape[0], inner.shape[1] + 1))
        assert find_overlap([grown if box == inner else box for box in boxes]) is not None


def test_a_manifest_of_20_thousand_boxes_is_checked_in_seconds():
    """One matrix in row blocks, column blocks and a grid: the quadratic check would need 2e8 comparisons each (minutes)."""
    count, size = 20_000, 20_000
    shapes = {"rows": (count, 1), "columns": (1, count), "grid": (100, 200)}
    tensors, files, boxes = {}, {}, []
    for number, (name, (down, across)) in enumerate(shapes.items()):
        file = f"weights-{number:05d}.safetensors"
        tensors[name] = TensorInfo((size, size), torch.uint8, "weights")
        files[file] = FileInfo(file, size * size + 8, 64 << 20, (0,) * -(-(size * size + 8) // (64 << 20)))
        shape = (size // down, size // across)
        boxes += [
            StoredBox(name, Box((shape[0] * i, shape[1] * j), shape), file, 8 + (i * across + j) * shape[0] * shape[1])
            for i in range(down)
            for j in range(across)
        ]
    random.Random(0).shuffle(boxes)
    manifest = Manifest(1, tensors, files, boxes)
    data = manifest.to_json()
    start = time.process_time()
    assert Manifest.from_json(data, "test").tensors == tensors
    assert time.process_time() - start < 10  # 60 thousand boxes; about 1 s measured
    boxes[7] = StoredBox(boxes[8].tensor, boxes[8].box, boxes[8].file, boxes[8].position)
    with pytest.raises(CheckpointError, match="overlap|cover"):
        manifest.check("test")
