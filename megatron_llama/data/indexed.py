"""The indexed dataset of Megatron, byte for byte: `PREFIX.bin` holds token ids back to back, `PREFIX.idx` says where each
sequence lies.

All integers are little-endian and unaligned. `.idx`:

    9 bytes   magic `MMIDIDX\\0\\0`
    8         version, uint64 = 1
    1         dtype code of the token ids, uint8
    8         S = number of sequences, uint64
    8         D = number of documents + 1, uint64
    4 S       length of each sequence in tokens, int32
    8 S       position of each sequence in `.bin` in bytes, int64
    8 D       the first sequence of each document, then S, int64
    (S        modes, int8: only where a dataset holds more than text)

A document of text is one sequence; an empty document is none, and repeats its index. Beside them this project writes
`PREFIX.json`, which says how the tokens were made; datasets written by others do not have it. Instead of `PREFIX.bin` there
may be `PREFIX.parts`, see token_files.py.
"""

from __future__ import annotations

import functools
import json
import mmap
import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llama.data.atomic import publish, staging_directory
from megatron_llama.data.token_files import TokenReader, TokenWriter, write_parts
from parallel.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
DIRECTORY_PREFIX = "dataset"  # of a dataset that is a directory
BLOCK_ENTRIES = 1 << 16  # the index is written and validated in blocks of this many entries


def best_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron stores ids below `vocab_size`: uint16 below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def dataset_path(prefix: str | Path, suffix: str) -> Path:
    """`PREFIX` + `.bin`, `.idx` or `.json`; a dot inside the prefix stays."""
    return Path(f"{prefix}{suffix}")


def resolve_prefix(prefix: str | Path) -> str:
    """The prefix of a dataset that may be given as the directory which holds it, as `DIRECTORY/dataset`."""
    if not dataset_path(prefix, ".idx").exists() and dataset_path(Path(prefix) / DIRECTORY_PREFIX, ".idx").exists():
        return str(Path(prefix) / DIRECTORY_PREFIX)
    return str(prefix)


class IndexedDatasetWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`; use it in a `with` block.

    The files appear, `.idx` last, when the block ends without an error, or at `finish`; until then all is written to
    `staging`, or to a temporary directory beside them, which is removed in any case. Memory does not grow with the
    dataset. With `parts`, files of ids that exist already, (path relative to PREFIX, bytes) each, the writer makes no
    `.bin` but a `.parts` file that lists them, and takes lengths by `add_lengths` alone.

    Raises DataError where the place cannot be written, an id does not fit `dtype`, or a document is longer than
    2^31 - 1 tokens.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: np.dtype | type,
        staging: Path | None = None,
        parts: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._staging = staging
        self._parts = parts
        self._cleanup = ExitStack()

    def __enter__(self) -> IndexedDatasetWriter:
        with ExitStack() as stack:
            self._directory = self._staging or stack.enter_context(staging_directory(self.prefix))
            paths = self._directory / "bin", self._directory / "lengths"
            self._tokens = TokenWriter(self.prefix, *paths, self.dtype)
            stack.callback(self._tokens.close)
            self._cleanup = stack.pop_all()
        self._finished = False
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, traceback: object) -> None:
        with self._cleanup:
            if error_type is None and not self._finished:
                self.finish()

    @property
    def num_tokens(self) -> int:
        return self._tokens.num_tokens

    @property
    def num_documents(self) -> int:
        return self._tokens.num_documents

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Appends one document; an empty one is kept as a document without a sequence."""
        self._tokens.add_documents(ids, np.array([len(ids)]))

    def add_documents(self, ids: Sequence[int] | np.ndarray, lengths: np.ndarray, ends: bool = True) -> None:
        """Appends documents: their ids joined, and the number of ids of each.

        With `ends=False` the last one goes on: the first document of the next call is its continuation.
        """
        self._tokens.add_documents(ids, lengths, ends)

    def append_file(self, path: Path, lengths: np.ndarray, ends: bool = True) -> None:
        """As `add_documents`, the ids being those in the file `path`, which the kernel copies."""
        self._tokens.append_file(path, lengths, ends)

    def append_ids(self, path: Path) -> None:
        """Appends all ids in the file `path`, which the kernel copies; `add_lengths` has to describe them."""
        self._tokens.append_ids(path)

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Describes documents whose ids are in `parts`, or come by `append_ids`."""
        if len(lengths):
            self._tokens.add_lengths(np.array(lengths, np.int64), ends=True)

    def length_histogram(self) -> list[int]:
        """How many documents have a length in [2^k, 2^(k + 1)) tokens, per k up to the longest; empty ones do not count."""
        counts = np.zeros(32, np.int64)
        for block in self._tokens.lengths(BLOCK_ENTRIES):
            counts += np.bincount(np.log2(block[block > 0]).astype(np.int64), minlength=32)
        return np.trim_zeros(counts, "b").tolist()

    def finish(self, sidecar: dict[str, Any] | None = None) -> None:
        """Publishes the files, and `sidecar` as `PREFIX.json`."""
        assert not self._tokens.is_open, "the last document was not ended"
        blocks = functools.partial(self._tokens.lengths, BLOCK_ENTRIES)
        write_index(self._directory / "idx", self.dtype, self.num_documents, blocks)
        self._tokens.close()
        staged, unused = ("bin", "parts") if self._parts is None else ("parts", "bin")
        if self._parts is not None:
            write_parts(self._directory / "parts", self._parts)
        moves = [(self._directory / staged, dataset_path(self.prefix, f".{staged}"))]
        sidecar_path = dataset_path(self.prefix, ".json")
        stale = [dataset_path(self.prefix, f".{unused}")]
        if sidecar is None:
            stale.append(sidecar_path)  # it would describe other tokens
        else:
            (self._directory / "json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
            moves.append((self._directory / "json", sidecar_path))
        publish([*moves, (self._directory / "idx", dataset_path(self.prefix, ".idx"))], stale)
        self._finished = True


def write_index(path: Path, dtype: np.dtype, num_documents: int, length_blocks: Callable[[], Iterable[np.ndarray]]) -> None:
    """Writes an index from the lengths of all documents, int64, in blocks, which are asked for several times."""
    num_sequences = sum(int(np.count_nonzero(block)) for block in length_blocks())
    code = next(code for code, kind in DTYPES.items() if np.dtype(kind) == dtype)
    with open(path, "wb", buffering=1 << 20) as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, num_sequences, num_documents + 1))
        for block in length_blocks():
            file.write(block[block > 0].astype("<i4").tobytes())
        position_bytes = 0
        for block in length_blocks():
            ends = position_bytes + np.cumsum(block * dtype.itemsize)
            file.write((ends - block * dtype.itemsize)[block > 0].astype("<i8").tobytes())
            position_bytes = int(ends[-1])
        file.write(np.zeros(1, "<i8").tobytes())
        sequences = 0
        for block in length_blocks():
            ends = sequences + np.cumsum(block > 0)
            file.write(ends.astype("<i8").tobytes())
            sequences = int(ends[-1])


class IndexedDataset:
    """Reads `PREFIX.bin`, or the files that `PREFIX.parts` lists, through `PREFIX.idx`.

    All are checked completely when opened, without loading them. `prefix` may be a directory that holds `dataset.idx`.
    `sequence_lengths` (int32 [S], in tokens) and `document_indices` (int64 [documents + 1]) are views of the file.

    Raises DataError, naming the file and what is wrong with it, where a file is missing, truncated, foreign or
    inconsistent.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = resolve_prefix(prefix)
        self.index_path = dataset_path(self.prefix, ".idx")
        index = _map_index(self.index_path, self.prefix)
        self.dtype, num_sequences, document_entries = _parse_header(self.index_path, index)
        offset = HEADER.size
        self.sequence_lengths = np.frombuffer(index, "<i4", num_sequences, offset)
        offset += 4 * num_sequences
        self._positions = np.frombuffer(index, "<i8", num_sequences, offset)  # in .bin, bytes
        offset += 8 * num_sequences
        self.document_indices = np.frombuffer(index, "<i8", document_entries, offset)
        _check_modes(self.index_path, index, offset + 8 * document_entries)
        self.num_tokens = self._check_sequences()
        self._check_documents()
        index.base.madvise(mmap.MADV_DONTNEED)  # all of it was read; what is used comes back
        self._tokens = TokenReader(self.prefix, self.num_tokens * self.dtype.itemsize)
        self.bin_path = self._tokens.path

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def read(self, start_token: int, count: int) -> np.ndarray:
        """Tokens [start_token, start_token + count) of all documents joined, int64 [count].

        One `pread`: a memory map would make the kernel read ahead hundreds of times as much as a random window needs.
        """
        return self.read_raw(start_token, count).astype(np.int64)

    def read_raw(self, start_token: int, count: int) -> np.ndarray:
        """As `read`, in the dtype of the file."""
        assert 0 <= start_token and 0 <= count and start_token + count <= self.num_tokens, (start_token, count)
        content = self._tokens.read(start_token * self.dtype.itemsize, count * self.dtype.itemsize)
        return np.frombuffer(content, self.dtype)

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document, int64; empty for an empty document. Raises DataError for one that is not there."""
        if not 0 <= number < self.num_documents:
            raise DataError(f"{self.prefix}: there is no document {number}; it has {self.num_documents}, counted from 0")
        first, end = (int(sequence) for sequence in self.document_indices[number : number + 2])
        if first == end:
            return np.zeros(0, np.int64)
        start_token = int(self._positions[first]) // self.dtype.itemsize
        return self.read(start_token, int(self.sequence_lengths[first:end].sum(dtype=np.int64)))

    def sequence_starts(self, numbers: np.ndarray) -> np.ndarray:
        """The first token of each of some sequences, int64."""
        return self._positions[numbers] // self.dtype.itemsize

    def starts_within(self, start_token: int, count: int) -> np.ndarray:
        """Where sequences begin in the `count` tokens from `start_token` on, relative to it: ascending int64.

        An empty sequence begins where the next one does.
        """
        # np.searchsorted would copy all positions first: they are not aligned
        first = bisect_left(self._positions, start_token * self.dtype.itemsize)
        last = bisect_left(self._positions, (start_token + count) * self.dtype.itemsize, first)
        return self._positions[first:last] // self.dtype.itemsize - start_token

    def document_at(self, token: int) -> tuple[int, int, int]:
        """The document in which a token of the stream lies: its number, its first token, its length in tokens."""
        sequence = bisect_right(self._positions, token * self.dtype.itemsize) - 1
        number = bisect_right(self.document_indices, sequence) - 1
        first, end = (int(entry) for entry in self.document_indices[number : number + 2])
        length = int(self.sequence_lengths[first:end].sum(dtype=np.int64))
        return number, int(self._positions[first]) // self.dtype.itemsize, length

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint stores to recognise the dataset, whatever its path: sizes, and checksums of samples."""
        index = zlib.crc32(self.index_path.open("rb").read(HEADER.size))
        for entries in (self.sequence_lengths, self.document_indices):
            index = zlib.crc32(entries[:: max(1, len(entries) // 4096)].tobytes(), index)
        content, count = 0, min(4096, self.num_tokens)
        for start in np.linspace(0, self.num_tokens - count, 16).astype(np.int64):
            content = zlib.crc32(self.read_raw(int(start), count).tobytes(), content)
        return {
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "dtype": str(self.dtype),
            "index_crc32": f"{index:08x}",
            "content_crc32": f"{content:08x}",
        }

    def _check_sequences(self) -> int:
        """Checks lengths, positions and the size of `.bin` against each other; returns the number of tokens."""
        position_bytes = 0
        for start in range(0, self.num_sequences, BLOCK_ENTRIES):
            lengths = self.sequence_lengths[start : start + BLOCK_ENTRIES].astype(np.int64)
            if lengths.min() < 0:
                number = start + int(np.argmax(lengths < 0))
                raise DataError(f"{self.index_path}: sequence {number} has the negative length {self.sequence_lengths[number]}")
            ends = position_bytes + np.cumsum(lengths * self.dtype.itemsize)
            wrong = self._positions[start : start + BLOCK_ENTRIES] != ends - lengths * self.dtype.itemsize
            if wrong.any():
                number = int(np.argmax(wrong))
                needed = ends[number] - lengths[number] * self.dtype.itemsize
                raise DataError(
                    f"{self.index_path}: sequence {start + number} is said to begin at byte "
                    f"{self._positions[start + number]} of the .bin file, but those before it end at byte {needed}"
                )
            position_bytes = int(ends[-1])
        return position_bytes // self.dtype.itemsize

    def _check_documents(self) -> None:
        entries = self.document_indices
        if entries[0] != 0 or entries[-1] != self.num_sequences:
            raise DataError(
                f"{self.index_path}: the documents go from sequence {entries[0]} to {entries[-1]}; "
                f"needed: 0 to {self.num_sequences}"
            )
        for start in range(0, len(entries), BLOCK_ENTRIES):
            wrong = np.diff(entries[start : start + BLOCK_ENTRIES + 1]) < 0
            if wrong.any():
                raise DataError(f"{self.index_path}: document {start + int(np.argmax(wrong))} ends before it begins")


def _map_index(path: Path, prefix: str) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size >= HEADER.size:
            return np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}{_prefix_hint(prefix)}") from error
    raise DataError(f"{path}: found {size} bytes, and the header of an index alone has {HEADER.size}: the file is truncated")


def _prefix_hint(prefix: str) -> str:
    for suffix in (".idx", ".bin"):
        if prefix.endswith(suffix):
            return f"; give the prefix without {suffix}"
    path = Path(prefix)
    near = sorted(file.name[: -len(".idx")] for file in path.parent.glob("*.idx") if file.name.startswith(path.name))
    return f"; prefixes there: {', '.join(near[:4])}" if near else ""


def _parse_header(path: Path, index: np.ndarray) -> tuple[np.dtype, int, int]:
    """The dtype of the tokens, the number of sequences and the number of document entries."""
    magic, version, code, num_sequences, document_entries = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise DataError(f"{path}: not an index: begins with {magic!r}, needed {MAGIC!r}")
    if version != VERSION:
        raise DataError(f"{path}: index version {version}, needed {VERSION}")
    if code not in DTYPES:
        known = ", ".join(f"{number} {np.dtype(kind)}" for number, kind in DTYPES.items())
        raise DataError(f"{path}: dtype code {code} is not one of the format ({known})")
    needed = HEADER.size + 12 * num_sequences + 8 * document_entries
    if document_entries < 1 or len(index) not in (needed, needed + num_sequences):
        raise DataError(
            f"{path}: found {len(index)} bytes; its header announces {num_sequences} sequences and {document_entries} document "
            f"entries (at least 1), {needed} bytes: the file is truncated or damaged"
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), num_sequences, document_entries


def _check_modes(path: Path, index: np.ndarray, offset: int) -> None:
    if index[offset:].any():
        raise DataError(f"{path}: a multimodal dataset: some of its sequences are not text")
