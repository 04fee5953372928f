"""Read a checkpoint: fill tensors of any layout from whatever boxes are stored, and trust no byte before its checksum.

Files are read block by block, each block that is needed once on a node, each verified before anything is taken from it. A
block that one rank alone needs it reads itself: straight into the destination where that is contiguous, else by way of a
buffer. Blocks that several ranks of a node need, as where rows become columns, are read in rounds: each rank reads and
verifies one block into memory that the node shares, the ranks agree that all are good, and each takes its part of each. So
what a rank takes is what has been verified, whoever did it. (To verify all first, and let each rank read its part of the files
later, would need no shared memory, but what is read later is not what was verified.)
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.manifest import (
    MAX_BLOCK_BYTES,
    SAFETENSORS_CODES,
    DamagedError,
    FileInfo,
    Manifest,
    StoredBox,
    check_size,
    read_manifest,
    unreadable,
)
from parallel.checkpoint.readers import Readers
from parallel.checkpoint.steps import committed_steps, newest_checkpoint, resolve_checkpoint, step_directory
from parallel.checkpoint.transfers import Transfer, plan
from parallel.errors import CheckpointError
from parallel.shards import TensorBox

__all__ = [
    "committed_steps",
    "find_damage",
    "load_tensors",
    "newest_checkpoint",
    "read_extra_file",
    "read_manifest",
    "resolve_checkpoint",
    "step_directory",
    "verify_checkpoint",
]

SHARED_BYTES = MAX_BLOCK_BYTES  # at most, of a node's memory for the blocks of a round
Block = tuple[str, int]  # its file and its number there
Blocks = dict[Block, list[Transfer]]  # who wants some of it


@torch.no_grad()
def load_tensors(
    directory: Path,
    targets: Iterable[TensorBox],
    manifest: Manifest | None = None,
    readers: Readers | None = None,
    widen: bool = False,
) -> Manifest:
    """Fill every target's tensor in place from the step directory, and return the manifest.

    Targets may be any boxes of the stored tensors, of any layout, on any device; names, global shapes and dtypes must be the
    stored ones, and every element of every target is filled. Every block read is verified; bytes that no target needs are
    not read (`verify_checkpoint` reads all).
    readers: the ranks that load together, each with its own targets; all call it together. None: this process alone.
    widen: a target's dtype may also be a wider one that holds every stored value exactly, such as fp32 for bf16.

    Extra memory: one block (4 MiB) a rank, pinned for device targets, and what the node shares, two a rank and 64 MiB at most.
    Raises CheckpointError, on all ranks where one of them has found something, naming the directory and the tensor, before
    anything is read, where targets and checkpoint do not fit; DamagedError naming the file and block where bytes are damaged
    (then targets may be partly filled: do not use them).
    """
    directory, readers = Path(directory), readers or Readers()

    def prepare() -> tuple[Manifest, Blocks]:
        found = read_manifest(directory) if manifest is None else manifest
        blocks = _blocks(plan(directory, list(targets), found, widen), found)
        for name in dict.fromkeys(name for name, _ in blocks):
            check_size(directory, name, found.files[name].size)
        return found, blocks

    manifest, blocks = readers.together(prepare)
    shared, memory = _shared_blocks(blocks, manifest, readers)
    own = {block: blocks[block] for block in blocks.keys() - set(shared)}
    readers.together(lambda: _read_own(directory, manifest, dict(sorted(own.items()))))
    readers.together(lambda: _read_shared(directory, manifest, shared, blocks, memory, readers))
    return manifest


def find_damage(directory: Path, progress: Callable[[int], None] | None = None) -> Iterator[DamagedError]:
    """Read every byte of the step directory, and compare the safetensors headers with the manifest.

    Yields what is damaged, by file and block. `progress` is told the bytes that each read brought. Raises CheckpointError where
    the manifest cannot be trusted (DamagedError, too), or a file cannot be opened for lack of rights.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    boxes: dict[str, list[StoredBox]] = {name: [] for name in manifest.files}
    for stored in manifest.boxes:
        boxes[stored.file].append(stored)
    for info in manifest.files.values():
        buffer, good = memoryview(bytearray(min(info.block_size, info.size))), True
        with _BlockReader(directory, info) as reader:
            for index in range(len(info.crc32)):
                start, stop = info.block(index)
                try:
                    reader.read(index, buffer[: stop - start])
                except DamagedError as error:
                    good = False
                    yield error
                if progress is not None:
                    progress(stop - start)
        if good:
            _verify_header(directory, info, boxes[info.name], manifest)
    for name in manifest.extra_files:
        try:
            read_extra_file(directory, name, manifest)
        except DamagedError as error:
            yield error


def verify_checkpoint(directory: Path, progress: Callable[[int], None] | None = None) -> Manifest:
    """Check every byte of the step directory, and that the safetensors headers say what the manifest says.

    Raises CheckpointError naming the file, and the block. `progress` is told the bytes that each read brought.
    """
    for damage in find_damage(directory, progress):
        raise damage
    return read_manifest(directory)


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
        raise unreadable(f"{directory}: {name} cannot be read: {error.strerror}", error, name) from error
    if zlib.crc32(data) != info.crc32:
        raise DamagedError(f"{directory}: {name} is damaged (CRC32 mismatch): copy it again or use another step", name)
    return data


def verify_block(directory: Path, info: FileInfo, index: int) -> None:
    """Read block `index` of a file again. Raises DamagedError, or CheckpointError for lack of rights."""
    start, stop = info.block(index)
    with _BlockReader(Path(directory), info) as reader:
        reader.read(index, memoryview(bytearray(stop - start)))


def _blocks(transfers: Iterable[Transfer], manifest: Manifest) -> Blocks:
    """The blocks that hold some byte of a transfer, in the order of their files and positions."""
    blocks: Blocks = {}
    for transfer in transfers:
        info = manifest.files[transfer.stored.file]
        for index in range(transfer.start // info.block_size, (transfer.stop - 1) // info.block_size + 1):
            if transfer.wants(*info.block(index)):
                blocks.setdefault((info.name, index), []).append(transfer)
    return dict(sorted(blocks.items()))


def _shared_blocks(blocks: Blocks, manifest: Manifest, readers: Readers) -> tuple[list[Block], Tensor | None]:
    """The blocks that several ranks of the node want, and the memory [2, slots, bytes] by way of which they get them.

    Where the node can share no memory, every rank reads alone.
    """
    every = [(info.name, index) for info in manifest.files.values() for index in range(len(info.crc32))]
    wanted = torch.tensor([block in blocks for block in every], dtype=torch.int64)
    shared = [block for block, count in zip(every, readers.node_sum(wanted).tolist(), strict=True) if count > 1]
    if not shared:
        return [], None
    size = max(manifest.files[name].block_size for name, _ in shared)
    slots = max(1, min(readers.node_size, SHARED_BYTES // (2 * size)))
    memory = readers.node_memory(2 * slots * size)
    return ([], None) if memory is None else (shared, memory.view(2, slots, size))


def _read_own(directory: Path, manifest: Manifest, blocks: Blocks) -> None:
    """Read the blocks that this rank takes alone."""
    buffer = torch.empty(0, dtype=torch.uint8)
    on_device = any(transfer.target.tensor.is_cuda for wanting in blocks.values() for transfer in wanting)
    for name, of_file in groupby(blocks.items(), key=lambda item: item[0][0]):
        info = manifest.files[name]
        with _BlockReader(directory, info) as reader:
            for (_, index), wanting in of_file:
                start, stop = info.block(index)
                direct = wanting[0].destination(start, stop) if len(wanting) == 1 else None
                if direct is not None:
                    reader.read(index, memoryview(direct.numpy()))
                    continue
                if buffer.numel() < stop - start:
                    buffer = torch.empty(info.block_size, dtype=torch.uint8, pin_memory=on_device)
                block = buffer[: stop - start]
                reader.read(index, memoryview(block.numpy()))
                for transfer in wanting:
                    transfer.copy_from(block, start)


def _read_shared(
    directory: Path, manifest: Manifest, shared: list[Block], blocks: Blocks, memory: Tensor | None, readers: Readers
) -> None:
    """Read the blocks that several ranks of the node want, as many at once as there are slots. All its ranks call it together.

    While one half of the slots is filled, what the other half holds is taken: a half is filled anew after all ranks of the node
    have said that they have taken from it. Where a rank fails it raises, and the others return.
    """
    slots = memory.shape[1] if memory is not None else 1
    ready: list[_Place] = []
    for number, first in enumerate(range(0, len(shared), slots)):
        turn: list[_Place] = []
        for slot, (name, index) in zip(memory[number % 2], shared[first : first + slots], strict=False):
            start, stop = manifest.files[name].block(index)
            turn.append((slot[: stop - start], manifest.files[name], index))
        mine = [place for i, place in enumerate(turn, first) if i % readers.node_size == readers.node_rank]
        if not readers.node_agrees(partial(_take_and_read, directory, ready, blocks, mine)):
            return
        ready = turn
    _take_and_read(directory, ready, blocks, [])


_Place = tuple[Tensor, FileInfo, int]  # a slot of the shared memory, and the block that goes there


def _take_and_read(directory: Path, ready: list[_Place], blocks: Blocks, mine: list[_Place]) -> None:
    """Take what this rank wants of the blocks that are there, and read those that are its turn."""
    for memory, info, index in ready:
        for transfer in blocks.get((info.name, index), ()):
            transfer.copy_from(memory, info.block(index)[0])
    for memory, info, index in mine:
        with _BlockReader(directory, info) as reader:
            reader.read(index, memoryview(memory.numpy()))


class _BlockReader:
    """Reads whole blocks of a file and verifies each."""

    def __init__(self, directory: Path, info: FileInfo):
        self.info = info
        self._directory = directory
        try:
            self._file = open(directory / info.name, "rb", buffering=0)
        except OSError as error:
            raise unreadable(f"{directory}: {info.name} cannot be read: {error.strerror}", error, info.name) from error

    def __enter__(self) -> _BlockReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, index: int, into: memoryview) -> None:
        """Fill `into`, as long as the block, with block `index`."""
        start, stop = self.info.block(index)
        text = f"{self._directory}: {self.info.name}, block {index} (bytes {start} to {stop})"
        filled = 0
        try:
            while filled < stop - start:
                count = os.preadv(self._file.fileno(), [into[filled:]], start + filled)
                if count == 0:
                    ends = f"the file ends at byte {start + filled}"
                    raise DamagedError(f"{text}: {ends}: truncated; use another step", self.info.name, index)
                filled += count
        except OSError as error:
            raise unreadable(f"{text} cannot be read: {error.strerror}", error, self.info.name, index) from error
        found = zlib.crc32(into)
        if found != self.info.crc32[index]:
            raise DamagedError(
                f"{text} is damaged: CRC32 {found:08x}, the manifest says {self.info.crc32[index]:08x}; "
                "copy the file again or use another step",
                self.info.name,
                index,
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
