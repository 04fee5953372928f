"""Which files of text are read, in which order, and how they are cut among workers.

By the end of its name, a file is jsonl (`.jsonl`, `.ndjson`, `.json`: a document a line), parquet (a document a row), or
UTF-8 text: one document, or one a line. Text and jsonl may be packed with gzip, zstd, bzip2 or xz.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import DataError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")  # what is read of a directory; other files are text if they are named
PACKINGS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
REFUSED_SUFFIXES = (".zip", ".tar", ".tgz", ".7z", ".arrow", ".bin", ".idx")
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 20, 64 << 20
PIECES = 512  # aimed at


@dataclass(frozen=True)
class Piece:
    """The bytes [start, end) of a file, to be read by one worker; packed files and parquet are one piece each.

    `kind` is `json` or `lines` (the documents whose lines begin in the range), `parquet`, or `file` (a part of one
    document; both ends move on to the next space at which a text may be cut, unless they are the file's). `packing` is
    empty for a plain file.
    """

    path: Path
    kind: str
    start: int
    end: int
    file_bytes: int
    packing: str = ""
    modified_ns: int = 0

    @property
    def starts_document(self) -> bool:
        return self.kind != "file" or self.start == 0

    @property
    def ends_document(self) -> bool:
        return self.kind != "file" or self.end == self.file_bytes


def expand_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """Files, the files in directories (known suffixes, hidden ones left out) and those that match patterns.

    Directories and patterns give their files in the order of their names. Raises DataError for an input without a file.
    """
    files: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir():
            found = _files_in(given)
            known = ", ".join((*JSON_SUFFIXES, *PARQUET_SUFFIXES, *TEXT_SUFFIXES))
            needed = f"found no file that ends in {known} (or one of them packed: {', '.join(PACKINGS)})"
        elif not given.exists() and glob.has_magic(str(given)):
            found = _matches(given)
            needed = "no file matches the pattern"
        else:
            found, needed = [given], ""
        if not found:
            raise DataError(f"{given}: {needed}")
        files += found
    return files


def _files_in(directory: Path) -> list[Path]:
    parts = ((path, path.relative_to(directory).parts) for path in directory.rglob("*") if path.is_file())
    return [path for path, names in sorted(parts, key=lambda found: found[1]) if _is_data(path, names)]


def _is_data(path: Path, names: tuple[str, ...]) -> bool:
    known = _suffixes(path)[0] in JSON_SUFFIXES + PARQUET_SUFFIXES + TEXT_SUFFIXES
    return known and not any(name.startswith(".") for name in names) and not _is_output(path)


def _is_output(path: Path) -> bool:
    """Whether preprocessing itself wrote the file."""
    of_dataset = path.suffix == ".json" and path.with_suffix(".idx").exists()
    return of_dataset or path.name.endswith(".errors.jsonl") or path.parent.suffix == ".partial"


def _matches(pattern: Path) -> list[Path]:
    found = sorted(map(Path, glob.glob(str(pattern), recursive=True)), key=lambda path: path.parts)
    return [file for path in found for file in (_files_in(path) if path.is_dir() else [path]) if not _is_output(file)]


def _suffixes(path: Path) -> tuple[str, str]:
    """The suffix that tells the kind of a file, and that of its packing or nothing; in lower case."""
    suffix = path.suffix.lower()
    if suffix in PACKINGS:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def input_kind(path: Path, documents: str) -> tuple[str, str]:
    """`json`, `parquet`, `lines` or `file`, and the packing. Raises DataError for files that are not read."""
    suffix, packing = _suffixes(path)
    if suffix in REFUSED_SUFFIXES or (suffix in PARQUET_SUFFIXES and packing):
        raise DataError(f"{path}: {suffix}{packing} files are not read; unpack it to .jsonl, .parquet or text first")
    if suffix in PARQUET_SUFFIXES:
        return "parquet", ""
    kind = "json" if suffix in JSON_SUFFIXES else ("lines" if documents == "lines" else "file")
    return kind, PACKINGS.get(packing, "")


def stat_inputs(paths: Sequence[Path], documents: str) -> list[Piece]:
    """Each file as one piece. Raises DataError for one that is missing, not a file, or of a kind that is not read."""
    pieces = []
    for path in paths:
        kind, packing = input_kind(path, documents)
        try:
            with open(path, "rb"):
                status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        pieces.append(Piece(path, kind, 0, status.st_size, status.st_size, packing, status.st_mtime_ns))
    return pieces


def choose_piece_bytes(total_bytes: int) -> int:
    """A power of two, so that a file more or less seldom changes it: 1 MiB for small inputs, 64 MiB from 32 GiB on."""
    wanted = max(1, total_bytes // PIECES)
    return min(max(1 << (wanted - 1).bit_length(), MIN_PIECE_BYTES), MAX_PIECE_BYTES)


def list_pieces(paths: Sequence[Path], documents: str, piece_bytes: int, cut_files: bool) -> Iterator[Piece]:
    """All inputs in their order, cut into pieces of about `piece_bytes`; files of text only with `cut_files`.

    Raises DataError as `stat_inputs`.
    """
    for file in stat_inputs(paths, documents):
        yield from cut(file, piece_bytes, cut_files)


def cut(file: Piece, piece_bytes: int, cut_files: bool) -> Iterator[Piece]:
    """One file as pieces of about `piece_bytes`."""
    step = piece_bytes
    if file.packing or file.kind == "parquet" or (file.kind == "file" and (not cut_files or file.file_bytes < 2 * step)):
        step = max(file.file_bytes, 1)
    for start in range(0, max(file.file_bytes, 1), step):
        end = min(start + step, file.file_bytes)
        yield Piece(file.path, file.kind, start, end, file.file_bytes, file.packing, file.modified_ns)


def group(pieces: Iterable[Piece], group_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Consecutive pieces, small ones together, so that thousands of small files cost no round trip each."""
    together: list[Piece] = []
    size = 0
    for piece in pieces:
        if together and size + piece.end - piece.start > group_bytes:
            yield tuple(together)
            together, size = [], 0
        together.append(piece)
        size += piece.end - piece.start
    if together:
        yield tuple(together)
