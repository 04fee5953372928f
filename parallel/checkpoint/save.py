"""Write a checkpoint: every rank its boxes, one rename at the end, and one verdict for all ranks.

    rank 0: make step_00001000.tmp-<nonce>                                    vote 1
    all:    write {group}-{rank}.safetensors, fsync; part-{rank}.json         vote 2
    rank 0: merge and check the parts; extra files, manifest.json, COMMIT; fsync each, fsync the directory,
            rename it to step_00001000, fsync its parent                      vote 3
    rank 0: remove old steps

A rank that fails votes no, so every rank raises and nothing is published. A rank that dies makes the vote itself fail on
the others; the temporary directory stays, is never read, and is removed by the next save of the same step.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint.manifest import (
    BLOCK_BYTES,
    COMMIT_NAME,
    GROUP_NAME,
    MANIFEST_NAME,
    SAFETENSORS_CODES,
    ExtraFile,
    FileInfo,
    Manifest,
    StoredBox,
    TensorInfo,
    dtype_name,
    is_extra_file_name,
)
from parallel.checkpoint.steps import TEMPORARY_MARK, committed_steps, step_directory
from parallel.errors import CheckpointError
from parallel.shards import TensorBox, range_boxes

Result = TypeVar("Result")
TRASH_MARK = f"{TEMPORARY_MARK}removed-"


class Voter(Protocol):
    """The ranks that save together. All call the same methods in the same order."""

    rank: int
    size: int

    def all_ok(self, ok: bool) -> bool:
        """Whether every rank passed True; returns after every rank has called it."""

    def broadcast_int(self, value: int) -> int:
        """Rank 0's value (below 2^62) on every rank."""


class SingleProcess:
    """A voter for one process."""

    rank = 0
    size = 1

    def all_ok(self, ok: bool) -> bool:
        return ok

    def broadcast_int(self, value: int) -> int:
        return value


class GroupVoter:
    """A voter over a `torch.distributed` group (the default group where None): gloo on CPU tensors, NCCL on device tensors."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group if group is not None else dist.group.WORLD
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        on_device = dist.get_backend(self.group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")

    def all_ok(self, ok: bool) -> bool:
        verdict = torch.tensor([int(ok)], dtype=torch.int64, device=self.device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN, group=self.group)
        return bool(verdict.item())

    def broadcast_int(self, value: int) -> int:
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        return int(box.item())


def save_checkpoint(
    root: Path,
    step: int,
    groups: Mapping[str, Iterable[TensorBox]],
    state: dict,
    *,
    world: Voter,
    extra_files: Mapping[str, bytes] | None = None,
    keep: int = 0,
) -> Path:
    """Write step `step` under `root` (which all ranks share) and return its directory. All ranks of `world` call it together.

    groups: per group of files ("weights", "optimizer") the boxes that this rank is to write. No two ranks' boxes overlap;
    together they cover each tensor. Tensors may lie on a device or be strided; CPU contiguous ones are not copied.
    state, extra_files: rank 0's are stored; `state` must be JSON values (tuples come back as lists).
    keep: how many of the newest steps to leave, this one always among them; 0 leaves all.

    Raises CheckpointError on every rank where any rank fails: with the reason on the rank that failed, and nothing is
    published. An existing directory of the step is never touched. Extra memory: at most 8 MiB a rank.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    root = Path(root)
    final = step_directory(root, step)
    nonce = world.broadcast_int(secrets.randbits(48))
    temporary = root / f"{final.name}{TEMPORARY_MARK}{nonce:012x}"
    is_first = world.rank == 0

    def phase(what: str, action: Callable[[], Result]) -> Result | None:
        try:
            return _vote(world, f"checkpoint {final}: {what}", action)
        except _PhaseFailed as failed:
            if is_first:  # every rank has voted, so nobody writes there any more
                shutil.rmtree(temporary, ignore_errors=True)
            raise failed.error from failed.error.__cause__

    phase("preparing", lambda: _prepare(root, final, temporary) if is_first else None)
    phase("writing", lambda: _write_part(temporary, world.rank, groups))
    phase("committing", lambda: _commit(temporary, final, step, world.size, state, extra_files or {}) if is_first else None)
    if is_first and keep > 0:
        _remove_old_steps(root, step, keep)
    return final


class FailedElsewhere(CheckpointError):
    """The save failed on another rank, which raises the reason."""


class _PhaseFailed(Exception):
    def __init__(self, error: Exception):
        self.error = error


def _vote(world: Voter, what: str, action: Callable[[], Result]) -> Result | None:
    """Do `action`, then agree with all ranks whether all succeeded; raises _PhaseFailed with this rank's error where not."""
    result, error = None, None
    try:
        result = action()
    except CheckpointError as found:
        error = CheckpointError(f"{found}; nothing was published")
    except OSError as found:
        error = CheckpointError(f"{what}, rank {world.rank}: {found}; nothing was published")
        error.__cause__ = found
    except Exception as found:  # a defect of ours or of the caller: the other ranks must learn of it all the same
        error = found
    if world.all_ok(error is None):
        return result
    raise _PhaseFailed(error or FailedElsewhere(f"{what} failed on another rank (its message says why); nothing was published"))


def _prepare(root: Path, final: Path, temporary: Path) -> None:
    if not root.is_dir():
        root.mkdir(parents=True)
        _fsync_directory(root.parent)
    if final.exists():
        kind = "is already committed" if (final / COMMIT_NAME).exists() else f"exists without {COMMIT_NAME}: it is damaged"
        raise CheckpointError(f"{final} {kind}; it is left as it is. Move it away, or save under another root")
    for stale in root.glob(f"{final.name}{TEMPORARY_MARK}*"):
        shutil.rmtree(stale)
    temporary.mkdir()


def _write_part(temporary: Path, rank: int, groups: Mapping[str, Iterable[TensorBox]]) -> None:
    """Write this rank's files, and what it has written as part-{rank}.json, for rank 0 to merge."""
    if not temporary.is_dir():
        raise CheckpointError(f"rank {rank} does not see {temporary}, made by rank 0: do all ranks share this file system?")
    tensors: dict[str, TensorInfo] = {}
    files, boxes = [], []
    for group, given in groups.items():
        if not GROUP_NAME.fullmatch(group):
            raise CheckpointError(f"checkpoint {temporary}: {group!r} is not allowed as the name of a group")
        given = list(given)
        for item in given:
            info = TensorInfo(tuple(item.global_shape), item.tensor.dtype, group)
            if info.dtype not in SAFETENSORS_CODES:
                raise CheckpointError(f"checkpoint {temporary}: {item.name}: {dtype_name(info.dtype)} has no stored form")
            _agree(tensors, item.name, info, f"checkpoint {temporary}, rank {rank}")
        # larger elements first: every tensor starts at a multiple of its element size
        stored = sorted((item for item in given if item.box.numel), key=lambda item: -item.tensor.dtype.itemsize)
        if stored:
            path = temporary / f"{group}-{rank:05d}.safetensors"
            info, written = write_safetensors(path, stored)
            files.append(info)
            boxes += written
    part = Manifest(0, tensors, {info.name: info for info in files}, boxes)
    (temporary / _part_name(rank)).write_bytes(part.to_json())


def write_safetensors(path: Path, items: list[TensorBox]) -> tuple[FileInfo, list[StoredBox]]:
    """Write one safetensors file with the keys `name@o0,o1` and fsync it; the CRCs are of the bytes as handed to `write`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative, end = [], 0
    for item in items:
        start, end = end, end + item.box.numel * item.tensor.dtype.itemsize
        entry = StoredBox(item.name, item.box, path.name, start)
        if entry.key in header:
            raise CheckpointError(f"{path}: two boxes of {item.name} start at {item.box.offset}")
        code = SAFETENSORS_CODES[item.tensor.dtype]
        header[entry.key] = {"dtype": code, "shape": item.box.shape, "data_offsets": (start, end)}
        relative.append(entry)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    with open(path, "xb", buffering=0) as file:
        writer = _BlockWriter(file.write)
        writer.write(memoryview(len(text).to_bytes(8, "little") + text))
        staging = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=any(item.tensor.is_cuda for item in items))
        for item in items:
            for data in tensor_bytes(item.tensor, staging):
                writer.write(data)
        assert writer.size == base + end, f"{path}: wrote {writer.size} bytes, planned {base + end}"
        os.fsync(file.fileno())
    boxes = [StoredBox(entry.tensor, entry.box, entry.file, base + entry.position) for entry in relative]
    return FileInfo(path.name, writer.size, BLOCK_BYTES, writer.checksums()), boxes


def tensor_bytes(tensor: Tensor, staging: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order: without a copy where it is CPU contiguous, else by way of `staging` (bytes).

    A block is valid until the next one is asked for.
    """
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        return
    staging = staging.view(tensor.dtype)
    count = staging.numel()
    for start in range(0, tensor.numel(), count):
        stop = min(start + count, tensor.numel())
        if tensor.is_contiguous():
            staging[: stop - start].copy_(tensor.view(-1)[start:stop])
        else:
            for box, flat in range_boxes(tuple(tensor.shape), start, stop):
                staging[flat - start : flat - start + box.numel].view(box.shape).copy_(tensor[box.slices()])
        yield memoryview(staging[: stop - start].view(torch.uint8).numpy())


class _BlockWriter:
    """Writes bytes and keeps the CRC32 of each block of BLOCK_BYTES."""

    def __init__(self, write: Callable[[memoryview], int]):
        self._write = write
        self._finished: list[int] = []
        self._checksum = 0
        self.size = 0

    def write(self, data: memoryview) -> None:
        while data:
            piece = data[: BLOCK_BYTES - self.size % BLOCK_BYTES]
            self._checksum = zlib.crc32(piece, self._checksum)
            written = 0
            while written < len(piece):
                written += self._write(piece[written:])
            self.size += len(piece)
            if self.size % BLOCK_BYTES == 0:
                self._finished.append(self._checksum)
                self._checksum = 0
            data = data[len(piece) :]

    def checksums(self) -> tuple[int, ...]:
        return (*self._finished, self._checksum) if self.size % BLOCK_BYTES else tuple(self._finished)


def _commit(temporary: Path, final: Path, step: int, ranks: int, state: dict, extra_files: Mapping[str, bytes]) -> None:
    """Merge the parts into a checked manifest and make the directory appear."""
    manifest = _merge_parts(temporary, step, ranks, state, extra_files)
    for name, data in extra_files.items():
        _write_durably(temporary / name, data)
    data = manifest.to_json()
    _write_durably(temporary / MANIFEST_NAME, data)
    for rank in range(ranks):
        (temporary / _part_name(rank)).unlink()
    _write_durably(temporary / COMMIT_NAME, hashlib.sha256(data).hexdigest().encode())
    _fsync_directory(temporary)
    if final.exists():
        raise CheckpointError(f"{final} appeared during the save: is another job writing to the same root?")
    os.rename(temporary, final)
    try:
        _fsync_directory(final.parent)
    except OSError:
        os.rename(final, temporary)  # this save is about to be reported as failed
        raise


def _merge_parts(temporary: Path, step: int, ranks: int, state: dict, extra_files: Mapping[str, bytes]) -> Manifest:
    manifest = Manifest(step, {}, {}, [], state)
    for rank in range(ranks):
        where = f"checkpoint {temporary}, part of rank {rank}"
        part = Manifest.from_json((temporary / _part_name(rank)).read_bytes(), where, check=False)
        for name, info in part.tensors.items():
            _agree(manifest.tensors, name, info, where)
        manifest.files.update(part.files)
        manifest.boxes.extend(part.boxes)
    for name, data in extra_files.items():
        if not is_extra_file_name(name):
            raise CheckpointError(f"checkpoint {temporary}: {name!r} is not allowed as the name of an extra file")
        manifest.extra_files[name] = ExtraFile(len(data), zlib.crc32(data))
    manifest.check(f"checkpoint {temporary}")
    return manifest


def _agree(tensors: dict[str, TensorInfo], name: str, info: TensorInfo, where: str) -> None:
    known = tensors.setdefault(name, info)
    if known != info:
        texts = (f"{list(i.shape)} {dtype_name(i.dtype)} in group {i.group}" for i in (info, known))
        raise CheckpointError(f"{where}: {name} is {next(texts)}, elsewhere {next(texts)}: ranks must agree on each tensor")


def _remove_old_steps(root: Path, step: int, keep: int) -> None:
    """Leave `step` and the newest others, `keep` in all. The checkpoint is safe already: a failure here is only a warning."""
    others = [other for other in committed_steps(root) if other != step]
    try:
        for old in others[: max(len(others) - (keep - 1), 0)]:
            path = step_directory(root, old)
            os.rename(path, root / f"{path.name}{TRASH_MARK}{secrets.randbits(48):012x}")
        for trash in root.glob(f"*{TRASH_MARK}*"):  # those of a removal that was interrupted, too
            shutil.rmtree(trash)
    except OSError as error:
        warnings.warn(f"old checkpoints in {root} could not be removed: {error}", RuntimeWarning, stacklevel=3)


def _part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
