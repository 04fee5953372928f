"""Text to an indexed dataset, with several workers, in bounded memory, resumable after any kill.

The inputs are cut into pieces, which do not depend on the number of workers; each becomes a part of its own on disk
(parts.py), written by one worker (encoding.py). At the end the kernel joins the parts in the order of the inputs, or they
are left as they are. This process does no work per document.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_llama.data.atomic import link_file, publish, publish_directory
from megatron_llama.data.encoding import Encoder, Settings, too_many_errors
from megatron_llama.data.fast_encoding import choose_engine
from megatron_llama.data.indexed import DIRECTORY_PREFIX, IndexedDatasetWriter, best_dtype, write_index
from megatron_llama.data.inputs import Piece, choose_piece_bytes, cut, expand_inputs, group, stat_inputs
from megatron_llama.data.parts import Counts, Part, bin_path, find_part, lengths_path, numbered_errors, part_key, work_directory
from megatron_llama.data.text import first_documents
from megatron_llama.data.workers import Progress, run_tasks
from megatron_llama.tokenizer import Tokenizer
from parallel.errors import DataError

__all__ = ["Settings", "Summary", "preprocess"]

Task = tuple[str, tuple[Piece, ...]]  # the key of a part, and its input


@dataclass
class Summary(Counts):
    """What was written, held-out documents apart, in `valid`; `resumed_parts` were found finished.

    `engine_note` says which engine made the ids and why.
    """

    valid: Counts | None = None
    skipped_lines: int = 0
    parts: int = 0
    resumed_parts: int = 0
    engine_note: str = ""


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    settings: Settings,
    workers: int = 1,
    documents: str = "files",
    progress: Progress | None = None,
    piece_bytes: int | None = None,
    keep_parts: bool = False,
) -> Summary:
    """Writes `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json` from jsonl, parquet and text files, directories and patterns.

    `documents` says whether a text file is one document (`files`) or one a line (`lines`); `progress` is called with the
    bytes read and the tokens made since the last call. Held-out documents go to `PREFIX-valid`, skipped lines to
    `PREFIX.errors.jsonl`. With `keep_parts` the parts are not joined: `PREFIX` becomes a directory, which is a dataset
    too. Nothing appears at `prefix` before all is done; what is finished is kept in `PREFIX.partial` and found again by
    the next call. The bytes are the same for any number of workers, resumed or not.

    Raises DataError for an input, a line or a tokenizer that is at fault, or where no text was found.
    """
    tokenizer = Tokenizer(settings.tokenizer_path)
    files = stat_inputs(expand_inputs(inputs), documents)  # a missing input is found now rather than after hours
    sample = functools.partial(first_documents, files, settings.json_key, tokenizer.cuts_at_spaces)
    engine = choose_engine(tokenizer, settings.engine, sample)
    settings = replace(settings, engine=engine.name)
    tasks = _plan(files, settings, tokenizer, piece_bytes, keep_parts)
    prefix = Path(prefix)
    with work_directory(prefix, {key for key, _ in tasks}) as directory:
        start = functools.partial(EncodingWorker, settings, directory, engine.vocabulary)
        parts, resumed = _encode_all(tasks, start, settings, workers, progress or (lambda read, tokens: None))
        summary = _summarize(tasks, parts, resumed, settings.valid_fraction)
        if summary.tokens + (summary.valid.tokens if summary.valid else 0) == 0:
            shutil.rmtree(directory)
            raise DataError(f"{', '.join(map(str, inputs[:4]))}: found no text in {len(files)} files: nothing to write")
        _publish_errors(prefix, directory, [(parts[key], pieces) for key, pieces in tasks], summary.skipped_lines)
        in_order = [parts[key] for key, _ in tasks]
        for split, counts in (("valid", summary.valid), ("train", summary)):
            if counts is not None:
                target = prefix if split == "train" else Path(f"{prefix}-valid")
                sidecar = functools.partial(_sidecar, tokenizer, settings, split, counts)
                _write(target, directory, in_order, split, best_dtype(tokenizer.vocab_size), sidecar, keep_parts)
        shutil.rmtree(directory)
    summary.engine_note = engine.note
    return summary


def _plan(
    files: Sequence[Piece], settings: Settings, tokenizer: Tokenizer, piece_bytes: int | None, keep_parts: bool
) -> list[Task]:
    """The parts to be made, in the order of the inputs.

    A text file is one part where its document has to stay whole: in a part that is kept, or for a hash of all of it.
    """
    piece_bytes = piece_bytes or choose_piece_bytes(sum(file.file_bytes for file in files))
    cut_files = tokenizer.cuts_at_spaces and not keep_parts and not settings.valid_fraction
    identity = settings.identity(tokenizer)
    pieces = (piece for file in files for piece in cut(file, piece_bytes, cut_files))
    return [(part_key(together, identity), together) for together in group(pieces, piece_bytes)]


def _encode_all(
    tasks: Sequence[Task], start: Callable[[], EncodingWorker], settings: Settings, workers: int, progress: Progress
) -> tuple[dict[str, Part], int]:
    """All parts by key, and how many were found finished. Stops where the bad lines of all parts are too many."""
    unique = dict(tasks)  # a file that is given twice is encoded once
    parts: dict[str, Part] = {}
    resumed = errors = 0
    for key, (part, was_found) in run_tasks(list(unique.items()), start, min(workers, len(unique)), progress):
        parts[key] = part
        resumed += was_found
        errors += part.errors
        if errors > settings.max_errors:
            raise too_many_errors(errors, settings.max_errors)
    return parts, resumed


class EncodingWorker:
    """Makes parts, in this process or in another one, or finds them finished."""

    def __init__(self, settings: Settings, directory: Path, vocabulary: str) -> None:
        self._encoder = Encoder(settings, vocabulary)
        self._directory = directory

    def __call__(self, task: Task, progress: Progress) -> tuple[Part, bool]:
        key, pieces = task
        part = find_part(self._directory, key)
        if part is not None:
            progress(sum(piece.end - piece.start for piece in pieces), part.train.tokens + part.valid.tokens)
            return part, True
        return self._encoder.encode_part(pieces, key, self._directory, progress), False


def _summarize(tasks: Sequence[Task], parts: dict[str, Part], resumed: int, valid_fraction: float) -> Summary:
    summary = Summary(valid=Counts() if valid_fraction else None, parts=len(tasks), resumed_parts=resumed)
    for key, _ in tasks:
        summary.add(parts[key].train)
        if summary.valid is not None:
            summary.valid.add(parts[key].valid)
        summary.skipped_lines += parts[key].errors
    return summary


def _sidecar(
    tokenizer: Tokenizer, settings: Settings, split: str, counts: Counts, histogram: list[int]
) -> dict[str, object]:
    part = {"split": split, "valid_fraction": settings.valid_fraction} if settings.valid_fraction else {}
    return {
        **part,
        "tokenizer": tokenizer.path.name,
        "tokenizer_sha256": tokenizer.sha256,
        "engine": settings.engine,
        "vocab_size": tokenizer.vocab_size,
        "max_token_id": counts.max_token_id,
        "append_bos": settings.append_bos,
        "append_eos": settings.append_eos,
        "documents": counts.documents,
        "empty_documents": counts.empty_documents,
        "tokens": counts.tokens,
        "text_bytes": counts.text_bytes,
        "bytes_per_token": round(counts.text_bytes / max(counts.tokens, 1), 4),
        "length_histogram": histogram,
    }


def _write(
    prefix: Path, work: Path, parts: Sequence[Part], split: str, dtype: np.dtype, sidecar: Callable, keep_parts: bool
) -> None:
    """Joins the parts to one dataset, or makes a directory of them."""
    staging = work / f"joined-{split}"
    staging.mkdir(exist_ok=True)
    if not keep_parts:
        with IndexedDatasetWriter(prefix, dtype, staging) as writer:
            for part in parts:
                lengths = np.fromfile(lengths_path(work, part.key, split), "<i4")
                writer.append_file(bin_path(work, part.key, split), lengths, part.ends)
            writer.finish(sidecar(writer.length_histogram()))
        return
    listed = [(f"part-{number:05d}.bin", part.sizes[split]) for number, part in enumerate(parts)]
    made = staging / "dataset"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    with IndexedDatasetWriter(made / DIRECTORY_PREFIX, dtype, staging, listed) as writer:
        for part, (name, _) in zip(parts, listed, strict=True):
            lengths = np.fromfile(lengths_path(work, part.key, split), "<i4").astype(np.int64)
            link_file(bin_path(work, part.key, split), made / name)
            write_index(
                (made / name).with_suffix(".idx"), dtype, len(lengths), lambda lengths=lengths: [lengths][: len(lengths)]
            )
            writer.add_lengths(lengths)
        writer.finish(sidecar(writer.length_histogram()))
    publish_directory(made, prefix)


def _publish_errors(prefix: Path, work: Path, parts: Sequence[tuple[Part, Sequence[Piece]]], count: int) -> None:
    path, staged = Path(f"{prefix}.errors.jsonl"), work / "errors"
    if not count:
        path.unlink(missing_ok=True)  # of an older run
        return
    with open(staged, "w", encoding="utf-8") as file:
        for error in numbered_errors(work, parts):
            file.write(json.dumps(error, ensure_ascii=False) + "\n")
    publish([(staged, path)])
