"""PyTorch DCP's `.metadata`, which is a pickle, read without making an object of any class but our own.

A pickle calls what it names. Here each name that `.metadata` files contain stands for an inert `Record`, and any other name
ends the reading. What comes out are plain values, tuples and Records whose contents are still to be checked: `dcp_files`
does it.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError

MAX_METADATA_BYTES = 1 << 30

# What `.metadata` files of torch 2.2 to 2.13 and of Megatron-Core name, besides torch.Size and dtypes.
DCP = "torch.distributed.checkpoint"
RECORDS = frozenset(
    {
        f"{DCP}.metadata.Metadata",
        f"{DCP}.metadata.MetadataIndex",
        f"{DCP}.metadata.TensorStorageMetadata",
        f"{DCP}.metadata.BytesStorageMetadata",
        f"{DCP}.metadata.ChunkStorageMetadata",
        f"{DCP}.metadata.TensorProperties",
        f"{DCP}.metadata._MEM_FORMAT_ENCODING",
        f"{DCP}.metadata.StorageMeta",
        f"{DCP}.filesystem._StorageInfo",
        f"{DCP}.planner.SavePlan",  # Megatron-Core keeps its plans
        f"{DCP}.planner.WriteItem",
        f"{DCP}.planner.WriteItemType",
        f"{DCP}.planner.TensorWriteData",
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",  # torch 2.2 and before
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
    }
)


class Record:
    """An object of a class that is not made: its `name`, what it would have been called with, its attributes.

    `state` holds what the class's own `__setstate__` would have been given.
    """

    name = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def attribute(self, name: str) -> Any:
        """One of its attributes; None where it has none of that name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class MetadataUnpickler(pickle.Unpickler):
    """Knows RECORDS, torch.Size (as a tuple) and dtypes, and refuses every other name."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._records: dict[str, type[Record]] = {}  # of this file alone: a pickle may set attributes of a class

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in RECORDS:
            return self._records.setdefault(full, type("Record", (Record,), {"name": name, "__module__": __name__}))
        if full == "torch.Size":
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {full[:200]}, which has no place in such a file, and was not called")


def read_metadata(path: Path) -> Record:
    """The Metadata in the file `path`. Raises CheckpointError naming the file, and the class that it should not name."""
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_METADATA_BYTES:,}")
        content = MetadataUnpickler(path.read_bytes()).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}: is it a folder of PyTorch DCP?") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} cannot be read: {str(error)[:300] or type(error).__name__}") from error
    if not isinstance(content, Record) or content.name != "Metadata":
        raise CheckpointError(f"{path} does not hold DCP's Metadata")
    return content
