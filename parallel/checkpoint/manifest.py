"""The manifest of a checkpoint: which box of which named global tensor lies in which file, and the checksums.

A step directory holds
    {group}-{rank:05d}.safetensors   keys `name@o0,o1` (the box's offset); any safetensors reader opens them
    manifest.json                    this module: tensors, files with a CRC32 per block, boxes, the caller's state
    COMMIT                           sha256 of manifest.json, in hex; written last
    other small files                such as tokenizer.model; listed in the manifest with size and CRC32

Nothing in a checkpoint is trusted before it has been checked: names match strict patterns, every size and position is an
integer inside its file, and the boxes of each tensor cover it exactly once. All this needs only the manifest and `stat`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import stat
from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path

import torch

from parallel.errors import CheckpointError
from parallel.shards import Box

FORMAT = "megatron-llama-checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
COMMIT_NAME = "COMMIT"
VERIFIED_NAME = "VERIFIED"  # when all of it was last found good (retention.py); no part of the checkpoint
BLOCK_BYTES = 4 << 20  # one CRC32 each; also the size of the staging and bounce buffers
MAX_MANIFEST_BYTES = 256 << 20
MAX_BLOCK_BYTES = 64 << 20
MAX_DIMS = 8

TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,255}")
GROUP_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
DATA_FILE_NAME = re.compile(r"([a-z][a-z0-9_]{0,31})-[0-9]{5,7}\.safetensors")
EXTRA_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

# dtype -> its code in a safetensors header
SAFETENSORS_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_CODES}  # the manifest's names: "float32"


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`, as manifests and messages say it."""
    return str(dtype).removeprefix("torch.")


class DamagedError(CheckpointError):
    """Part of a checkpoint is absent, or not as it was saved: `file`, or its block of that number. Other steps may be good."""

    def __init__(self, text: str, file: str, block: int | None = None):
        super().__init__(text)
        self.file = file
        self.block = block


@dataclass(frozen=True)
class TensorInfo:
    """A global tensor: its full shape, its dtype, and the group of files that holds it ("weights", "optimizer")."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: str


@dataclass(frozen=True)
class FileInfo:
    """A safetensors file: its size and the CRC32 of each block of `block_size` bytes (the last may be shorter)."""

    name: str
    size: int
    block_size: int
    crc32: tuple[int, ...]

    def block(self, index: int) -> tuple[int, int]:
        """The byte range [start, stop) of block `index`."""
        return index * self.block_size, min(self.size, (index + 1) * self.block_size)


@dataclass(frozen=True)
class ExtraFile:
    """A small file stored beside the tensors."""

    size: int
    crc32: int


@dataclass(frozen=True)
class StoredBox:
    """`box` of the global tensor `tensor`: row-major in `file` from byte `position` on."""

    tensor: str
    box: Box
    file: str
    position: int

    @property
    def key(self) -> str:
        """Its key in the safetensors header."""
        return f"{self.tensor}@{','.join(map(str, self.box.offset))}"


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint holds. `state` is the caller's own JSON object (config, data position, ...)."""

    step: int
    tensors: dict[str, TensorInfo]
    files: dict[str, FileInfo]
    boxes: list[StoredBox]
    state: dict = field(default_factory=dict)
    extra_files: dict[str, ExtraFile] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(info.size for info in self.files.values())

    def check(self, where: str) -> None:
        """Names, bounds, and that the boxes of each tensor cover it exactly once; O(n log n) in the number of boxes.

        Raises CheckpointError, its text starting with `where` (the directory).
        """
        for name, info in self.tensors.items():
            _need(TENSOR_NAME.fullmatch(name), f"{where}: {name[:300]!r} is not allowed as the name of a tensor")
            _need(GROUP_NAME.fullmatch(info.group), f"{where}: tensor {name}: bad group name {info.group[:300]!r}")
            _need(len(info.shape) <= MAX_DIMS, f"{where}: tensor {name} has {len(info.shape)} dims, more than {MAX_DIMS}")
        for info in self.files.values():
            _check_file(info, where)
        for name in self.extra_files:
            _need(is_extra_file_name(name), f"{where}: {name[:300]!r} is not allowed as the name of an extra file")
        by_tensor: dict[str, list[StoredBox]] = {name: [] for name in self.tensors}
        by_file: dict[str, list[StoredBox]] = {name: [] for name in self.files}
        for stored in self.boxes:
            _need(stored.tensor in by_tensor, f"{where}: a box of {stored.tensor[:300]!r}: no such tensor is listed")
            _need(stored.file in by_file, f"{where}: a box lies in {stored.file[:300]!r}: no such file is listed")
            by_tensor[stored.tensor].append(stored)
            by_file[stored.file].append(stored)
        for name, boxes in by_tensor.items():
            _check_cover(name, self.tensors[name].shape, boxes, where)
        for name, boxes in by_file.items():
            self._check_positions(self.files[name], boxes, where)

    def _check_positions(self, info: FileInfo, boxes: list[StoredBox], where: str) -> None:
        """The boxes of a file lie one after the other inside it, aligned, and belong to its group."""
        group = DATA_FILE_NAME.fullmatch(info.name)[1]
        end = 8  # of the part of the file that is taken: first the length of the header
        for stored in sorted(boxes, key=lambda stored: stored.position):
            tensor = self.tensors[stored.tensor]
            text = f"{where}: {info.name}: box {stored.key}"
            _need(tensor.group == group, f"{text} belongs to group {tensor.group!r}")
            _need(stored.position % tensor.dtype.itemsize == 0, f"{text} starts at byte {stored.position}: not aligned")
            _need(stored.position >= end, f"{text} starts at byte {stored.position}, inside what ends at byte {end}")
            end = stored.position + stored.box.numel * tensor.dtype.itemsize
            _need(end <= info.size, f"{text} ends at byte {end}, the file at byte {info.size}")

    def to_json(self) -> bytes:
        """The bytes of manifest.json. Raises CheckpointError where `state` is not made of JSON values."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "tensors": {
                name: {"shape": info.shape, "dtype": dtype_name(info.dtype), "group": info.group}
                for name, info in self.tensors.items()
            },
            "files": [vars(info) for info in self.files.values()],
            "boxes": [[b.tensor, b.box.offset, b.box.shape, b.file, b.position] for b in self.boxes],
            "state": self.state,
            "extra_files": {name: vars(info) for name, info in self.extra_files.items()},
        }
        try:
            return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError) as error:
            text = f"the state of a checkpoint must be JSON values (finite numbers, text, lists, objects): {error}"
            raise CheckpointError(text) from error

    @classmethod
    def from_json(cls, data: bytes, where: str, check: bool = True) -> Manifest:
        """Parse and, with `check`, check. Raises CheckpointError, its text starting with `where`."""
        try:
            fields = json.loads(data, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}: {MANIFEST_NAME} is not valid JSON: {error}") from error
        try:
            manifest = cls._from_fields(fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            text = f"{where}: {MANIFEST_NAME} is not a manifest of version {VERSION}: {type(error).__name__}: {error}"
            raise CheckpointError(text) from error
        if check:
            manifest.check(where)
        return manifest

    @classmethod
    def _from_fields(cls, fields: dict) -> Manifest:
        if fields["format"] != FORMAT or fields["version"] != VERSION:
            found = f"format {fields['format']!r}, version {fields['version']!r}"
            raise ValueError(f"{found}: this program reads {FORMAT!r}, version {VERSION}")
        tensors = {
            name: TensorInfo(_integers(info["shape"]), _dtype(info["dtype"]), _text(info["group"]))
            for name, info in fields["tensors"].items()
        }
        infos = [
            FileInfo(_text(info["name"]), _integer(info["size"]), _integer(info["block_size"]), _integers(info["crc32"]))
            for info in fields["files"]
        ]
        files = {info.name: info for info in infos}
        if len(files) != len(infos):
            raise ValueError("a file is listed twice")
        boxes = [
            StoredBox(_text(tensor), Box(_integers(offset), _integers(shape)), _text(file), _integer(position))
            for tensor, offset, shape, file, position in fields["boxes"]
        ]
        extra = {
            name: ExtraFile(_integer(info["size"]), _integer(info["crc32"])) for name, info in fields["extra_files"].items()
        }
        if not isinstance(fields["state"], dict):
            raise ValueError("state is not an object")
        return cls(_integer(fields["step"]), tensors, files, boxes, fields["state"], extra)


def read_manifest(directory: Path, groups: Collection[str] | None = None) -> Manifest:
    """Read and check the manifest of the step directory `directory`, before anything is allocated.

    Checked: COMMIT, every name, shape, position and cover of tensors, and that each file is there with its size. With
    `groups` only files of these groups need be there, so a copy without the optimizer's files serves where weights are enough.
    Raises CheckpointError that names the directory and the file; DamagedError where files are absent or not as they were saved.
    """
    data = _read_small(directory, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    commit = _read_small(directory, COMMIT_NAME, 256)
    if commit != hashlib.sha256(data).hexdigest().encode():
        raise DamagedError(
            f"{directory}: {MANIFEST_NAME} and {COMMIT_NAME} do not belong together (one of them is damaged): use another step",
            MANIFEST_NAME,
        )
    manifest = Manifest.from_json(data, str(directory))
    for info in manifest.files.values():
        if groups is None or info.name.rsplit("-", 1)[0] in groups:
            check_size(directory, info.name, info.size)
    for name, extra in manifest.extra_files.items():
        check_size(directory, name, extra.size)
    return manifest


def check_size(directory: Path, name: str, size: int) -> None:
    """Raise CheckpointError unless `name` is a regular file of `size` bytes (DamagedError unless it may not be looked at)."""
    try:
        status = (directory / name).stat()
    except OSError as error:
        text = f"{directory}: the manifest lists {name}, which cannot be read: {error.strerror}"
        raise unreadable(text, error, name) from error
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(f"{directory}: {name} is not a regular file", name)
    if status.st_size != size:
        kind = "truncated" if status.st_size < size else "not the one that was saved"
        raise DamagedError(
            f"{directory}: {name} has {status.st_size} bytes, the manifest says {size}: the file is {kind}; "
            "copy it again or use another step",
            name,
        )


def unreadable(text: str, error: OSError, file: str, block: int | None = None) -> CheckpointError:
    """What to raise where a file cannot be read: it is damaged where it is absent, or its disk gives it no more.

    Missing rights or a network that is down say nothing about the checkpoint.
    """
    gone = error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EIO)
    return DamagedError(text, file, block) if gone else CheckpointError(text)


def is_extra_file_name(name: str) -> bool:
    """Whether a small file may be stored under this name."""
    reserved = name in (MANIFEST_NAME, COMMIT_NAME, VERIFIED_NAME) or name.endswith(".safetensors") or name.startswith("part-")
    return EXTRA_FILE_NAME.fullmatch(name) is not None and not reserved


def find_overlap(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None. All must have the same number of dims and no empty dim.

    A sweep over dim 0. The boxes that lie in the sweep's row are disjoint, so in two dims, kept in the order of their
    columns, a new one can only meet its two neighbours: O(n log n). In three and more it is compared with the whole row.
    """
    in_row: list[tuple[int, ...]] = []  # offsets in dims 1.., sorted, of the boxes in the sweep's row
    box_at: dict[tuple[int, ...], Box] = {}
    ends: list[tuple[int, tuple[int, ...]]] = []  # heap of (row after the box, its offset in dims 1..)
    for box in sorted(boxes, key=lambda box: box.offset):
        columns = box.offset[1:]
        while ends and ends[0][0] <= (box.offset[0] if box.offset else 0):
            ended = heappop(ends)[1]
            del in_row[bisect_left(in_row, ended)]
            del box_at[ended]
        place = bisect_left(in_row, columns)
        for other in in_row[max(place - 1, 0) : place + 1] if len(columns) < 2 else in_row:
            if box.intersect(box_at[other]):
                return box_at[other], box
        in_row.insert(place, columns)
        box_at[columns] = box
        heappush(ends, (box.end[0] if box.offset else 1, columns))
    return None


def _check_cover(name: str, shape: tuple[int, ...], stored_boxes: list[StoredBox], where: str) -> None:
    whole = Box.whole(shape)
    for stored in stored_boxes:
        box = stored.box
        good = len(box.offset) == len(box.shape) == len(shape) and all(box.shape) and whole.contains(box)
        _need(good, f"{where}: box {box.offset} + {box.shape} of {stored.file} does not lie in {name} of shape {list(shape)}")
    pair = find_overlap(stored.box for stored in stored_boxes)
    if pair:
        files = [stored.file for stored in stored_boxes if stored.box in pair]
        texts = " and ".join(f"{box.offset} + {box.shape}" for box in pair)
        raise CheckpointError(f"{where}: boxes {texts} of {name} overlap (files {', '.join(sorted(set(files)))})")
    covered = sum(stored.box.numel for stored in stored_boxes)
    needed = math.prod(shape)
    _need(covered == needed, f"{where}: the boxes of {name} {list(shape)} cover {covered} of its {needed} elements")


def _check_file(info: FileInfo, where: str) -> None:
    _need(DATA_FILE_NAME.fullmatch(info.name), f"{where}: {info.name[:300]!r} is not allowed as the name of a data file")
    good_block = 4096 <= info.block_size <= MAX_BLOCK_BYTES and info.block_size % 16 == 0
    _need(good_block, f"{where}: {info.name}: a block size of {info.block_size} bytes is not allowed")
    blocks = -(-info.size // info.block_size)
    _need(len(info.crc32) == blocks, f"{where}: {info.name} has {blocks} blocks and {len(info.crc32)} checksums")


def _read_small(directory: Path, name: str, limit: int) -> bytes:
    path = directory / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{directory}: {name} is not a regular file", name)
        if status.st_size > limit:
            raise DamagedError(f"{directory}: {name} has {status.st_size} bytes, more than {limit}", name)
        return path.read_bytes()
    except OSError as error:
        reason = "not a committed checkpoint, or an incomplete copy of one"
        text = f"{directory}: {name} cannot be read ({error.strerror}): {reason}"
        raise unreadable(text, error, name) from error


def _need(condition: object, text: str) -> None:
    if not condition:
        raise CheckpointError(text)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _integer(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{str(value)[:100]!r} is not an integer from 0 to 2^62")
    return value


def _integers(values: object) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{str(values)[:100]!r} is not a list of integers")
    return tuple(_integer(value) for value in values)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:100]!r} is not text")
    return value


def _dtype(value: object) -> torch.dtype:
    dtype = DTYPES.get(_text(value))
    if dtype is None:
        raise ValueError(f"the dtype {str(value)[:100]!r} is not one of {', '.join(DTYPES)}")
    return dtype
