"""The documents in a piece of a file, streamed in bounded memory, and whose line is at fault.

Blank lines hold no document. Line ends of a text are kept as they are.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_llama.data.inputs import Piece, list_pieces
from parallel.errors import DataError

try:
    from orjson import loads as fast_loads
except ImportError:  # the extra "data" has it; the results are the same
    fast_loads = json.loads

BUFFER_BYTES = 1 << 20  # read at a time
SEARCH_BYTES = 1 << 16  # read at a time to find a place to cut
FRAGMENT_BYTES = 1 << 20  # of one long document
SAMPLED_FILES, SAMPLE_CHARACTERS = 16, 1 << 19  # of the first documents
PARQUET_ROWS = 256  # decoded at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SHOWN_CHARACTERS = 10_000  # of a line at fault

_SAFE_CUT = re.compile(rb"(?<!\xe2\x96\x81)(?<! ) (?=.)", re.DOTALL)  # as tokenizer.cut_text, in UTF-8
_SURROGATE = re.compile("[\ud800-\udfff]")
_CUT_CONTEXT_BYTES = 3  # what comes before the space decides
_UNPACK_ERRORS = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


@dataclass(frozen=True)
class LineError:
    """What is wrong with a line: counted from 1 within its piece, or 0 where the whole piece is at fault."""

    line: int
    message: str
    content: str = ""  # of the line, if it is one


class Meter:
    """How many bytes of the input were read."""

    def __init__(self) -> None:
        self.bytes = 0


class _MeteredFile(io.FileIO):
    """A file whose reads a meter counts."""

    def __init__(self, path: Path, meter: Meter) -> None:
        super().__init__(path, "rb")
        self._meter = meter

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self._meter.bytes += count
        return count


def read_piece(piece: Piece, json_key: str, meter: Meter | None = None) -> Iterator[str | LineError | None]:
    """Per line or row, in order: its document, None for a blank line, or what is wrong with it.

    A piece of kind `file` gives one document, in fragments where `can_cut`, and after an error nothing.
    Raises DataError where the file cannot be read or unpacked.
    """
    yield from _guarded(piece, lambda: _read(piece, json_key, meter or Meter()))


def read_fragments(piece: Piece, can_cut: bool, meter: Meter | None = None) -> Iterator[str | LineError]:
    """The text of a piece of kind `file`, in fragments of about 1 MiB where `can_cut`, each without the space before it.

    After a LineError nothing follows. Raises DataError where the file cannot be read or unpacked.
    """
    yield from _guarded(piece, lambda: _read_fragments(piece, can_cut, meter or Meter()))


def _guarded(piece: Piece, read: Callable[[], Iterator]) -> Iterator:
    try:
        yield from read()
    except _UNPACK_ERRORS as error:
        raise DataError(f"{piece.path}: is damaged or cut short: cannot be unpacked ({error})") from error
    except OSError as error:
        raise DataError(f"{piece.path}: cannot be read: {error.strerror or error}") from error


def _read(piece: Piece, json_key: str, meter: Meter) -> Iterator[str | LineError | None]:
    if piece.kind == "parquet":
        yield from _read_parquet(piece, json_key, meter)
    elif piece.kind == "file":
        yield from _read_fragments(piece, False, meter)
    else:
        parse = _json_document if piece.kind == "json" else _line_document
        with _open(piece, meter) as file:
            for number, line in enumerate(_lines_in(file, piece), start=1):
                yield parse(line, json_key, number)


def iterate_documents(
    paths: Sequence[Path], documents: str, json_key: str, choose: Callable[[Piece], bool] | None = None
) -> Iterator[str]:
    """Every document of `paths`, streamed; files of text come in pieces of 1 MiB, of which `choose` may pick some.

    Raises DataError for what is wrong with one.
    """
    for piece in list_pieces(paths, documents, piece_bytes=1 << 20, cut_files=True):
        if choose is not None and not choose(piece):
            continue
        for text in read_fragments(piece, True) if piece.kind == "file" else read_piece(piece, json_key):
            if isinstance(text, LineError):
                raise line_error(piece.path, text, text.line and lines_before(piece) + text.line)
            if text is not None:
                yield text


def first_documents(files: Sequence[Piece], json_key: str, can_cut: bool) -> list[str]:
    """Documents from the beginnings of at most SAMPLED_FILES files, spread evenly; what is at fault is left out."""
    found: list[str] = []
    for piece in files[:: -(-len(files) // SAMPLED_FILES)]:
        left = SAMPLE_CHARACTERS // min(len(files), SAMPLED_FILES)
        texts = read_fragments(piece, can_cut) if piece.kind == "file" else read_piece(piece, json_key)
        for text in texts:
            if isinstance(text, str):
                found.append(text[:left])
                left -= len(found[-1])
            if left <= 0:
                break
    return found


def line_error(path: Path, error: LineError, line_number: int) -> DataError:
    """The error that the user reads; `line_number` counts from 1 in the file, 0 for an error of the whole file."""
    return DataError(f"{path}:{line_number}: {error.message}" if line_number else f"{path}: {error.message}")


def lines_before(piece: Piece) -> int:
    """How many lines of its file begin before the first line of a piece; reads all of them."""
    if piece.start == 0:
        return 0
    count = 0
    with open(piece.path, "rb") as file:
        file.seek(piece.start - 1)
        file.readline()
        left = file.tell()
        file.seek(0)
        while left and (block := file.read(min(left, BUFFER_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _open(piece: Piece, meter: Meter) -> BinaryIO:
    """The unpacked bytes of a file; what is packed stands at its beginning."""
    raw = _MeteredFile(piece.path, meter)
    if not piece.packing:
        return io.BufferedReader(raw, BUFFER_BYTES)
    packed = io.BufferedReader(raw, BUFFER_BYTES)
    if piece.packing == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=packed, mode="rb"), BUFFER_BYTES)
    if piece.packing == "bzip2":
        return io.BufferedReader(bz2.BZ2File(packed), BUFFER_BYTES)
    if piece.packing == "xz":
        return io.BufferedReader(lzma.LZMAFile(packed), BUFFER_BYTES)
    return io.BufferedReader(_unpack_zstd(piece, packed), BUFFER_BYTES)


def _unpack_zstd(piece: Piece, packed: BinaryIO) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{piece.path}: .zst needs the package zstandard: pip install 'megatron-llama[data]'") from error

    class Stream(io.RawIOBase):
        """Says where zstandard would end in silence: a frame that is cut short."""

        def __init__(self) -> None:
            self._chunks = _frames(zstandard, packed)
            self._left = b""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self._left:
                chunk = next(self._chunks, None)
                if chunk is None:
                    return 0
                self._left = chunk
            count = min(len(buffer), len(self._left))
            buffer[:count], self._left = self._left[:count], self._left[count:]
            return count

    return Stream()


def _frames(zstandard: Any, packed: BinaryIO) -> Iterator[memoryview]:
    unpacker, inside, rest = None, False, b""
    while block := rest or packed.read(BUFFER_BYTES // 8):
        unpacker = unpacker or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            content = unpacker.decompress(block)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        rest, inside = unpacker.unused_data, not unpacker.eof
        if unpacker.eof:
            unpacker = None
        if content:
            yield memoryview(content)
    if inside:
        raise EOFError("the last zstd frame has no end")


def _lines_in(file: BinaryIO, piece: Piece) -> Iterator[bytes]:
    """The lines that begin in [start, end); all lines of a packed file."""
    first = b""
    if piece.start == 0:
        first = file.readline()
        position = len(first)
        first = first.removeprefix(BYTE_ORDER_MARK)
    else:
        file.seek(piece.start - 1)
        position = piece.start - 1 + len(file.readline())
    if first:
        yield first
    readline = file.readline
    if piece.packing:
        yield from iter(readline, b"")
        return
    end = piece.end
    while position < end and (line := readline()):
        yield line
        position += len(line)


def _read_parquet(piece: Piece, column: str, meter: Meter) -> Iterator[str | LineError | None]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{piece.path}: needs the package pyarrow: pip install 'megatron-llama[data]'") from error
    try:
        with parquet.ParquetFile(piece.path, memory_map=False, pre_buffer=False) as file:
            _check_column(piece, file.schema_arrow, column)
            rows, before, number = max(file.metadata.num_rows, 1), meter.bytes, 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield LineError(number, f"the value of {column!r} is null, needed a string") if text is None else text
                meter.bytes = before + piece.file_bytes * number // rows
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise DataError(f"{piece.path}: is damaged or not a parquet file: {error}") from error


def _check_column(piece: Piece, schema: Any, column: str) -> None:
    if column not in schema.names:
        found = ", ".join(map(repr, schema.names[:8])) or "none"
        raise DataError(f"{piece.path}: no column {column!r}; columns found: {found}; choose one with --json-key")
    kind = schema.field(column).type
    kind = str(getattr(kind, "value_type", kind))
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(f"{piece.path}: the column {column!r} is of type {kind}, needed strings")


def _read_fragments(piece: Piece, can_cut: bool, meter: Meter) -> Iterator[str | LineError]:
    start, end = (0, None) if piece.packing else (_cut_after(piece, piece.start, 0), _cut_after(piece, piece.end, 1))
    with _open(piece, meter) as file:
        if start:
            file.seek(start)
        position, held = start, b""
        left = None if end is None else max(0, end - start)
        step = FRAGMENT_BYTES if can_cut else sys.maxsize
        while block := file.read(min(left, step) if left is not None else (step if can_cut else -1)):
            left = left and left - len(block)
            held += block
            if position == 0 and held.startswith(BYTE_ORDER_MARK):
                position, held = len(BYTE_ORDER_MARK), held[len(BYTE_ORDER_MARK) :]
            cut = _last_cut(held) if can_cut and len(held) >= FRAGMENT_BYTES else 0
            if cut:
                text = _decode(held[:cut], 0, position)
                yield text
                if isinstance(text, LineError):
                    return
                position, held = position + cut + 1, held[cut + 1 :]
        yield _decode(held, 0, position)


def _last_cut(content: bytes) -> int:
    """The last space at which `content` may be cut, or 0."""
    stop = len(content) - 1  # what follows the space has to be known
    while (space := content.rfind(b" ", 1, stop)) > 0:
        if content[space - 1] != 0x20 and not content.endswith(b"\xe2\x96\x81", 0, space):
            return space
        stop = space
    return 0


def _cut_after(piece: Piece, position: int, kept: int) -> int:
    """The first byte after the first space at or after `position` where a text may be cut; the space itself if `kept`."""
    if position in (0, piece.file_bytes):
        return position
    base = position - _CUT_CONTEXT_BYTES
    with open(piece.path, "rb", buffering=0) as file:
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
        shown = content.decode(errors="replace")[:SHOWN_CHARACTERS] if line else ""
        return LineError(line, f"not UTF-8 text: {byte} ({error.reason})", shown)


def _line_document(content: bytes, json_key: str, number: int) -> str | LineError | None:
    text = _decode(content, number, 0)
    return text if isinstance(text, LineError) else text.rstrip("\r\n") or None


def _json_document(content: bytes, json_key: str, number: int) -> str | LineError | None:
    try:
        text = fast_loads(content)[json_key]
        if type(text) is str and (fast_loads is not json.loads or not _SURROGATE.search(text)):
            return text
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        pass
    line = _decode(content, number, 0)
    if isinstance(line, LineError) or not line.strip():
        return line if isinstance(line, LineError) else None
    text = _explain_json(line, json_key)
    return text if isinstance(text, str) else LineError(number, text[0], line[:SHOWN_CHARACTERS])


def _explain_json(line: str, json_key: str) -> str | tuple[str]:
    """The document after all, or what is wrong with the line."""
    try:
        value = json.loads(line.rstrip("\r\n"))
    except ValueError as error:
        is_syntax = isinstance(error, json.JSONDecodeError)
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}" if is_syntax else str(error)
        return (f"not valid JSON: {reason}",)
    except RecursionError:
        return ("not valid JSON: nested too deeply",)
    if not isinstance(value, dict):
        return (f"found a JSON {type(value).__name__}, needed an object with the key {json_key!r}",)
    if json_key not in value:
        found = ", ".join(map(repr, list(value)[:8])) or "none"
        return (f"no key {json_key!r}; keys found: {found}; choose one with --json-key",)
    text = value[json_key]
    if not isinstance(text, str):
        return (f"the value of {json_key!r} is of type {type(text).__name__}, needed a string",)
    surrogate = _SURROGATE.search(text)
    if surrogate:
        return (f"the text holds the lone surrogate \\u{ord(surrogate[0]):04x}, which is not valid Unicode",)
    return text
