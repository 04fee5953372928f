"""Several indexed datasets to one: the ids are copied by the kernel or left where they are, the index in blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llama.data.indexed import BLOCK_ENTRIES, IndexedDataset, IndexedDatasetWriter
from megatron_llama.data.token_files import list_parts
from megatron_llama.data.vocabulary import read_sidecar
from parallel.errors import DataError

SAME = ("tokenizer_sha256", "append_bos", "append_eos")  # what the parts of one dataset have to share
SUMS = ("documents", "empty_documents", "tokens", "text_bytes")


def merge_datasets(
    prefixes: Sequence[str], output: str | Path, link: bool = False, progress: Callable[[int], None] | None = None
) -> int:
    """Writes the documents of all datasets, in this order, as one; returns the number of tokens.

    The bytes are those of one run over all texts. With `link` no id is copied: the dataset consists of an index and a
    list of the present files, which have to stay. Memory does not grow with the datasets. `progress` is called with the
    bytes copied since the last call.

    Raises DataError where the datasets differ in dtype or in how they were made, one has documents of several sequences,
    or the output is one of them.
    """
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    sidecar = _merged_sidecar([read_sidecar(dataset.prefix) for dataset in datasets], prefixes)
    _check(datasets, output)
    parent = Path(output).absolute().parent
    files = [part for dataset in datasets for part in list_parts(dataset.prefix)[1]]
    listed = [(os.path.relpath(path.absolute(), parent), size) for path, size in files]
    with IndexedDatasetWriter(output, datasets[0].dtype, parts=listed if link else None) as writer:
        for dataset in datasets:
            for path, size in [] if link else list_parts(dataset.prefix)[1]:
                writer.append_ids(path)
                if progress is not None:
                    progress(size)
            for lengths in document_lengths(dataset):
                writer.add_lengths(lengths)
        if sidecar is not None:
            sidecar["length_histogram"] = writer.length_histogram()
        writer.finish(sidecar)
    return sum(dataset.num_tokens for dataset in datasets)


def document_lengths(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    """The tokens of each document in blocks, int64. Each document has one sequence or, if it is empty, none."""
    for start in range(0, dataset.num_documents, BLOCK_ENTRIES):
        entries = dataset.document_indices[start : start + BLOCK_ENTRIES + 1]
        sequences = np.diff(entries)
        if sequences.max(initial=0) > 1:
            number = start + int(np.argmax(sequences > 1))
            raise DataError(f"{dataset.prefix}: document {number} has several sequences; such datasets are not merged")
        lengths = np.zeros(len(sequences), np.int64)
        lengths[sequences > 0] = dataset.sequence_lengths[entries[0] : entries[-1]]
        yield lengths


def _check(datasets: Sequence[IndexedDataset], output: str | Path) -> None:
    first = datasets[0]
    for dataset in datasets:
        if dataset.dtype != first.dtype:
            message = f"holds {dataset.dtype}, {first.prefix} {first.dtype}: were they made with different tokenizers?"
            raise DataError(f"{dataset.prefix}: {message}")
        if Path(dataset.prefix).absolute() == Path(output).absolute():
            raise DataError(f"{output}: is one of the datasets to be merged; choose another output")
        for _ in document_lengths(dataset):  # before hours of copying
            pass


def _merged_sidecar(sidecars: Sequence[dict[str, Any] | None], prefixes: Sequence[str]) -> dict[str, Any] | None:
    """None where a dataset has no sidecar."""
    known = [(sidecar, prefix) for sidecar, prefix in zip(sidecars, prefixes, strict=True) if sidecar is not None]
    for sidecar, prefix in known:
        for key in SAME:
            if sidecar.get(key) != known[0][0].get(key):
                raise DataError(
                    f"{prefix}: {key} is {sidecar.get(key)}, that of {known[0][1]} {known[0][0].get(key)}: "
                    "datasets that were made differently are mixed in data.train, not merged"
                )
    if len(known) < len(sidecars):
        return None
    merged = dict(known[0][0])
    for key in SUMS:
        merged[key] = sum(sidecar.get(key, 0) for sidecar, _ in known)
    merged["max_token_id"] = max(sidecar.get("max_token_id", 0) for sidecar, _ in known)
    merged["bytes_per_token"] = round(merged["text_bytes"] / max(merged["tokens"], 1), 4)
    return merged
