"""Finished and unfinished work of `preprocess`, on disk: one part per piece of the input, kept across kills.

In the work directory `PREFIX.partial` a part is

    KEY.bin, KEY.lengths              ids and document lengths (int32), as TokenWriter writes them
    KEY.valid.bin, KEY.valid.lengths  the same of held-out documents, if any are held out
    KEY.errors                        bad lines, if any were skipped
    KEY.json                          the marker, written last: sizes, checksums and counts

KEY is a hash of all that the part depends on: the files with their ranges, sizes and times, the tokenizer, the settings.
So a changed input or setting asks for another part, and a part without a valid marker does not exist.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llama.data.inputs import Piece
from megatron_llama.data.text import LineError
from megatron_llama.data.token_files import TokenWriter
from parallel.errors import DataError

FORMAT = 1  # of the parts; part of every key
SPLITS = ("train", "valid")


@dataclass
class Counts:
    """What was made of some documents; text_bytes counts UTF-8 without JSON."""

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token_id: int = 0

    def add(self, other: Counts) -> None:
        for entry in fields(Counts):
            combine = max if entry.name == "max_token_id" else int.__add__
            setattr(self, entry.name, combine(getattr(self, entry.name), getattr(other, entry.name)))


@dataclass
class Part:
    """The marker of a finished part: what its files hold.

    `lines` counts the lines or rows of each piece; `crc32` is of each file of ids and lengths, `sizes` their bytes;
    `ends` says whether the last document ends with the part.
    """

    key: str
    train: Counts = field(default_factory=Counts)
    valid: Counts = field(default_factory=Counts)
    lines: list[int] = field(default_factory=list)
    errors: int = 0
    ends: bool = True
    sizes: dict[str, int] = field(default_factory=dict)
    crc32: dict[str, int] = field(default_factory=dict)


def part_key(pieces: Sequence[Piece], settings: dict[str, Any]) -> str:
    """The name of a part: a hash of its format, the pieces of its input and the settings."""
    identity = [(os.path.abspath(p.path), p.kind, p.packing, p.start, p.end, p.file_bytes, p.modified_ns) for p in pieces]
    content = json.dumps([FORMAT, identity, settings], sort_keys=True)
    return hashlib.blake2b(content.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def bin_path(directory: Path, key: str, split: str) -> Path:
    """The ids of a part."""
    return directory / f"{key}{'.valid' if split == 'valid' else ''}.bin"


def lengths_path(directory: Path, key: str, split: str) -> Path:
    """The document lengths of a part."""
    return bin_path(directory, key, split).with_suffix(".lengths")


def errors_path(directory: Path, key: str) -> Path:
    """The skipped lines of a part."""
    return directory / f"{key}.errors"


@contextmanager
def work_directory(prefix: Path, keys: set[str]) -> Iterator[Path]:
    """`PREFIX.partial`, locked, without the remains of other inputs and settings; removed on exit if it holds no part.

    Raises DataError where it cannot be made, or another run is at work there.
    """
    directory = Path(f"{prefix}.partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / "lock", "w")
    except OSError as error:
        raise DataError(f"{prefix}: cannot write there: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{directory}: another run is writing there; wait for it, or choose another prefix") from error
        try:
            _remove_others(directory, keys)
            yield directory
        finally:
            for path in directory.glob("*.tmp-*"):
                path.unlink(missing_ok=True)
            if not any(directory.glob("*.json")):
                shutil.rmtree(directory, ignore_errors=True)


def _remove_others(directory: Path, keys: set[str]) -> None:
    finished = {path.stem for path in directory.glob("*.json")} & keys
    for path in directory.iterdir():
        if path.name != "lock" and (path.name.partition(".")[0] not in finished or ".tmp-" in path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def find_part(directory: Path, key: str) -> Part | None:
    """A finished part, its files verified byte by byte against the marker; None where there is none."""
    try:
        noted = json.loads((directory / f"{key}.json").read_bytes())
        counts = {split: Counts(**noted.pop(split)) for split in SPLITS}
        part = Part(**counts, **noted)
        good = part.key == key and all(_crc32(directory / name) == crc for name, crc in part.crc32.items())
        return part if good else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


class PartWriter:
    """Writes one part; its files get their names in `finish`, the marker last. Use it in a `with` block."""

    def __init__(self, directory: Path, key: str, dtype: np.dtype, splits: Sequence[str]) -> None:
        self.part = Part(key)
        self._directory = directory
        self._dtype = dtype
        self._splits = splits
        self._temporary: dict[Path, Path] = {}  # by the final path
        self._errors: list[str] = []

    def __enter__(self) -> PartWriter:
        with ExitStack() as stack:
            self._tokens = {}
            for split in self._splits:
                paths = (
                    self._stage(bin_path(self._directory, self.part.key, split)),
                    self._stage(lengths_path(self._directory, self.part.key, split)),
                )
                self._tokens[split] = TokenWriter("the dataset", *paths, self._dtype)
                stack.callback(self._tokens[split].close)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def _stage(self, path: Path) -> Path:
        self._temporary[path] = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        return self._temporary[path]

    def add(self, split: str, ids: np.ndarray, lengths: np.ndarray, ends: bool, counts: Counts) -> None:
        """Appends documents, as `TokenWriter.add_documents`, and adds to the counts of their split."""
        if len(lengths):
            self._tokens[split].add_documents(ids, lengths, ends)
        getattr(self.part, split).add(counts)

    def add_error(self, piece_number: int, path: Path, error: LineError) -> None:
        """Notes a line that was skipped."""
        noted = {"file": str(path), "piece": piece_number, "line": error.line, "error": error.message, "content": error.content}
        self._errors.append(json.dumps(noted))
        self.part.errors += 1

    def finish(self, ends: bool) -> Part:
        """Puts all on disk and publishes the part."""
        part = self.part
        part.ends = ends
        for split, tokens in self._tokens.items():
            tokens.close()
            name = bin_path(self._directory, part.key, split)
            part.crc32[name.name] = tokens.crc32
            part.crc32[name.with_suffix(".lengths").name] = _crc32(self._temporary[name.with_suffix(".lengths")])
            part.sizes[split] = self._temporary[name].stat().st_size
        if self._errors:
            path = errors_path(self._directory, part.key)
            self._stage(path).write_text("".join(f"{line}\n" for line in self._errors), encoding="utf-8")
            part.crc32[path.name] = _crc32(self._temporary[path])
        marker = self._directory / f"{part.key}.json"
        self._stage(marker).write_text(json.dumps(asdict(part)) + "\n", encoding="utf-8")
        for path, temporary in self._temporary.items():  # the marker is the last
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        return part


def numbered_errors(directory: Path, parts: Sequence[tuple[Part, Sequence[Piece]]]) -> Iterator[dict[str, Any]]:
    """The skipped lines of all parts in order, each with its file and its line number, counted from 1 in the file."""
    before = 0
    for part, pieces in parts:
        offsets = []
        for piece, lines in zip(pieces, part.lines, strict=True):
            before = 0 if piece.start == 0 else before
            offsets.append(before)
            before += lines
        if part.errors:
            for line in errors_path(directory, part.key).read_text(encoding="utf-8").splitlines():
                error = json.loads(line)
                offset = offsets[error.pop("piece")]
                yield {**error, "line": error["line"] and offset + error["line"]}
