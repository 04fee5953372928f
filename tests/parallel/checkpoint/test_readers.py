"""Ranks that load together: each block is read once on a node, and what one finds damaged all of them know."""

import ast
import os
import socket
from pathlib import Path

import pytest
import torch

from parallel.checkpoint import SingleProcess, files, load, load_tensors, read_manifest, save_checkpoint
from parallel.checkpoint import readers as readers_module
from parallel.checkpoint.manifest import DamagedError
from parallel.checkpoint.readers import GroupReaders
from parallel.errors import CheckpointError
from parallel.shards import Box, TensorBox

pytestmark = pytest.mark.usefixtures("small_blocks")
SAVED, LOADED = (2, 1, 2), (4, 1, 1)  # tp, pp, dp: rows and columns of four ranks from those of two


def counted_reads(monkeypatch):
    """What `os.preadv` reads from now on in this process: [(file name, first byte, bytes)]."""
    reads, preadv = [], os.preadv

    def counting(descriptor, buffers, position):
        count = preadv(descriptor, buffers, position)
        reads.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), position, count))
        return count

    monkeypatch.setattr(os, "preadv", counting)
    return reads


def load_together(directory, model, rank, node_of=None):
    """Load this rank's part, with its node's others."""
    if node_of is not None:
        socket.gethostname = lambda: f"node-{node_of[rank]}"  # of this fork alone
    readers = GroupReaders()
    loaded = model.RankState(LOADED, rank, filled=False)
    try:
        load_tensors(directory, loaded.targets(), readers=readers)
        load_tensors(directory, loaded.targets(), readers=readers)  # the second time, too
    finally:
        readers.close()
    return loaded.equals(model.RankState(LOADED, rank, filled=True))


@pytest.mark.parametrize("node_of", [(0, 0, 0, 0), (0, 1, 0, 1), (0, 1, 1, 1)], ids=str)
def test_every_block_is_read_once_on_a_node(tmp_path, model, monkeypatch, node_of):
    directory = model.save_layout(tmp_path, 1, SAVED)
    manifest = read_manifest(directory)
    (tmp_path / "reads").mkdir()

    def body(voter):
        reads = counted_reads(monkeypatch)
        assert load_together(directory, model, voter.rank, node_of)
        (tmp_path / "reads" / str(voter.rank)).write_text(repr(reads))

    assert model.run_ranks(4, body, tmp_path) == [(0, "")] * 4
    for node in sorted(set(node_of)):
        texts = [(tmp_path / "reads" / str(rank)).read_text() for rank in range(4) if node_of[rank] == node]
        reads = [read for text in texts for read in ast.literal_eval(text)]
        assert len(reads) == 2 * len(set(reads)), "a block was read twice in one load"
    if set(node_of) == {0}:
        assert {name for name, _, _ in reads} == set(manifest.files)


def damage(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def outcome(directory, model, rank):
    """(kind, text, file, block) of what the load raises on this rank."""
    readers = GroupReaders()
    loaded = model.RankState(LOADED, rank, filled=False)
    with pytest.raises(CheckpointError) as caught:
        load_tensors(directory, loaded.targets(), readers=readers)
    readers.close()
    error = caught.value
    return type(error).__name__, str(error), getattr(error, "file", None), getattr(error, "block", None)


@pytest.mark.parametrize("file", ["weights-00001.safetensors", "optimizer-00003.safetensors"])
def test_damage_that_one_rank_finds_is_named_on_all(tmp_path, model, file):
    directory = model.save_layout(tmp_path, 1, SAVED)
    damage(directory / file, 3 * 4096 + 5)

    def body(voter):
        kind, text, found, block = outcome(directory, model, voter.rank)
        (tmp_path / f"text-{voter.rank}").write_text(text)
        assert (kind, found, block) == ("DamagedError", file, 3)
        assert f"{file}, block 3 " in text and "found by rank" in text

    assert model.run_ranks(4, body, tmp_path) == [(0, "")] * 4
    assert len({(tmp_path / f"text-{rank}").read_text() for rank in range(4)}) == 1


def broken_preadv(*_):
    raise PermissionError(13, "Permission denied")


FAULTS = {  # what goes wrong on rank 2 alone, and what the others say
    "rights": (lambda: setattr(os, "preadv", broken_preadv), "cannot be read: Permission denied .found by rank 2"),
    "a defect": (lambda: setattr(os, "preadv", lambda *_: 1 / 0), "ZeroDivisionError: .* .found by rank 2"),
    "another model": (None, "the checkpoint's norm is .* this model's is .* .found by rank 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_on_one_rank_is_raised_by_all(tmp_path, model, fault):
    directory = model.save_layout(tmp_path, 1, SAVED)
    patch, text = FAULTS[fault]

    def body(voter):
        readers = GroupReaders()
        targets = model.RankState(LOADED, voter.rank, filled=False).targets()
        if voter.rank == 2:
            if patch is None:
                targets.append(TensorBox("norm", (1, 36), Box((0, 0), (1, 36)), torch.zeros(1, 36)))
            else:
                patch()
        own = ZeroDivisionError if fault == "a defect" and voter.rank == 2 else CheckpointError
        with pytest.raises(own, match="" if own is ZeroDivisionError else text) as caught:
            load_tensors(directory, targets, readers=readers)
        assert not isinstance(caught.value, DamagedError)
        readers.close()

    assert model.run_ranks(4, body, tmp_path) == [(0, "")] * 4


def test_without_shared_memory_every_rank_reads_alone(tmp_path, model):
    directory = model.save_layout(tmp_path, 1, SAVED)

    def body(voter):
        if voter.rank == 0:
            os.posix_fallocate = broken_preadv
        assert load_together(directory, model, voter.rank)

    assert model.run_ranks(4, body, tmp_path) == [(0, "")] * 4

    def elsewhere(voter):  # a rank in another container of the same host name
        if voter.rank == 3:
            readers_module._map = broken_preadv
        assert load_together(directory, model, voter.rank)

    assert model.run_ranks(4, elsewhere, tmp_path) == [(0, "")] * 4


def test_more_ranks_than_slots(tmp_path, model, monkeypatch):
    """A round reads as many blocks as the memory bound allows, and the ranks take turns."""
    monkeypatch.setattr(load, "SHARED_BYTES", 6 * 4096)
    directory = model.save_layout(tmp_path, 1, SAVED)

    def body(voter):
        assert load_together(directory, model, voter.rank)

    assert model.run_ranks(4, body, tmp_path) == [(0, "")] * 4


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_extra_memory_of_ranks_that_share(tmp_path, model, monkeypatch):
    """64 MiB of rows become columns on two ranks: at most 24 MiB more on each, the shared 16 MiB included."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 4 << 20)
    whole = {f"w{i}": torch.full((1024, 4096), float(i)) for i in range(4)}
    boxes = [TensorBox(name, (1024, 4096), Box((0, 0), (1024, 4096)), tensor) for name, tensor in whole.items()]
    directory = save_checkpoint(tmp_path, 1, {"weights": boxes}, {}, world=SingleProcess())

    def body(voter):
        own = [torch.zeros(1024, 2048) + 7 for _ in whole]  # + 7: its pages are there before the measurement
        box = Box((0, 2048 * voter.rank), (1024, 2048))
        readers = GroupReaders()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = memory("VmRSS")
        load_tensors(directory, [TensorBox(n, (1024, 4096), box, t) for n, t in zip(whole, own, strict=True)], readers=readers)
        assert memory("VmHWM") - before < 24 << 20
        readers.close()
        assert all(bool((tensor == i).all()) for i, tensor in enumerate(own))

    assert model.run_ranks(2, body, tmp_path) == [(0, "")] * 2


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
