"""Text files: which documents they hold, read in pieces of bounded size, and whose line is at fault.

jsonl (`.jsonl`, `.ndjson`, `.json`: one object a line) holds one document a line; any other file is UTF-8 text, one
document, or one a line with `documents="lines"`. Blank lines hold none. Line ends of a text are kept as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from parallel.errors import DataError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".zip", ".parquet", ".tar")
SEARCH_BYTES = 1 << 16  # read at a time to find a place to cut
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_SAFE_CUT = re.compile(rb"(?<!\xe2\x96\x81)(?<! ) (?=.)", re.DOTALL)  # as tokenizer.cut_text, in UTF-8
_SURROGATE = re.compile("[\ud800-\udfff]")
_CUT_CONTEXT_BYTES = 3  # what comes before the space decides


@dataclass(frozen=True)
class Piece:
    """The bytes [start, end) of a file, to be read by one worker.

    `kind` is `json` or `lines` (the documents whose lines begin in the range) or `file` (a part of one document; both
    ends move on to the next space at which a text may be cut, unless they are the file's).
    """

    path: Path
    kind: str
    start: int
    end: int
    file_bytes: int

    @property
    def starts_document(self) -> bool:
        return self.kind != "file" or self.start == 0

    @property
    def ends_document(self) -> bool:
        return self.kind != "file" or self.end == self.file_bytes


@dataclass(frozen=True)
class LineError:
    """What is wrong with a line: counted from 1 within its piece, or 0 where the whole piece is at fault."""

    line: int
    message: str


def list_pieces(paths: Sequence[Path], documents: str, piece_bytes: int, cut_files: bool) -> Iterator[Piece]:
    """All inputs in their order, cut into pieces of about `piece_bytes`; files of text only with `cut_files`.

    Raises DataError for an input that is missing, not a file, or packed.
    """
    for path in paths:
        kind = input_kind(path, documents)
        try:
            with open(path, "rb") as file:
                file_bytes = file.seek(0, 2)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        step = max(file_bytes, 1) if kind == "file" and not cut_files else piece_bytes
        if kind == "file" and file_bytes < 2 * piece_bytes:
            step = max(file_bytes, 1)
        for start in range(0, max(file_bytes, 1), step):
            yield Piece(path, kind, start, min(start + step, file_bytes), file_bytes)


def input_kind(path: Path, documents: str) -> str:
    """`json`, `lines` or `file`. Raises DataError for packed files, which are not read."""
    suffix = path.suffix.lower()
    if suffix in PACKED_SUFFIXES:
        raise DataError(f"{path}: {suffix} files are not read; unpack it to .jsonl or text first")
    if suffix in JSON_SUFFIXES:
        return "json"
    return "lines" if documents == "lines" else "file"


def read_piece(piece: Piece, json_key: str) -> Iterator[str | LineError | None]:
    """Per line, in order: its document, None for a blank line, or what is wrong with it, after which nothing follows.

    A piece of kind `file` gives one text. Raises DataError where the file cannot be read.
    """
    try:
        with open(piece.path, "rb") as file:
            if piece.kind == "file":
                start, content = _read_part(file, piece)
                yield _decode(content, 0, start)
                return
            for number, line in enumerate(_lines_in(file, piece), start=1):
                text = _decode(line, number, 0)
                if isinstance(text, str):
                    text = _json_text(text, json_key, number) if piece.kind == "json" else (text.rstrip("\r\n") or None)
                yield text
                if isinstance(text, LineError):
                    return
    except OSError as error:
        raise DataError(f"{piece.path}: cannot be read: {error.strerror}") from error


def iterate_documents(paths: Sequence[Path], documents: str, json_key: str) -> Iterator[str]:
    """Every document of `paths`, streamed; files of text come in pieces. Raises DataError for what is wrong with one."""
    for path in paths:
        line_number = 0
        for piece in list_pieces([path], documents, piece_bytes=1 << 20, cut_files=True):
            for text in read_piece(piece, json_key):
                line_number += 1
                if isinstance(text, LineError):
                    raise line_error(path, text, line_number if text.line else 0)
                if text is not None:
                    yield text


def line_error(path: Path, error: LineError, line_number: int) -> DataError:
    """The error that the user reads; `line_number` counts from 1 in the file, 0 for an error of the whole file."""
    return DataError(f"{path}:{line_number}: {error.message}" if line_number else f"{path}: {error.message}")


def _lines_in(file: BinaryIO, piece: Piece) -> Iterator[bytes]:
    """The lines that begin in [start, end)."""
    if piece.start == 0:
        file.seek(len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0)
    else:
        file.seek(piece.start - 1)
        file.readline()
    position = file.tell()
    while position < piece.end and (line := file.readline()):
        yield line
        position += len(line)


def _read_part(file: BinaryIO, piece: Piece) -> tuple[int, bytes]:
    """Where the part of the document begins in the file, and its bytes."""
    start, end = _cut_after(file, piece, piece.start, kept=0), _cut_after(file, piece, piece.end, kept=1)
    file.seek(start)
    content = file.read(max(0, end - start))
    if start == 0 and content.startswith(BYTE_ORDER_MARK):
        return len(BYTE_ORDER_MARK), content[len(BYTE_ORDER_MARK) :]
    return start, content


def _cut_after(file: BinaryIO, piece: Piece, position: int, kept: int) -> int:
    """The first byte after the first space at or after `position` where a text may be cut; the space itself if `kept`."""
    if position in (0, piece.file_bytes):
        return position
    base = position - _CUT_CONTEXT_BYTES
    file.seek(base)
    window = b""
    while block := file.read(SEARCH_BYTES):
        window += block
        cut = _SAFE_CUT.search(window, _CUT_CONTEXT_BYTES)
        if cut:
            return base + cut.start() + 1 - kept
        base, window = base + len(window) - 4, window[-4:]
    return piece.file_bytes


def _decode(content: bytes, line: int, start: int) -> str | LineError:
    """`start` is the offset of the content in the line, or in the file where `line` is 0."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} at offset {start + error.start}{' of the line' if line else ''}"
        return LineError(line, f"not UTF-8 text: {byte} ({error.reason})")


def _json_text(line: str, json_key: str, number: int) -> str | LineError | None:
    if line.isspace():
        return None
    try:
        value = json.loads(line.rstrip("\r\n"))
    except ValueError as error:
        is_syntax = isinstance(error, json.JSONDecodeError)
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}" if is_syntax else str(error)
        return LineError(number, f"not valid JSON: {reason}")
    except RecursionError:
        return LineError(number, "not valid JSON: nested too deeply")
    if not isinstance(value, dict):
        return LineError(number, f"found a JSON {type(value).__name__}, needed an object with the key {json_key!r}")
    if json_key not in value:
        found = ", ".join(map(repr, list(value)[:8])) or "none"
        return LineError(number, f"no key {json_key!r}; keys found: {found}; choose one with --json-key")
    text = value[json_key]
    if not isinstance(text, str):
        return LineError(number, f"the value of {json_key!r} is of type {type(text).__name__}, needed a string")
    surrogate = _SURROGATE.search(text)
    if surrogate:
        return LineError(number, f"the text holds the lone surrogate \\u{ord(surrogate[0]):04x}, which is not valid Unicode")
    return text
