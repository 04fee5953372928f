"""A folder of PyTorch's distributed checkpoint (DCP): `.metadata` and `*.distcp` files.

`.metadata` says of each tensor its shape, dtype and boxes, and of each box in which file it lies, from which byte on, in how
many bytes: there is a file of torch.save of its own, holding the box. Objects that are no tensors lie there likewise.

Reading does not use DCP's loader, which unpickles `.metadata` and objects and looks at no checksum. Every size and position is
checked before anything is allocated. Writing is DCP's own, one tensor at a time.

Source: torch 2.13, torch/distributed/checkpoint/{metadata,filesystem,default_planner}.py.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_llama.interop.torch_files import load_torch_bytes
from megatron_llama.interop.unpickle import Record, read_metadata
from parallel.checkpoint.manifest import DTYPES, MAX_DIMS, dtype_name, find_overlap
from parallel.errors import CheckpointError
from parallel.shards import Box

METADATA_NAME = ".metadata"
FILE_BYTES = 4 << 30  # a file written is closed when it has as many


@dataclass(frozen=True)
class Slice:
    """Bytes of a file, which are a file of torch.save."""

    path: Path
    position: int
    length: int

    def read(self) -> bytes:
        """Them. Raises CheckpointError where they are not there, or damaged."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.position)
                content = file.read(self.length)
        except OSError as error:
            raise CheckpointError(f"{self} cannot be read: {error.strerror}") from error
        if len(content) != self.length:
            raise CheckpointError(f"{self} are not all there")
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                damaged = archive.testzip()  # torch.save leaves a CRC32 of each record, at which torch.load does not look
        except Exception as error:  # a damaged archive may raise anything
            raise CheckpointError(f"{self} are not a file of torch.save: {error}") from error
        if damaged:
            raise CheckpointError(f"{self} are damaged: the checksum of {damaged[:200]} does not match: copy the file again")
        return content

    def __str__(self) -> str:
        return f"{self.path}, bytes {self.position} to {self.position + self.length},"


@dataclass(frozen=True)
class DcpTensor:
    """A tensor of a folder; its pieces cover it once."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[Box, Slice], ...]

    def read(self, box: Box | None = None) -> Tensor:
        """The part of it in `box` (default: all of it). Raises CheckpointError naming the file that does not hold it."""
        box = box or Box.whole(self.shape)
        for piece, place in self.pieces:
            if piece == box:
                return self._read_piece(piece, place)
        result = torch.empty(box.shape, dtype=self.dtype)
        for piece, place in self.pieces:
            common = piece.intersect(box)
            if common is not None:
                part = self._read_piece(piece, place)[common.shifted(piece.offset, (0,) * len(piece.offset)).slices()]
                result[common.shifted(box.offset, (0,) * len(box.offset)).slices()] = part
        return result

    def _read_piece(self, piece: Box, place: Slice) -> Tensor:
        tensor = load_torch_bytes(place.read(), str(place))
        dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not dense or tuple(tensor.shape) != piece.shape or tensor.dtype != self.dtype:
            expected = f"{dtype_name(self.dtype)} {list(piece.shape)} of {self.key}"
            raise CheckpointError(f"{place} are not {expected}, as {METADATA_NAME} says")
        return tensor.detach()


class DcpFolder:
    """What lies in a folder. `tensors` and `objects` are keys; what they mean is checked when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where `path` is not a complete folder of DCP."""
        self.path = path
        metadata = read_metadata(path / METADATA_NAME)
        entries, places = metadata.attribute("state_dict_metadata"), metadata.attribute("storage_data")
        if not isinstance(entries, dict) or not isinstance(places, dict):
            raise self._wrong("lists no tensors")
        self._entries = {key: entry for key, entry in entries.items() if isinstance(key, str) and isinstance(entry, Record)}
        self._places: dict[tuple[object, object], Record] = {}
        for index, place in places.items():
            if not isinstance(index, Record) or not isinstance(place, Record):
                raise self._wrong("does not tell where the tensors lie")
            offset = index.attribute("offset")
            if not isinstance(index.attribute("fqn"), str) or not (offset is None or isinstance(offset, tuple)):
                raise self._wrong("does not tell which tensors lie where")
            self._places[index.attribute("fqn"), None if offset is None else self._sizes(offset, "an offset")] = place
        self._file_sizes: dict[str, int] = {}
        self.tensors = [key for key, entry in self._entries.items() if entry.name == "TensorStorageMetadata"]
        self.objects = [key for key, entry in self._entries.items() if entry.name == "BytesStorageMetadata"]

    def tensor(self, key: str) -> DcpTensor:
        """Its shape and pieces. Raises CheckpointError where they lie outside their files, overlap, or leave a gap."""
        entry = self._entries[key]
        shape = self._sizes(entry.attribute("size"), f"the shape of {key}")
        properties, chunks = entry.attribute("properties"), entry.attribute("chunks")
        state = properties.state if isinstance(properties, Record) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if dtype not in DTYPES.values() or not isinstance(chunks, list):
            raise self._wrong(f"tells no dtype and pieces of {key} that can be read")
        pieces = tuple(self._piece(key, shape, dtype, chunk) for chunk in chunks)
        overlap = find_overlap(box for box, _ in pieces if box.numel)
        covered, needed = sum(box.numel for box, _ in pieces), math.prod(shape)
        if overlap:
            first, second = (list(box.offset) for box in overlap)
            raise self._wrong(f"has pieces of {key} at {first} and {second} that overlap")
        if covered != needed:
            raise self._wrong(f"lists {covered} of the {needed} elements of {key}, {list(shape)}: a part of it was not saved")
        return DcpTensor(key, shape, dtype, pieces)

    def object(self, key: str) -> tuple[bytes, str]:
        """The file of torch.save that an object is, and where it is."""
        place = self._slice(key, None)
        return place.read(), f"{place.path} ({key})"

    def _piece(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, chunk: object) -> tuple[Box, Slice]:
        if not isinstance(chunk, Record):
            raise self._wrong(f"describes no piece of {key}")
        box = Box(*(self._sizes(chunk.attribute(name), f"the {name} of a piece of {key}") for name in ("offsets", "sizes")))
        if not len(box.offset) == len(box.shape) == len(shape) or not Box.whole(shape).contains(box):
            raise self._wrong(f"has a piece {list(box.offset)} + {list(box.shape)} outside of {key} {list(shape)}")
        place = self._slice(key, box.offset)
        if place.length < box.numel * dtype.itemsize:
            raise self._wrong(f"says that {list(box.shape)} of {key} are in the {place.length} bytes at {place}")
        return box, place

    def _slice(self, key: str, offset: tuple[int, ...] | None) -> Slice:
        place = self._places.get((key, offset))
        if place is None:
            raise self._wrong(f"does not tell where {key}{'' if offset is None else f' at {list(offset)}'} lies")
        transforms = place.attribute("transform_descriptors")
        if transforms:
            raise self._wrong(f"says that {key} was written through {str(transforms)[:80]}, which is not supported")
        name, span = place.attribute("relative_path"), (place.attribute("offset"), place.attribute("length"))
        if not isinstance(name, str) or Path(name).name != name:
            raise self._wrong(f"names {str(name)[:200]!r}, which is not a file of this folder")
        position, length = self._sizes(span, f"the place of {key}")
        if position + length > self._size(name):
            raise CheckpointError(f"{self.path / name} has {self._size(name)} bytes: {key} should end at {position + length}")
        return Slice(self.path / name, position, length)

    def _size(self, name: str) -> int:
        if name not in self._file_sizes:
            path = self.path / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: is the copy complete?")
            self._file_sizes[name] = path.stat().st_size
        return self._file_sizes[name]

    def _sizes(self, values: object, what: str) -> tuple[int, ...]:
        good = isinstance(values, tuple) and len(values) <= MAX_DIMS
        if not good or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
            raise self._wrong(f"has {str(values)[:100]} as {what}")
        return values

    def _wrong(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path / METADATA_NAME} {text}")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor to be written. `read` makes it, of the box's shape and of `dtype`, when its turn comes."""

    key: str
    shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_dcp(directory: Path, chunks: Sequence[Chunk], objects: Mapping[str, bytes] | None = None) -> None:
    """Write a folder of DCP; one chunk is in memory at a time.

    Raises OSError, and what the `read` of a chunk does.
    """
    planner = _LazyPlanner(chunks, objects or {})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # ... disabled: here this is the intent
            dcp.save({}, storage_writer=_LazyWriter(directory), planner=planner, no_dist=True)
    except CheckpointException as error:  # a BaseException
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


class _LazyPlanner(dcp.DefaultSavePlanner):
    """Plans from descriptions, and makes a tensor when the writer asks for it."""

    def __init__(self, chunks: Sequence[Chunk], objects: Mapping[str, bytes]) -> None:
        super().__init__()
        self._chunks = {(chunk.key, torch.Size(chunk.box.offset)): chunk for chunk in chunks}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        items = [_tensor_item(chunk) for chunk in self._chunks.values()]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan(items, planner_data={item.index.fqn: (item.index.fqn,) for item in items})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[index.fqn])
        chunk = self._chunks[index.fqn, index.offset]
        tensor = chunk.read()
        assert tuple(tensor.shape) == chunk.box.shape and tensor.dtype == chunk.dtype, chunk.key
        return tensor


class _LazyWriter(dcp.FileSystemWriter):
    """DCP's own writer keeps all tensors of a file until it is complete; this one forgets each as soon as it is written."""

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        items, number = list(plan.items), 0
        while items:
            name = f"__0_{number}.distcp"
            with open(self.path / name, "wb") as file:
                while items and file.tell() < FILE_BYTES:
                    item, start = items.pop(0), file.tell()
                    _save(planner.resolve_data(item), file)
                    length = file.tell() - start
                    results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            number += 1
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _save(content: Tensor | io.BytesIO, file: BinaryIO) -> None:
    if isinstance(content, io.BytesIO):
        file.write(content.getbuffer())
    else:
        is_part = content.untyped_storage().nbytes() != content.nbytes  # torch.save would write all of its storage
        torch.save(content.clone() if is_part else content, file)


def _tensor_item(chunk: Chunk) -> WriteItem:
    offset, size = torch.Size(chunk.box.offset), torch.Size(chunk.box.shape)
    data: Any = TensorWriteData(ChunkStorageMetadata(offset, size), TensorProperties(chunk.dtype), torch.Size(chunk.shape))
    return WriteItem(MetadataIndex(chunk.key, offset), WriteItemType.SHARD, tensor_data=data)
