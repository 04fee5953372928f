"""Do the token ids of a dataset fit the model's vocabulary? And the sidecar `PREFIX.json`, which often answers it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from megatron_llama.data.indexed import IndexedDataset, dataset_path, resolve_prefix
from parallel.errors import DataError

WHOLE_SCAN_BYTES = 1 << 30  # a file up to this size is scanned completely
END_SCAN_BYTES = 64 << 20  # of a larger one, the first and the last so many bytes
BLOCK_TOKENS = 4 << 20


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """What `tools/preprocess_data.py` noted about a dataset, or None where there is no `PREFIX.json`.

    Raises DataError where the file is not a JSON object.
    """
    path = dataset_path(resolve_prefix(prefix), ".json")
    try:
        sidecar = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; it describes the dataset: write it again or remove it") from error
    if not isinstance(sidecar, dict):
        raise DataError(f"{path}: found {type(sidecar).__name__}, needed a JSON object; write it again or remove it")
    return sidecar


def check_token_ids(dataset: IndexedDataset, vocab_size: int) -> None:
    """Raises DataError where an id is not in [0, vocab_size), with its position and what to change.

    The sidecar's `max_token_id` is trusted if its token count agrees with the file. Otherwise the file is scanned: all of
    it up to 1 GiB, else its first and last 64 MiB; the loader checks every batch besides.
    """
    if dataset.dtype.kind == "u" and vocab_size > np.iinfo(dataset.dtype).max:
        return  # the dtype holds no larger id
    sidecar = read_sidecar(dataset.prefix) or {}
    noted = sidecar.get("max_token_id") if sidecar.get("tokens") == dataset.num_tokens else None
    if isinstance(noted, int) and noted < vocab_size:
        return
    end_tokens = END_SCAN_BYTES // dataset.dtype.itemsize
    if noted is not None or dataset.num_tokens * dataset.dtype.itemsize <= WHOLE_SCAN_BYTES:
        _scan(dataset, 0, dataset.num_tokens, vocab_size)
    else:
        _scan(dataset, 0, end_tokens, vocab_size)
        _scan(dataset, dataset.num_tokens - end_tokens, dataset.num_tokens, vocab_size)


def _scan(dataset: IndexedDataset, start: int, end: int, vocab_size: int) -> None:
    for block_start in range(start, end, BLOCK_TOKENS):
        check_ids_of(dataset, dataset.read_raw(block_start, min(BLOCK_TOKENS, end - block_start)), block_start, vocab_size)


def check_ids_of(dataset: IndexedDataset, ids: np.ndarray, start_token: int, vocab_size: int) -> None:
    """Raises DataError if an id of `ids`, which were read at `start_token`, is not in [0, vocab_size)."""
    if not len(ids) or (ids.max() < vocab_size and ids.min() >= 0):
        return
    wrong = int(np.argmax((ids >= vocab_size) | (ids < 0)))
    raise DataError(
        f"{dataset.bin_path}: token id {ids[wrong]} at position {start_token + wrong} is outside the vocabulary of "
        f"{vocab_size}; set model.vocab_size to that of the tokenizer which made the dataset, or preprocess the text "
        "with this model's tokenizer"
    )
