"""Pieces of text to parts of a dataset: what one worker does, with nothing in memory but a batch of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llama.data.fast_encoding import ENGINES, make_encoder
from megatron_llama.data.indexed import best_dtype
from megatron_llama.data.inputs import Piece
from megatron_llama.data.parts import SPLITS, Counts, Part, PartWriter
from megatron_llama.data.text import LineError, Meter, line_error, lines_before, read_fragments, read_piece
from megatron_llama.tokenizer import Tokenizer
from parallel.errors import DataError

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Settings:
    """How documents become token ids.

    `on_error` is `error`, or `skip` for lines at fault, of which `max_errors` are allowed. `valid_fraction` of the
    documents, chosen by a hash of their text, are held out. `engine` is `sentencepiece` (whatever package the tokenizer's
    format needs), `gigatoken`, or `auto`: gigatoken where it is installed and agrees.
    """

    tokenizer_path: str
    json_key: str = "text"  # of jsonl: which value is the text; of parquet: which column
    append_bos: bool = False  # before each document
    append_eos: bool = False  # after each document
    on_error: str = "error"
    max_errors: int = 1000
    valid_fraction: float = 0.0
    engine: str = "sentencepiece"

    def __post_init__(self) -> None:
        assert self.on_error in ("error", "skip") and self.engine in ENGINES and 0 <= self.valid_fraction < 1

    def identity(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the ids depend on; max_errors does not change them."""
        return {**asdict(self), "tokenizer_path": None, "max_errors": None, "tokenizer_sha256": tokenizer.sha256}


class Encoder:
    """Turns pieces of text into parts. An empty document has no ids, not even bos or eos, as in Megatron."""

    def __init__(self, settings: Settings, vocabulary: str) -> None:
        self.settings = settings
        self.tokenizer = Tokenizer(settings.tokenizer_path)
        self.dtype = best_dtype(self.tokenizer.vocab_size)
        self._encode_arrays = make_encoder(self.tokenizer, settings.engine, vocabulary)
        self._bos = [self.tokenizer.bos_id] if settings.append_bos else []
        self._eos = [self.tokenizer.eos_id] if settings.append_eos else []

    def encode_part(self, pieces: Sequence[Piece], key: str, directory: Path, progress: Callable[[int, int], None]) -> Part:
        """Writes the part of `pieces`; `progress` is called with the bytes read and tokens made since its last call.

        Raises DataError for what is wrong with a line or file, or where a file changed while it was read.
        """
        splits = SPLITS if self.settings.valid_fraction else SPLITS[:1]
        with PartWriter(directory, key, self.dtype, splits) as writer:
            batch = _Batch(self, writer, progress)
            for number, piece in enumerate(pieces):
                batch.start_piece(piece)
                is_whole = piece.starts_document and piece.ends_document and not piece.packing
                is_long = piece.kind == "file" and not (is_whole and piece.file_bytes <= BATCH_CHARACTERS)
                lines = self._read_long(piece, batch) if is_long else self._read_lines(piece, number, batch)
                writer.part.lines.append(lines)
                self._check_unchanged(piece)
            batch.finish()
            return writer.finish(ends=pieces[-1].ends_document)

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of whole documents with bos and eos, joined, in the dtype of the dataset, and their lengths, int64."""
        ids, lengths = self._encode_arrays(texts, self.dtype)
        bos, eos = len(self._bos), len(self._eos)
        if not bos + eos:
            return ids, lengths
        full = np.where(lengths > 0, lengths + bos + eos, 0)
        ends = np.cumsum(full)
        with_text = np.flatnonzero(full)
        result, of_text = np.empty(int(full.sum()), self.dtype), np.ones(int(full.sum()), bool)
        if bos:
            first = (ends - full)[with_text]
            result[first], of_text[first] = self._bos[0], False
        if eos:
            last = ends[with_text] - 1
            result[last], of_text[last] = self._eos[0], False
        result[of_text] = ids
        return result, full

    def _read_lines(self, piece: Piece, number: int, batch: _Batch) -> int:
        lines = 0
        for text in read_piece(piece, self.settings.json_key, batch.meter):
            lines += 1
            if isinstance(text, str):
                batch.add(text)
            elif text is not None:
                self._note(piece, number, text, batch)
        return lines

    def _note(self, piece: Piece, number: int, error: LineError, batch: _Batch) -> None:
        if self.settings.on_error == "error":
            raise line_error(piece.path, error, error.line and lines_before(piece) + error.line)
        batch.writer.add_error(number, piece.path, error)
        if batch.writer.part.errors > self.settings.max_errors:
            raise too_many_errors(batch.writer.part.errors, self.settings.max_errors)

    def _read_long(self, piece: Piece, batch: _Batch) -> int:
        """One document, or a part of one, in fragments."""
        can_cut = self.tokenizer.cuts_at_spaces
        fraction = self.settings.valid_fraction
        valid = bool(fraction) and _is_below(fraction, _hash_file(piece, can_cut))
        split = "valid" if valid else "train"
        batch.flush()
        any_text = not piece.starts_document
        for text in read_fragments(piece, can_cut, batch.meter):
            if isinstance(text, LineError):
                raise line_error(piece.path, text, 0)
            space_before = any_text and bool(text)  # dropped where the document was cut
            ids = self._encode_arrays([text], self.dtype)[0]
            if len(ids) and not any_text:
                ids = np.concatenate([np.array(self._bos, self.dtype), ids])
            any_text |= len(ids) > 0
            batch.write(split, ids, np.array([len(ids)]), False, len(text.encode()) + space_before)
        if piece.ends_document:
            ids = np.array(self._eos if any_text else [], self.dtype)
            batch.write(split, ids, np.array([len(ids)]), True, 0, documents=1, empty=int(not any_text))
        return 0

    def _check_unchanged(self, piece: Piece) -> None:
        status = piece.path.stat()
        if (status.st_size, status.st_mtime_ns) != (piece.file_bytes, piece.modified_ns):
            raise DataError(f"{piece.path}: changed while it was read; run again when nothing writes to it")


class _Batch:
    """Documents on their way from the reader to the writer."""

    def __init__(self, encoder: Encoder, writer: PartWriter, progress: Callable[[int, int], None]) -> None:
        self.writer = writer
        self.meter = Meter()
        self._encoder = encoder
        self._progress = progress
        self._texts: list[str] = []
        self._characters = 0
        self._piece_end = self._reported = 0  # bytes of all pieces so far

    def start_piece(self, piece: Piece) -> None:
        self.meter.bytes = self._piece_end  # a reader may have read more or less than its piece
        self._piece_end += piece.end - piece.start

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= BATCH_CHARACTERS or len(self._texts) >= BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        texts, self._texts, self._characters = self._texts, [], 0
        if not texts:
            return
        ids, lengths = self._encoder.encode_documents(texts)
        text_bytes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts])
        fraction = self._encoder.settings.valid_fraction
        if not fraction:
            self._write_documents("train", ids, lengths, text_bytes)
            return
        held_out = np.array([is_held_out(text, fraction) for text in texts])
        by_token = np.repeat(held_out, lengths)
        for split, chosen, tokens in (("train", ~held_out, ~by_token), ("valid", held_out, by_token)):
            self._write_documents(split, ids[tokens], lengths[chosen], text_bytes[chosen])

    def _write_documents(self, split: str, ids: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        empty = int(np.count_nonzero(lengths == 0))
        self.write(split, ids, lengths, True, int(text_bytes.sum()), len(lengths), empty)

    def write(
        self, split: str, ids: np.ndarray, lengths: np.ndarray, ends: bool, text_bytes: int, documents: int = 0, empty: int = 0
    ) -> None:
        self.writer.add(split, ids, lengths, ends, Counts(documents, empty, len(ids), text_bytes, int(ids.max(initial=0))))
        self._report(min(self.meter.bytes, self._piece_end), len(ids))

    def finish(self) -> None:
        self.flush()
        self._report(self._piece_end, 0)

    def _report(self, read_bytes: int, tokens: int) -> None:
        self._progress(max(0, read_bytes - self._reported), tokens)
        self._reported = max(self._reported, read_bytes)


def too_many_errors(found: int, allowed: int) -> DataError:
    """The error for more bad lines than `--max-errors`."""
    return DataError(f"found {found} bad lines, more than --max-errors {allowed}; --on-error error shows the first of them")


def is_held_out(text: str, valid_fraction: float) -> bool:
    """Whether a document goes to the held-out part: a function of its text alone."""
    return _is_below(valid_fraction, hashlib.blake2b(text.encode(), digest_size=8).digest())


def _is_below(fraction: float, digest: bytes) -> bool:
    return int.from_bytes(digest, "big") < round(fraction * 2**64)


def _hash_file(piece: Piece, can_cut: bool) -> bytes:
    """The hash of a document that is too long to be held: of its text, without a byte order mark."""
    digest = hashlib.blake2b(digest_size=8)
    for number, text in enumerate(read_fragments(piece, can_cut)):
        if isinstance(text, str):
            digest.update((b" " if number else b"") + text.encode())
    return digest.digest()
