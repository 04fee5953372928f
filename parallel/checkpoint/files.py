"""Files on disk: safetensors with a CRC32 of every block, and what makes a file and its name durable."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.manifest import BLOCK_BYTES, SAFETENSORS_CODES, FileInfo, StoredBox
from parallel.errors import CheckpointError
from parallel.shards import TensorBox, range_boxes

BytesOf = Callable[[TensorBox], Iterable[memoryview]]


def write_safetensors(
    path: Path, items: list[TensorBox], bytes_of: BytesOf | None = None
) -> tuple[FileInfo, list[StoredBox]]:
    """Write one safetensors file with the keys `name@o0,o1` and fsync it; the CRCs are of the bytes as handed to `write`."""
    head, boxes, size = lay_out(path.name, items)
    with open(path, "xb", buffering=0) as file:
        writer = _BlockWriter(file.write)
        writer.write(memoryview(head))
        staging = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=any(item.tensor.is_cuda for item in items))
        for item in items:
            for data in tensor_bytes(item.tensor, staging) if bytes_of is None else bytes_of(item):
                writer.write(data)
        assert writer.size == size, f"{path}: wrote {writer.size} bytes, planned {size}"
        os.fsync(file.fileno())
    return FileInfo(path.name, size, BLOCK_BYTES, writer.checksums()), boxes


def lay_out(name: str, items: Iterable[TensorBox]) -> tuple[bytes, list[StoredBox], int]:
    """The safetensors file `name` with these boxes in this order: its first bytes, where each box lies, and its size."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative, end = [], 0
    for item in items:
        start, end = end, end + item.box.numel * item.tensor.dtype.itemsize
        entry = StoredBox(item.name, item.box, name, start)
        key = entry.key
        if key in header:
            raise CheckpointError(f"{name}: two boxes of {item.name} start at {item.box.offset}")
        code = SAFETENSORS_CODES[item.tensor.dtype]
        header[key] = {"dtype": code, "shape": item.box.shape, "data_offsets": (start, end)}
        relative.append(entry)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    boxes = [StoredBox(entry.tensor, entry.box, name, len(head) + entry.position) for entry in relative]
    return head, boxes, len(head) + end


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


def data_file_name(group: str, rank: int) -> str:
    """The name of a rank's file of a group."""
    return f"{group}-{rank:05d}.safetensors"


def write_durably(path: Path, data: bytes) -> None:
    """A new file whose bytes are on disk at the return."""
    with open(path, "xb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
