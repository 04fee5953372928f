"""Nothing damaged, hostile or foreign loads silently, and the message names what is wrong and where."""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import tracemalloc

import pytest
import torch

from parallel.checkpoint import (
    SingleProcess,
    files,
    load_tensors,
    newest_checkpoint,
    read_extra_file,
    read_manifest,
    save_checkpoint,
    verify_checkpoint,
)
from parallel.checkpoint.load import find_damage
from parallel.checkpoint.manifest import DamagedError
from parallel.errors import CheckpointError
from parallel.shards import Box, TensorBox

pytestmark = pytest.mark.usefixtures("small_blocks")
FLIPS, TRUNCATIONS = 1000, 50


def load_all(directory, targets):
    manifest = load_tensors(directory, targets)
    for name in manifest.extra_files:
        read_extra_file(directory, name, manifest)


@pytest.fixture
def saved(tmp_path, model, monkeypatch):
    """A checkpoint of two ranks, and targets of another layout that need every block: headers share one with tensors."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 16384)
    directory = model.save_layout(tmp_path / "good", 1, (2, 1, 1), extra_files={"tokenizer.model": bytes(300)})
    return directory, model.RankState((1, 1, 1), 0, filled=False).targets()


@pytest.fixture
def small(tmp_path, model):
    """A checkpoint of two ranks with a few boxes, for loads by the thousand, and targets that need every block (4096 bytes)."""

    def body(voter):
        groups = {
            group: [box_of(name, torch.randn(40, 64), (40 * voter.rank, 0), (80, 64))]
            for group, name in (("weights", "w"), ("optimizer", "exp_avg/w"))
        }
        return save_checkpoint(tmp_path, 1, groups, {}, world=voter, extra_files={"tokenizer.model": bytes(300)})

    targets = [box_of("w", torch.zeros(80, 30), (0, 7), (80, 64)), box_of("exp_avg/w", torch.zeros(80, 64))]
    return model.run_threads(2, body)[0], targets


def test_no_flipped_bit_loads_silently(small):
    directory, targets = small
    load_all(directory, targets)
    files = sorted(directory.iterdir())
    assert len(files) == 7  # 2 x weights, 2 x optimizer, tokenizer.model, manifest.json, COMMIT
    generator = random.Random(5)
    for number in range(FLIPS):
        path = files[number % len(files)]
        position, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, position)[0] ^ 1 << bit]), position)
            reads = [lambda: load_all(directory, targets)] + [lambda: verify_checkpoint(directory)] * (number % 5 == 0)
            for read in reads:
                with pytest.raises(DamagedError, match=re.escape(path.name)) as caught:
                    read()
                assert str(directory) in str(caught.value)
                if path.suffix == ".safetensors":
                    assert f"block {position // 4096} " in str(caught.value)
                    assert (caught.value.file, caught.value.block) == (path.name, position // 4096)
            os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, position)[0] ^ 1 << bit]), position)
    load_all(directory, targets)


def test_no_file_that_was_cut_off_loads_silently(small):
    directory, targets = small
    paths, generator = sorted(directory.iterdir()), random.Random(6)
    for number in range(TRUNCATIONS):
        path = paths[number % len(paths)]
        data = path.read_bytes()
        os.truncate(path, generator.randrange(len(data)))
        for read in (lambda: load_all(directory, targets), lambda: verify_checkpoint(directory)):
            with pytest.raises(DamagedError, match=re.escape(path.name)):
                read()
        path.write_bytes(data)
    load_all(directory, targets)


def test_all_damage_is_found_at_once(saved):
    directory, _ = saved
    damaged = [("optimizer-00000.safetensors", 2), ("weights-00001.safetensors", 0), ("weights-00001.safetensors", 1)]
    for name, block in damaged:
        flip(directory / name, block * 16384 + 100)
    flip(directory / "tokenizer.model", 7)
    seen = []
    found = [(error.file, error.block) for error in find_damage(directory, seen.append)]
    assert sorted(found, key=str) == sorted([*damaged, ("tokenizer.model", None)], key=str)
    assert sum(seen) == read_manifest(directory).total_bytes


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_damage_in_bytes_that_no_target_needs_is_left_to_verification(tmp_path):
    tensor = torch.randn(3000)  # 12,000 bytes: three to four blocks
    directory = save_checkpoint(tmp_path, 1, {"weights": [box_of("w", tensor)]}, {}, world=SingleProcess())
    path = directory / "weights-00000.safetensors"
    flip(path, -1)
    first = torch.zeros(500)
    load_tensors(directory, [box_of("w", first, (0,), (3000,))])
    assert torch.equal(first, tensor[:500])
    with pytest.raises(CheckpointError, match="weights-00000.safetensors, block 2 "):
        verify_checkpoint(directory)
    with pytest.raises(CheckpointError, match="weights-00000.safetensors, block 2 "):
        load_tensors(directory, [box_of("w", first, (2500,), (3000,))])


def test_truncated_lengthened_and_missing_files_are_named(saved):
    directory, targets = saved
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        for damaged in (data[:-1], data[: len(data) // 2], b"", data + b"x"):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=re.escape(path.name)):
                load_all(directory, targets)
        path.unlink()
        with pytest.raises(CheckpointError, match=re.escape(path.name)):
            load_all(directory, targets)
        path.mkdir()
        with pytest.raises(CheckpointError, match=re.escape(path.name)):
            load_all(directory, targets)
        path.rmdir()
        path.write_bytes(data)
    load_all(directory, targets)


def test_a_file_that_shrinks_after_the_manifest_was_read_is_named(saved):
    directory, targets = saved
    manifest = read_manifest(directory)
    path = directory / "weights-00001.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="weights-00001.safetensors.*truncated"):
        load_tensors(directory, targets, manifest)


def test_swapped_files_of_equal_size_are_named(tmp_path):
    for step in (1, 2):
        tensor = torch.full((3000,), float(step))
        save_checkpoint(tmp_path, step, {"weights": [box_of("w", tensor)]}, {}, world=SingleProcess())
    shutil.copy(tmp_path / "step_00000001/weights-00000.safetensors", tmp_path / "step_00000002")
    with pytest.raises(CheckpointError, match="step_00000002: weights-00000.safetensors, block 0"):
        load_tensors(tmp_path / "step_00000002", [box_of("w", torch.zeros(3000))])


def box_of(name, tensor, offset=None, shape=None):
    shape = shape or tuple(tensor.shape)
    return TensorBox(name, shape, Box(offset or (0,) * tensor.dim(), tuple(tensor.shape)), tensor)


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("w", torch.zeros(8, 6), r"the checkpoint's w is \[6, 8\], this model's is \[8, 6\]: is it a checkpoint of another"),
        ("w", torch.zeros(48), r"the checkpoint's w is \[6, 8\], this model's is \[48\]"),
        ("w", torch.zeros(6, 8, dtype=torch.bfloat16), "the checkpoint's w is float32, this run's is bfloat16"),
        ("w", torch.zeros(6, 8, dtype=torch.int32), "the checkpoint's w is float32, this run's is int32"),
        ("v", torch.zeros(6, 8), r"1 of 2 tensors are not in the checkpoint \(v\)"),
    ],
)
def test_another_model_is_refused_before_anything_is_read(tmp_path, name, tensor, text):
    groups = {"weights": [box_of("w", torch.ones(6, 8)), box_of("b", torch.ones(4))]}
    directory = save_checkpoint(tmp_path, 1, groups, {}, world=SingleProcess())
    other = torch.zeros(4)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_tensors(directory, [box_of("b", other), box_of(name, tensor)])
    assert str(directory) in str(caught.value)
    assert not other.any() and not tensor.any()


def test_every_element_of_a_target_must_be_stored(saved):
    """Even under a manifest that nobody has checked."""
    directory, targets = saved
    manifest = read_manifest(directory)
    for dropped in range(0, len(manifest.boxes), 5):
        boxes = manifest.boxes[:dropped] + manifest.boxes[dropped + 1 :]
        with pytest.raises(CheckpointError, match=f"only .* elements of {manifest.boxes[dropped].tensor} "):
            load_tensors(directory, targets, dataclasses.replace(manifest, boxes=boxes))


def edited(directory, change):
    """Apply `change` to the manifest's JSON object (or replace it by what it returns) and sign it again."""
    path = directory / "manifest.json"
    fields = json.loads(path.read_bytes())
    result = change(fields)
    data = result if isinstance(result, bytes) else json.dumps(fields).encode()
    path.write_bytes(data)
    (directory / "COMMIT").write_text(hashlib.sha256(data).hexdigest())


def rename_file(fields, name):
    old = fields["files"][0]["name"]
    fields["files"][0]["name"] = name
    for box in fields["boxes"]:
        box[3] = name if box[3] == old else box[3]


def set_path(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(fields):
        for key in keys:
            fields = fields[key]
        fields[last] = value

    return change


HOSTILE = {
    "path traversal": (lambda f: rename_file(f, "../../weights-00000.safetensors"), "not allowed as the name of a data file"),
    "absolute path": (lambda f: rename_file(f, "/etc/passwd"), "not allowed as the name of a data file"),
    "newline in a file name": (lambda f: rename_file(f, "weights-00000.safetensors\n"), "name of a data file"),
    "traversal by an extra file": (set_path("extra_files", "../x", {"size": 1, "crc32": 0}), "name of an extra file"),
    "an extra file named COMMIT": (set_path("extra_files", "COMMIT", {"size": 64, "crc32": 0}), "name of an extra file"),
    "a tensor named with @": (lambda f: f["tensors"].update({"w@0": f["tensors"]["w"]}), "name of a tensor"),
    "huge shape": (set_path("tensors", "w", "shape", [2**40, 2**20]), "cover 8000 of its"),
    "shape beyond 64 bits": (set_path("tensors", "w", "shape", [2**70, 1]), "not an integer from 0"),
    "huge box": (set_path("boxes", 0, 2, [2**50, 80]), "does not lie in w"),
    "many dims": (set_path("tensors", "w", "shape", [1] * 10**5), "more than 8"),
    "file larger than the disk": (set_path("files", 0, "size", 2**60), "checksums"),
    "file larger than it is": (set_path("files", 0, "size", 32500), "the manifest says 32500"),
    "huge blocks": (lambda f: f["files"][0].update(block_size=2**60, crc32=[0]), "block size"),
    "blocks of size 0": (set_path("files", 0, "block_size", 0), "block size"),
    "a checksum too few": (lambda f: f["files"][0]["crc32"].pop(), "checksums"),
    "position after the end": (set_path("boxes", 0, 4, 2**40), "the file at byte"),
    "position in the middle": (set_path("boxes", 0, 4, 32000), "the file at byte"),
    "position in the header's length": (set_path("boxes", 0, 4, 4), "inside what ends at byte 8"),
    "unaligned position": (lambda f: f["boxes"][0].__setitem__(4, f["boxes"][0][4] - 2), "not aligned"),
    "negative position": (set_path("boxes", 0, 4, -8), "not an integer"),
    "negative shape": (set_path("boxes", 0, 2, [-100, -80]), "not an integer"),
    "float in a shape": (set_path("tensors", "w", "shape", [100.0, 80]), "not an integer"),
    "bool in a shape": (set_path("tensors", "w", "shape", [True, 80]), "not an integer"),
    "NaN in a shape": (set_path("tensors", "w", "shape", [float("nan"), 80]), "not an integer"),
    "empty box": (set_path("boxes", 0, 2, [0, 80]), "does not lie in w"),
    "box of fewer dims": (lambda f: f["boxes"].__setitem__(0, ["w", [0], [8000], *f["boxes"][0][3:]]), "does not lie in w"),
    "missing box": (lambda f: f["boxes"].pop(0), "cover 0 of its 8000"),
    "overlapping boxes": (lambda f: f["boxes"].append(f["boxes"][0]), "overlap"),
    "boxes on the same bytes": (
        lambda f: (f["tensors"].update(v=f["tensors"]["w"]), f["boxes"].append(["v", *f["boxes"][0][1:]])),
        "inside what ends at byte",
    ),
    "unknown tensor": (lambda f: f["boxes"].append(["v", *f["boxes"][0][1:]]), "no such tensor"),
    "unknown file": (set_path("boxes", 0, 3, "weights-00009.safetensors"), "no such file"),
    "tensor of another group": (set_path("tensors", "w", "group", "optimizer"), "belongs to group 'optimizer'"),
    "a file listed twice": (lambda f: f["files"].append(f["files"][0]), "listed twice"),
    "unknown dtype": (set_path("tensors", "w", "dtype", "object"), "the dtype 'object'"),
    "another version": (set_path("version", 99), "version 99"),
    "foreign JSON": (lambda f: b'{"metadata": {}}', "not a manifest"),
    "not an object": (lambda f: b"[]", "not a manifest"),
    "not JSON": (lambda f: b"\x80\x04pickle", "not valid JSON"),
    "deep nesting": (lambda f: b"[" * 10**6, "not valid JSON"),
    "a huge number": (lambda f: b'{"step": ' + b"9" * 10**5 + b"}", "not valid JSON"),
    "deep nesting in the state": (
        lambda f: json.dumps({**f, "state": None}).encode().replace(b"null", b"[" * 10**5 + b"]" * 10**5), "not valid JSON"
    ),
    "a step beyond 64 bits": (set_path("step", 2**70), "not an integer from 0"),
    "a NUL in a file name": (lambda f: rename_file(f, "weights-0000\x00.safetensors"), "name of a data file"),
    "a name longer than a path": (set_path("boxes", 0, 0, "w" * 10**6), "no such tensor is listed"),
    "traversal by an extra file named VERIFIED": (set_path("extra_files", "VERIFIED", {"size": 1, "crc32": 0}), "extra file"),
    "sizes that add up beyond memory": (
        lambda f: (f["tensors"].update(v={**f["tensors"]["w"], "shape": [2**31, 2**30]}),
                   f["boxes"].append(["v", [0, 0], [2**31, 2**30], f["boxes"][0][3], 32768])), "the file at byte",
    ),
    "state of another kind": (set_path("state", []), "state is not an object"),
    "a key twice": (lambda f: b'{"format": 1, "format": 2}', "twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused_before_allocation(tmp_path, case):
    change, text = HOSTILE[case]
    groups = {"weights": [box_of("w", torch.ones(100, 80))]}
    directory = save_checkpoint(tmp_path / "root", 1, groups, {}, world=SingleProcess())
    shutil.copy(directory / "weights-00000.safetensors", tmp_path)  # what a traversal would reach
    edited(directory, lambda fields: None)
    load_tensors(directory, [box_of("w", torch.zeros(100, 80))])
    edited(directory, change)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=text) as caught:
            load_tensors(directory, [box_of("w", torch.zeros(100, 80))])
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()
    assert str(directory) in str(caught.value) and len(str(caught.value)) < 1500


def test_a_header_that_disagrees_with_the_manifest_fails_verification(tmp_path):
    groups = {"weights": [box_of("w", torch.ones(10, 8)), box_of("v", torch.zeros(10, 8))]}
    directory = save_checkpoint(tmp_path, 1, groups, {}, world=SingleProcess())

    def swap(fields):
        w, v = fields["boxes"]
        w[4], v[4] = v[4], w[4]

    verify_checkpoint(directory)
    edited(directory, swap)
    read_manifest(directory)  # consistent in itself
    with pytest.raises(CheckpointError, match="weights-00000.safetensors: its safetensors header"):
        verify_checkpoint(directory)


def test_a_damaged_newest_checkpoint_is_named_and_nothing_older_is_taken(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"weights": [box_of("w", torch.ones(9))]}, {}, world=SingleProcess())
    assert newest_checkpoint(tmp_path).name == "step_00000003"
    (tmp_path / "step_00000003" / "COMMIT").unlink()
    with pytest.raises(CheckpointError, match="step_00000003: COMMIT.*damaged; move it away to resume from step 2"):
        newest_checkpoint(tmp_path)
    shutil.move(tmp_path / "step_00000003", tmp_path / "bad")
    assert newest_checkpoint(tmp_path).name == "step_00000002"
    os.truncate(tmp_path / "step_00000002" / "weights-00000.safetensors", 50)
    with pytest.raises(CheckpointError, match="step_00000002: weights-00000.safetensors has 50 bytes"):
        newest_checkpoint(tmp_path)
