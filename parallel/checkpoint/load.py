"""Read a checkpoint: fill tensors of any layout from whatever boxes are stored, and trust no byte before its checksum.

Files are read block by block, each needed block once, each verified. A block that is wholly one contiguous destination's
is read straight into it; every other goes through one bounce buffer, and from there into all destinations that it touches.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.manifest import (
    SAFETENSORS_CODES,
    FileInfo,
    Manifest,
    StoredBox,
    check_size,
    dtype_name,
    read_manifest,
)
from parallel.checkpoint.steps import committed_steps, newest_checkpoint, resolve_checkpoint, step_directory
from parallel.errors import CheckpointError
from parallel.shards import Box, TensorBox, flat_span, range_boxes

__all__ = [
    "committed_steps",
    "load_tensors",
    "newest_checkpoint",
    "read_extra_file",
    "read_manifest",
    "resolve_checkpoint",
    "step_directory",
    "verify_checkpoint",
]


@torch.no_grad()
def load_tensors(directory: Path, targets: Iterable[TensorBox], manifest: Manifest | None = None) -> Manifest:
    """Fill every target's tensor in place from the step directory, and return the manifest.

    Targets may be any boxes of the stored tensors, of any layout, on any device; names, global shapes and dtypes must be the
    stored ones, and every element of every target is filled. Every block read is verified; bytes that no target needs are
    not read (`verify_checkpoint` reads all). Extra memory: one block (4 MiB), pinned for device targets.

    Raises CheckpointError naming the directory and the tensor, before anything is read, where targets and checkpoint do not
    fit; naming the file and block where bytes are damaged (then targets may be partly filled: do not use them).
    """
    directory, targets = Path(directory), list(targets)
    manifest = read_manifest(directory) if manifest is None else manifest
    by_file: dict[str, list[_Transfer]] = {}
    for transfer in _plan(directory, targets, manifest):
        by_file.setdefault(transfer.stored.file, []).append(transfer)
    for name in by_file:
        check_size(directory, name, manifest.files[name].size)
    on_device = any(target.tensor.is_cuda for target in targets)
    largest = max((manifest.files[name].block_size for name in by_file), default=0)
    bounce = torch.empty(largest, dtype=torch.uint8, pin_memory=on_device)
    for name, transfers in by_file.items():
        _fill_from_file(directory, manifest.files[name], transfers, bounce)
    return manifest


def verify_checkpoint(directory: Path) -> Manifest:
    """Check every byte of the step directory, and that the safetensors headers say what the manifest says.

    Raises CheckpointError naming the file, and the block.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    boxes: dict[str, list[StoredBox]] = {name: [] for name in manifest.files}
    for stored in manifest.boxes:
        boxes[stored.file].append(stored)
    for info in manifest.files.values():
        buffer = memoryview(bytearray(min(info.block_size, info.size)))
        with _BlockReader(directory, info) as reader:
            for index in range(len(info.crc32)):
                start, stop = info.block(index)
                reader.read(index, buffer[: stop - start])
        _verify_header(directory, info, boxes[info.name], manifest)
    for name in manifest.extra_files:
        read_extra_file(directory, name, manifest)
    return manifest


def read_extra_file(directory: Path, name: str, manifest: Manifest | None = None) -> bytes:
    """The bytes of the small file stored as `name`; CheckpointError where it is absent or damaged."""
    directory = Path(directory)
    manifest = read_manifest(directory) if manifest is None else manifest
    info = manifest.extra_files.get(name)
    if info is None:
        stored = ", ".join(sorted(manifest.extra_files)) or "none"
        raise CheckpointError(f"{directory}: no file {name!r} was stored with this checkpoint (stored: {stored})")
    check_size(directory, name, info.size)
    try:
        data = (directory / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{directory}: {name} cannot be read: {error.strerror}") from error
    if zlib.crc32(data) != info.crc32:
        raise CheckpointError(f"{directory}: {name} is damaged (CRC32 mismatch): copy it again or use another step")
    return data


@dataclass(frozen=True)
class _Transfer:
    """`common` (global coordinates) goes from a stored box to a target; file bytes [start, stop) contain it.

    `flat`: where `common` is contiguous both in the file and in the target, the 1-D view of the target that bytes
    [start, stop) fill in order; else None.
    """

    stored: StoredBox
    target: TensorBox
    common: Box
    start: int
    stop: int
    flat: Tensor | None

    def destination(self, start: int, stop: int) -> Tensor | None:
        """The CPU memory, as bytes, that file bytes [start, stop) may be read straight into, if they all belong there."""
        if self.flat is None or self.flat.device.type != "cpu" or start < self.start or stop > self.stop:
            return None
        return self.flat.view(torch.uint8)[start - self.start : stop - self.start]

    def copies(self, start: int, stop: int) -> Iterator[tuple[Tensor, int, tuple[int, ...], tuple[slice, ...]]]:
        """The part of the file bytes [start, stop) that this transfer wants.

        Yields (destination, file byte, shape, slices): the contiguous array of `shape` at that byte, cut by the slices.
        """
        size = self.target.tensor.dtype.itemsize
        start, stop = max(start, self.start), min(stop, self.stop)
        if self.flat is not None:
            count = (stop - start) // size
            first = (start - self.start) // size
            yield self.flat[first : first + count], start, (count,), (slice(0, count),)
            return
        origin, position = self.stored.box.offset, self.stored.position
        for local, flat in range_boxes(self.stored.box.shape, (start - position) // size, (stop - position) // size):
            box = Box(tuple(a + b for a, b in zip(local.offset, origin, strict=True)), local.shape)
            wanted = box.intersect(self.common)
            if wanted is not None:
                destination = self.target.tensor[wanted.shifted(self.target.box.offset, (0,) * len(origin)).slices()]
                yield destination, position + flat * size, box.shape, wanted.shifted(box.offset, (0,) * len(origin)).slices()


def _plan(directory: Path, targets: list[TensorBox], manifest: Manifest) -> Iterator[_Transfer]:
    """Which stored boxes fill which targets; raises CheckpointError where a target does not fit the checkpoint."""
    wanted = {target.name for target in targets}
    missing = sorted(wanted - manifest.tensors.keys())
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(wanted)} tensors are not in the checkpoint ({names}): "
            "is it a checkpoint of another model, or one saved without them?"
        )
    by_tensor: dict[str, list[StoredBox]] = {name: [] for name in wanted}
    for stored in manifest.boxes:
        if stored.tensor in by_tensor:
            by_tensor[stored.tensor].append(stored)
    for boxes in by_tensor.values():
        boxes.sort(key=lambda stored: stored.box.offset)
    for target in targets:
        _check_target(directory, target, manifest)
        end = target.box.end[0] if target.box.shape else 1
        filled = 0
        for stored in by_tensor[target.name]:
            if stored.box.offset and stored.box.offset[0] >= end:
                break
            common = stored.box.intersect(target.box)
            if common is not None:
                filled += common.numel
                yield _transfer(stored, target, common)
        if filled != target.box.numel:
            raise CheckpointError(
                f"{directory}: only {filled} of {target.box.numel} elements of {target.name} at {target.box.offset} are stored"
            )


def _check_target(directory: Path, target: TensorBox, manifest: Manifest) -> None:
    info = manifest.tensors[target.name]
    if info.shape != tuple(target.global_shape):
        raise CheckpointError(
            f"{directory}: the checkpoint's {target.name} is {list(info.shape)}, this model's is {list(target.global_shape)}: "
            "is it a checkpoint of another model?"
        )
    if info.dtype != target.tensor.dtype:
        raise CheckpointError(
            f"{directory}: the checkpoint's {target.name} is {dtype_name(info.dtype)}, this run's is "
            f"{dtype_name(target.tensor.dtype)}: use the dtype with which it was saved"
        )
    assert Box.whole(info.shape).contains(target.box), f"{target.name}: {target.box} leaves {info.shape}"


def _transfer(stored: StoredBox, target: TensorBox, common: Box) -> _Transfer:
    size = target.tensor.dtype.itemsize
    zeros = (0,) * len(common.offset)
    first, last = flat_span(stored.box.shape, common.shifted(stored.box.offset, zeros))
    to_first, to_last = flat_span(target.box.shape, common.shifted(target.box.offset, zeros))
    flat = None
    if last - first == to_last - to_first == common.numel and target.tensor.is_contiguous():
        flat = target.tensor.detach().view(-1)[to_first:to_last]
    return _Transfer(stored, target, common, stored.position + first * size, stored.position + last * size, flat)


def _fill_from_file(directory: Path, info: FileInfo, transfers: list[_Transfer], bounce: Tensor) -> None:
    by_block: dict[int, list[_Transfer]] = {}
    for transfer in transfers:
        for index in range(transfer.start // info.block_size, (transfer.stop - 1) // info.block_size + 1):
            by_block.setdefault(index, []).append(transfer)
    with _BlockReader(directory, info) as reader:
        for index in sorted(by_block):
            start, stop = info.block(index)
            wanting = by_block[index]
            direct = wanting[0].destination(start, stop) if len(wanting) == 1 else None
            if direct is not None:
                reader.read(index, memoryview(direct.numpy()))
                continue
            copies = [copy for transfer in wanting for copy in transfer.copies(start, stop)]
            if not copies:
                continue
            reader.read(index, memoryview(bounce.numpy())[: stop - start])
            for destination, position, shape, slices in copies:
                first, dtype = position - start, destination.dtype
                source = bounce[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                destination.copy_(source[slices])


class _BlockReader:
    """Reads whole blocks of a file and verifies each."""

    def __init__(self, directory: Path, info: FileInfo):
        self._directory = directory
        self._info = info
        try:
            self._file = open(directory / info.name, "rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{directory}: {info.name} cannot be read: {error.strerror}") from error

    def __enter__(self) -> _BlockReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, index: int, into: memoryview) -> None:
        """Fill `into`, as long as the block, with block `index`."""
        start, stop = self._info.block(index)
        text = f"{self._directory}: {self._info.name}, block {index} (bytes {start} to {stop})"
        filled = 0
        try:
            while filled < stop - start:
                count = os.preadv(self._file.fileno(), [into[filled:]], start + filled)
                if count == 0:
                    raise CheckpointError(f"{text}: the file ends at byte {start + filled}: truncated; use another step")
                filled += count
        except OSError as error:
            raise CheckpointError(f"{text} cannot be read: {error.strerror}") from error
        found = zlib.crc32(into)
        if found != self._info.crc32[index]:
            raise CheckpointError(
                f"{text} is damaged: CRC32 {found:08x}, the manifest says {self._info.crc32[index]:08x}; "
                "copy the file again or use another step"
            )


def _verify_header(directory: Path, info: FileInfo, boxes: list[StoredBox], manifest: Manifest) -> None:
    """What a stock safetensors reader would find under each key is what the manifest says."""
    with open(directory / info.name, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > info.size - 8:
            raise CheckpointError(f"{directory}: {info.name}: its header of {length} bytes does not fit in {info.size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{directory}: {info.name}: its safetensors header is not JSON: {error}") from error
    expected = {}
    for stored in boxes:
        dtype = manifest.tensors[stored.tensor].dtype
        first = stored.position - 8 - length
        offsets = [first, first + stored.box.numel * dtype.itemsize]
        entry = {"dtype": SAFETENSORS_CODES[dtype], "shape": list(stored.box.shape), "data_offsets": offsets}
        expected[stored.key] = entry
    if not isinstance(header, dict) or {key: value for key, value in header.items() if key != "__metadata__"} != expected:
        raise CheckpointError(f"{directory}: {info.name}: its safetensors header and the manifest list different tensors")
