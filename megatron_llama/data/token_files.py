"""The token ids of a dataset on disk: appended with the lengths of their documents, joined in the kernel, read anywhere.

A dataset has its ids in `PREFIX.bin`, or in several files, which `PREFIX.parts` lists in their order:

    {"parts": [{"file": "part-00000.bin", "bytes": 1234}, ...]}

with paths relative to its own directory.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from parallel.errors import DataError

MAX_SEQUENCE_TOKENS = 2**31 - 1  # lengths are int32
BUFFER_BYTES = 1 << 20
COPY_BYTES = 1 << 30  # asked of the kernel at a time
OPEN_FILES = 64  # of a dataset in parts, so that thousands of them do not exhaust the process's limit
NOT_COPIED_BY_KERNEL = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


class TokenWriter:
    """Appends token ids to one file and the lengths of documents, int32, to another.

    `name` is what errors call the dataset. `crc32` is that of all ids added by `add_documents`.
    """

    def __init__(self, name: str | Path, bin_path: Path, lengths_path: Path, dtype: np.dtype | type) -> None:
        self.name = name
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_tokens = 0
        self.num_documents = 0
        self.is_open = False  # the last document is not ended yet
        self.open_tokens = 0  # of it
        self.crc32 = 0
        self._bin: BinaryIO = open(bin_path, "wb", buffering=BUFFER_BYTES)
        try:
            self._lengths: BinaryIO = open(lengths_path, "w+b", buffering=BUFFER_BYTES)
        except OSError:
            self._bin.close()
            raise

    def add_documents(self, ids: Sequence[int] | np.ndarray, lengths: np.ndarray, ends: bool = True) -> None:
        """Appends documents: their ids joined, and the number of ids of each.

        With `ends=False` the last one goes on: the first document of the next call is its continuation.
        Raises DataError for an id that does not fit the dtype, or a document of more than 2^31 - 1 tokens.
        """
        ids, lengths = self._fitting(ids), np.array(lengths, np.int64)
        assert len(lengths) > 0 and lengths.sum() == len(ids), f"lengths {lengths.sum()} of {len(ids)} ids"
        content = memoryview(np.ascontiguousarray(ids)).cast("B") if len(ids) else b""
        self._bin.write(content)
        self.crc32 = zlib.crc32(content, self.crc32)
        self.add_lengths(lengths, ends)

    def append_file(self, path: Path, lengths: np.ndarray, ends: bool = True) -> None:
        """As `add_documents`, the ids being those in the file `path`, which the kernel copies."""
        copied = self.append_ids(path)
        assert copied == int(lengths.sum()) * self.dtype.itemsize, f"{path}: {copied} bytes of {lengths.sum()} tokens"
        if len(lengths):
            self.add_lengths(lengths.astype(np.int64), ends)

    def append_ids(self, path: Path) -> int:
        """Only the ids in a file; returns their bytes."""
        self._bin.flush()
        with open(path, "rb", buffering=0) as source:
            return copy_file(source, self._bin)

    def lengths(self, block_entries: int) -> Iterator[np.ndarray]:
        """The lengths of all ended documents in blocks, int64."""
        self._lengths.seek(0)
        while block := self._lengths.read(4 * block_entries):
            yield np.frombuffer(block, "<i4").astype(np.int64)

    def close(self) -> None:
        """Closes both files; the length of an open document becomes the last one."""
        if not self._lengths.closed:
            if self.is_open:
                self._lengths.write(np.array([self.open_tokens], "<i4").tobytes())
            self._lengths.close()
        self._bin.close()

    def add_lengths(self, lengths: np.ndarray, ends: bool) -> None:
        """Only the lengths of documents, int64; at least one."""
        self.num_tokens += int(lengths.sum())
        lengths[0] += self.open_tokens
        self.open_tokens, self.is_open = 0, not ends
        if not ends:
            self.open_tokens, lengths = int(lengths[-1]), lengths[:-1]
        if lengths.max(initial=self.open_tokens) > MAX_SEQUENCE_TOKENS:
            raise DataError(f"{self.name}: a document of more than {MAX_SEQUENCE_TOKENS} tokens cannot be stored; split it")
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_documents += len(lengths)

    def _fitting(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if len(ids) and ids.dtype != self.dtype and self.dtype.kind != "f":
            low, high = np.iinfo(self.dtype).min, np.iinfo(self.dtype).max
            if int(ids.min()) < low or int(ids.max()) > high:
                outside = ids[(ids < low) | (ids > high)]
                raise DataError(f"{self.name}: token id {outside[0]} does not fit {self.dtype}")
        return ids.astype(self.dtype, copy=False)


def copy_file(source: BinaryIO, target: BinaryIO) -> int:
    """Copies all that is left of `source` to the end of `target`, both unbuffered or flushed; returns the bytes.

    The kernel copies, on some file systems by sharing the blocks; where it cannot, this process does.
    """
    copied = 0
    try:
        while count := os.copy_file_range(source.fileno(), target.fileno(), COPY_BYTES):
            copied += count
        return copied
    except OSError as error:
        if error.errno not in NOT_COPIED_BY_KERNEL:
            raise
    while block := os.read(source.fileno(), BUFFER_BYTES):
        view = memoryview(block)
        while view:
            view = view[os.write(target.fileno(), view) :]
        copied += len(block)
    return copied


class TokenReader:
    """Reads bytes anywhere in `PREFIX.bin`, or in the files that `PREFIX.parts` lists.

    `path` is what errors name. Raises DataError where a file is missing or has another size than `size_bytes` in all.
    """

    def __init__(self, prefix: str | Path, size_bytes: int) -> None:
        self.path, parts = list_parts(prefix)
        self._paths = [path for path, _ in parts]
        self._starts = [0, *accumulate(size for _, size in parts)]
        if self._starts[-1] != size_bytes:
            found = self._starts[-1]
            kind = "truncated" if found < size_bytes else "of another index"
            raise DataError(f"{self.path}: found {found} bytes; the index describes {size_bytes} bytes: the file is {kind}")
        self._open = functools.lru_cache(OPEN_FILES)(functools.partial(open, mode="rb", buffering=0))

    def read(self, position: int, count: int) -> bytes:
        """The bytes [position, position + count): one `pread` where they lie in one file."""
        number = bisect_right(self._starts, position) - 1
        if len(self._paths) == 1 or position + count <= self._starts[number + 1]:
            return self._read_file(number, position - self._starts[number], count) if count else b""
        pieces = []
        while count:
            length = min(count, self._starts[number + 1] - position)
            pieces.append(self._read_file(number, position - self._starts[number], length))
            position, count, number = position + length, count - length, number + 1
        return b"".join(pieces)

    def _read_file(self, number: int, position: int, count: int) -> bytes:
        path = self._paths[number]
        file = self._open(path)
        content = os.pread(file.fileno(), count, position)
        while len(content) < count:  # a read may stop early, at 2 GiB or at a signal
            more = os.pread(file.fileno(), count - len(content), position + len(content))
            if not more:
                raise DataError(f"{path}: became shorter while in use: no byte at {position + len(content)}")
            content += more
        return content


def list_parts(prefix: str | Path) -> tuple[Path, list[tuple[Path, int]]]:
    """The file that holds or lists the ids of a dataset, and all files that hold them with their sizes.

    Raises DataError where one is missing or has another size than listed.
    """
    manifest, single = Path(f"{prefix}.parts"), Path(f"{prefix}.bin")
    if single.exists() or not manifest.exists():
        return single, [(single, _size(single, single))]
    try:
        listed = [(manifest.parent / part["file"], part["bytes"]) for part in json.loads(manifest.read_bytes())["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest}: not a list of parts: {error!r}") from error
    for path, size in listed:
        if _size(path, manifest) != size:
            raise DataError(
                f"{path}: found {_size(path, manifest)} bytes; {manifest.name} says {size}: write the dataset again"
            )
    return manifest, listed


def write_parts(path: Path, parts: Sequence[tuple[str, int]]) -> None:
    """Writes a `.parts` file: (file relative to its directory, bytes) each."""
    listed = [{"file": file, "bytes": size} for file, size in parts]
    path.write_text(json.dumps({"parts": listed}, indent=1) + "\n", encoding="utf-8")


def _size(path: Path, needed_by: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        needed = "its .idx needs it" if path == needed_by else f"{needed_by.name} lists it"
        raise DataError(f"{path}: cannot be read: {error.strerror}; {needed}") from error
