"""Files made by torch.save, read without running what may be in them."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.errors import CheckpointError

Allowed = type | tuple[type, str]


def load_torch_file(path: Path, allowed: Sequence[Allowed] = ()) -> Any:
    """What torch.save wrote to `path`: tensors (mapped, not read), containers, numbers and text, and the classes `allowed`.

    One of them may also be a pair (stand-in, "module.Name"). Raises CheckpointError naming the file: where it holds another
    class, which is never called, and where a byte is not as it was written (files older than torch 1.6 have no checksums).
    """
    if path.is_file():
        found = path.stat()
        _check_sums(path, found.st_size, found.st_mtime_ns)
    return _load(path, str(path), allowed, mmap=True)


@cache
def _check_sums(path: Path, size: int, changed: int) -> None:
    """torch.save leaves a CRC32 of each record, at which torch.load does not look. Once per file: it is read for this."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged: {error}: copy it again") from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged[:200]} does not match: copy it again")


def load_torch_bytes(content: bytes, origin: str, allowed: Sequence[Allowed] = ()) -> Any:
    """As `load_torch_file`, of bytes in memory, whose place is `origin` in messages."""
    return _load(io.BytesIO(content), origin, allowed, mmap=False)


def _load(source: Path | io.BytesIO, origin: str, allowed: Sequence[Allowed], mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise CheckpointError(f"{origin} does not exist") from error
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        unsafe = next((line for line in reason if "GLOBAL" in line or "global" in line), reason[0])
        raise CheckpointError(f"{origin} cannot be read as tensors and plain values: {unsafe.strip()[:300]}") from error


def mapped_copy(tensor: Tensor, directory: Path) -> Tensor:
    """A copy of a tensor in a mapped, nameless file below `directory`, which goes when the tensor goes.

    So that torch.save can write a file of many tensors with the memory of a few: the rest waits on the disk.
    """
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        storage = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=tensor.nbytes)
    copy = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)
    return copy.copy_(tensor)
