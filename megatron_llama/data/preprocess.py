"""Text to an indexed dataset, with several workers, in bounded memory.

The inputs are cut into pieces of about 1 MB; workers turn a piece into token ids; this process writes them in the order of
the inputs, so the output is the same for any number of workers. A few pieces per worker are under way at a time.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_llama.data.indexed import IndexedDatasetWriter, best_dtype
from megatron_llama.data.text import LineError, Piece, line_error, list_pieces, read_piece
from megatron_llama.tokenizer import Tokenizer
from parallel.errors import DataError

PIECE_BYTES = 1 << 20
TASKS_PER_WORKER = 3  # submitted ahead, so that no worker waits for the writer


@dataclass(frozen=True)
class Settings:
    """How documents become token ids."""

    tokenizer_path: str
    json_key: str = "text"  # of jsonl: which value is the text
    append_bos: bool = False  # before each document
    append_eos: bool = False  # after each document


@dataclass(frozen=True)
class Encoded:
    """The documents of one piece."""

    piece: Piece
    ids: np.ndarray  # all documents joined, dtype of the dataset
    lengths: np.ndarray  # of each document in tokens, int64
    num_lines: int
    text_bytes: int
    error: LineError | None  # the piece ends before it


@dataclass
class Summary:
    """What was written: counts, and the largest id; text_bytes counts UTF-8 without JSON."""

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token_id: int = 0


class Encoder:
    """Turns pieces of text into token ids."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = Tokenizer(settings.tokenizer_path)
        self.dtype = best_dtype(self.tokenizer.vocab_size)

    def encode_piece(self, piece: Piece) -> Encoded:
        """The ids of a piece's documents; an empty document has none, not even bos or eos, as in Megatron."""
        parts, lengths, num_lines, text_bytes, error = [], [], 0, 0, None
        for text in read_piece(piece, self.settings.json_key):
            num_lines += 1
            if isinstance(text, LineError):
                error = text
            elif text is not None:
                parts.append(self._encode_document(text, piece))
                lengths.append(len(parts[-1]))
                space_before = bool(text) and not piece.starts_document  # dropped where the document was cut
                text_bytes += len(text.encode()) + space_before
        ids = np.concatenate(parts) if parts else np.zeros(0, self.dtype)
        return Encoded(piece, ids, np.array(lengths, np.int64), num_lines, text_bytes, error)

    def _encode_document(self, text: str, piece: Piece) -> np.ndarray:
        ids = self.tokenizer.encode(text)
        bos = self.settings.append_bos and piece.starts_document and bool(ids)
        # the last part of a long document may be empty, the document is not
        eos = self.settings.append_eos and piece.ends_document and (bool(ids) or not piece.starts_document)
        return np.array([self.tokenizer.bos_id] * bos + ids + [self.tokenizer.eos_id] * eos, self.dtype)


def preprocess(
    inputs: Sequence[Path],
    prefix: str | Path,
    settings: Settings,
    workers: int = 1,
    documents: str = "files",
    progress: Callable[[int, int], None] | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> Summary:
    """Writes `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json` from jsonl and text files.

    `documents` says whether a text file is one document (`files`) or one a line (`lines`); `progress` is called with the
    bytes read and the tokens made since the last call. Nothing appears at `prefix` before all is done.

    Raises DataError for an input, a line or a tokenizer that is at fault, or where no text was found.
    """
    tokenizer = Tokenizer(settings.tokenizer_path)
    pieces = functools.partial(list_pieces, inputs, documents, piece_bytes, tokenizer.cuts_at_spaces)
    for _ in pieces():  # a missing input is found now rather than after hours
        pass
    summary = Summary()
    with IndexedDatasetWriter(prefix, best_dtype(tokenizer.vocab_size)) as writer:
        lines_before = 0  # of the current file
        for encoded in _encode_all(_tasks(pieces(), piece_bytes), settings, workers):
            piece = encoded.piece
            lines_before = 0 if piece.start == 0 else lines_before
            if encoded.error is not None:
                raise line_error(piece.path, encoded.error, encoded.error.line and lines_before + encoded.error.line)
            lines_before += encoded.num_lines
            _write(writer, encoded, summary)
            if progress is not None:
                progress(piece.end - piece.start, len(encoded.ids))
        if summary.tokens == 0:
            raise DataError(f"{', '.join(map(str, inputs[:4]))}: found no text in {len(inputs)} inputs: nothing to write")
        writer.finish(_sidecar(tokenizer, settings, summary))
    return summary


def _write(writer: IndexedDatasetWriter, encoded: Encoded, summary: Summary) -> None:
    before = writer.num_documents
    if len(encoded.lengths):
        writer.add_documents(encoded.ids, encoded.lengths, ends=encoded.piece.ends_document)
    whole_documents = encoded.piece.starts_document and encoded.piece.ends_document
    summary.empty_documents += int(np.count_nonzero(encoded.lengths == 0)) if whole_documents else 0
    summary.documents += writer.num_documents - before
    summary.tokens += len(encoded.ids)
    summary.text_bytes += encoded.text_bytes
    summary.max_token_id = max(summary.max_token_id, int(encoded.ids.max(initial=0)))


def _sidecar(tokenizer: Tokenizer, settings: Settings, summary: Summary) -> dict[str, object]:
    return {
        "tokenizer": tokenizer.path.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "max_token_id": summary.max_token_id,
        "append_bos": settings.append_bos,
        "append_eos": settings.append_eos,
        "documents": summary.documents,
        "empty_documents": summary.empty_documents,
        "tokens": summary.tokens,
        "text_bytes": summary.text_bytes,
    }


def _tasks(pieces: Iterable[Piece], task_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Consecutive pieces, small ones together, so that thousands of small files cost no round trip each."""
    task: list[Piece] = []
    size = 0
    for piece in pieces:
        if task and size + piece.end - piece.start > task_bytes:
            yield tuple(task)
            task, size = [], 0
        task.append(piece)
        size += piece.end - piece.start
    if task:
        yield tuple(task)


def _encode_all(tasks: Iterable[tuple[Piece, ...]], settings: Settings, workers: int) -> Iterator[Encoded]:
    """The pieces of all tasks in order, encoded here with one worker, else by that many processes."""
    if workers == 1:
        encoder = Encoder(settings)
        for task in tasks:
            yield from map(encoder.encode_piece, task)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    under_way: deque = deque()
    try:
        for task in tasks:
            under_way.append(pool.submit(_encode_task, settings, task))
            if len(under_way) >= workers * TASKS_PER_WORKER:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    except BrokenProcessPool as error:
        message = "a worker process ended unexpectedly, perhaps killed for lack of memory: use fewer --workers"
        raise DataError(message) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@functools.lru_cache(maxsize=1)
def _encoder(settings: Settings) -> Encoder:
    return Encoder(settings)


def _encode_task(settings: Settings, task: tuple[Piece, ...]) -> list[Encoded]:
    return list(map(_encoder(settings).encode_piece, task))


def _start_worker() -> None:
    """The writer decides when workers end: not Ctrl-C, which reaches them too, and not later than the writer itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
