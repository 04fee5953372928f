"""Is a dataset what it should be? Its structure, its ids, its sidecar, and, given the text, a sample tokenised again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_llama.data.encoding import is_held_out
from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.inputs import expand_inputs, stat_inputs
from megatron_llama.data.text import LineError, read_fragments, read_piece
from megatron_llama.data.vocabulary import BLOCK_TOKENS, check_ids_of, read_sidecar
from megatron_llama.tokenizer import Tokenizer
from parallel.errors import DataError


def verify_ids(dataset: IndexedDataset, vocab_size: int | None, progress: Callable[[int], None]) -> int:
    """Reads every id; returns the largest one, or -1. `progress` is called with the tokens read since the last call.

    Raises DataError for an id outside the vocabulary, or a sidecar whose counts are not those of the dataset.
    """
    largest = -1
    limit = vocab_size or 2**63 - 1
    for start in range(0, dataset.num_tokens, BLOCK_TOKENS):
        ids = dataset.read_raw(start, min(BLOCK_TOKENS, dataset.num_tokens - start))
        check_ids_of(dataset, ids, start, limit)
        largest = max(largest, int(ids.max()))
        progress(len(ids))
    sidecar = read_sidecar(dataset.prefix) or {}
    for key, found in (("tokens", dataset.num_tokens), ("documents", dataset.num_documents), ("max_token_id", largest)):
        if sidecar.get(key, found) != found:
            raise DataError(f"{dataset.prefix}: its sidecar says {key} {sidecar[key]}, found {found}: of another dataset?")
    return largest


def verify_text(
    dataset: IndexedDataset,
    tokenizer: Tokenizer,
    inputs: Sequence[str | Path],
    json_key: str,
    documents: str,
    samples: int,
    seed: int,
) -> int:
    """Tokenises `samples` random documents of the text again with the tokenizer's own package; returns how many.

    The text is read in the order of the inputs up to the last document chosen. Raises DataError for a document whose ids
    differ, or a text that has another number of documents.
    """
    sidecar = read_sidecar(dataset.prefix) or {}
    if sidecar.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise DataError(f"{dataset.prefix}: was made with another tokenizer, sha256 {sidecar['tokenizer_sha256']}")
    bos, eos = _ends(dataset, tokenizer, sidecar)
    chosen = sorted(random.Random(seed).sample(range(dataset.num_documents), min(samples, dataset.num_documents)))
    left = iter(chosen)
    wanted = next(left, None)
    number = -1
    texts = _texts(inputs, json_key, documents, tokenizer.cuts_at_spaces)
    for number, text in enumerate(text for text in texts if _is_of_split(text, sidecar)):
        if wanted is None:
            break
        if number == wanted:
            _compare(dataset, number, text, tokenizer.encode(text), bos, eos)
            wanted = next(left, None)
    if wanted is not None:
        raise DataError(f"{dataset.prefix}: has {dataset.num_documents} documents, the text only {number + 1}")
    return len(chosen)


def _ends(dataset: IndexedDataset, tokenizer: Tokenizer, sidecar: dict) -> tuple[list[int], list[int]]:
    """What stands before and after each document: as the sidecar says, else as the first document shows."""
    first = next((d for d in map(dataset.document, range(dataset.num_documents)) if len(d)), np.zeros(1, np.int64))
    bos = sidecar.get("append_bos", int(first[0]) == tokenizer.bos_id)
    eos = sidecar.get("append_eos", int(first[-1]) == tokenizer.eos_id)
    return [tokenizer.bos_id] * bool(bos), [tokenizer.eos_id] * bool(eos)


def _is_of_split(text: str, sidecar: dict) -> bool:
    """Whether the document belongs to this dataset, where a part of the text was held out."""
    if "valid_fraction" not in sidecar:
        return True
    return is_held_out(text, sidecar["valid_fraction"]) == (sidecar["split"] == "valid")


def _texts(inputs: Sequence[str | Path], json_key: str, documents: str, can_cut: bool):
    for piece in stat_inputs(expand_inputs(inputs), documents):
        if piece.kind == "file":
            texts = list(read_fragments(piece, can_cut))
            if not isinstance(texts[-1], LineError):
                yield " ".join(texts)
        else:
            yield from (text for text in read_piece(piece, json_key) if isinstance(text, str))


def _compare(dataset: IndexedDataset, number: int, text: str, ids: list[int], bos: list[int], eos: list[int]) -> None:
    expected = [*bos, *ids, *eos] if ids else []
    found = dataset.document(number).tolist()
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        place = next((i for i, (own, other) in pairs if own != other), min(len(found), len(expected)))
        raise DataError(
            f"{dataset.prefix}: document {number} ({text[:40]!r}...) differs from its text from token {place} on: found "
            f"{found[place : place + 5]}, the tokenizer gives {expected[place : place + 5]}"
        )
