"""What is in an indexed dataset, for people: counts, lengths, how it was made, its first documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_llama.data.indexed import BLOCK_ENTRIES, IndexedDataset
from megatron_llama.data.vocabulary import read_sidecar
from megatron_llama.tokenizer import Tokenizer
from parallel.errors import DataError

BAR_CHARACTERS = 50
SAMPLED_LENGTHS = 1_000_000  # quantiles of a larger dataset are those of evenly spread sequences


def describe(dataset: IndexedDataset) -> list[str]:
    """Lines with the counts, the statistics of the sequence lengths and the sidecar."""
    sizes = f"{dataset.num_tokens:,} tokens, {dataset.num_documents:,} documents, {dataset.num_sequences:,} sequences"
    empty = int(dataset.num_documents - _count_non_empty(dataset))
    lines = [
        f"dataset    {dataset.prefix}",
        f"size       {sizes}" + (f", {empty:,} documents empty" if empty else ""),
        f"tokens as  {dataset.dtype}, {dataset.num_tokens * dataset.dtype.itemsize:,} bytes",
    ]
    if dataset.num_sequences:
        lengths = dataset.sequence_lengths[:: -(-dataset.num_sequences // SAMPLED_LENGTHS)]
        low, quarter, median, three_quarters, high = np.quantile(lengths, (0, 0.25, 0.5, 0.75, 1)).astype(np.int64)
        mean = dataset.num_tokens / dataset.num_sequences
        lines.append(
            f"lengths    mean {mean:,.1f}, median {median:,}, quartiles {quarter:,} and {three_quarters:,}, "
            f"{low:,} to {high:,} tokens"
        )
    sidecar = read_sidecar(dataset.prefix)
    if sidecar is None:
        return [*lines, "sidecar    none (a dataset made elsewhere)"]
    lines += [f"sidecar    {key}: {value}" for key, value in sidecar.items()]
    if sidecar.get("text_bytes") and dataset.num_tokens:
        lines.append(f"           {sidecar['text_bytes'] / dataset.num_tokens:.3f} bytes of text a token")
    if sidecar.get("tokens") != dataset.num_tokens:
        lines.append(f"warning    the sidecar is of another dataset: it says {sidecar.get('tokens')} tokens")
    return lines


def length_histogram(dataset: IndexedDataset) -> np.ndarray:
    """How many sequences have a length in [2^k, 2^(k + 1)), per k; int64 [31]. Sequences of length 0 do not count."""
    counts = np.zeros(31, np.int64)
    edges = 2 ** np.arange(32, dtype=np.int64)
    for start in range(0, dataset.num_sequences, BLOCK_ENTRIES):
        counts += np.histogram(dataset.sequence_lengths[start : start + BLOCK_ENTRIES], edges)[0]
    return counts


def histogram_lines(counts: np.ndarray) -> list[str]:
    """The histogram as bars of text, from the first to the last length that occurs."""
    used = np.flatnonzero(counts)
    if not used.size:
        return []
    rows = range(used[0], used[-1] + 1)
    longest = counts.max()
    bars = ("#" * int(np.ceil(BAR_CHARACTERS * counts[k] / longest)) for k in rows)
    return [f"{2**k:>11,} - {2 ** (k + 1) - 1:<13,} {counts[k]:>12,} {bar}" for k, bar in zip(rows, bars, strict=True)]


def save_picture(dataset: IndexedDataset, path: Path) -> None:
    """Draws the histogram to a file. Raises DataError where matplotlib is not installed or the file cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("--picture needs matplotlib: pip install matplotlib") from error
    counts = length_histogram(dataset)
    used = np.flatnonzero(counts)
    rows = np.arange(used[0], used[-1] + 1) if used.size else np.arange(1)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(rows, counts[rows], width=0.9, align="edge", color="#33608c")
    axes.set_xticks(np.append(rows, rows[-1] + 1), [f"{2**k:,}" for k in np.append(rows, rows[-1] + 1)], rotation=45)
    axes.set(xlabel="sequence length, tokens", ylabel="sequences")
    axes.set_title(f"{Path(dataset.prefix).name}: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot write the picture: {error}") from error


def document_lines(dataset: IndexedDataset, number: int, tokenizer: Tokenizer | None, max_tokens: int) -> list[str]:
    """A document's ids, and its text where there is a tokenizer; at most `max_tokens` of it.

    Raises DataError for a document that is not there, or ids that the tokenizer does not have.
    """
    ids = dataset.document(number)
    shown = ids[:max_tokens].tolist()
    more = "" if len(shown) == len(ids) else f" ... ({len(ids) - len(shown):,} more)"
    lines = [f"document {number}, {len(ids):,} tokens"]
    if tokenizer is None:
        return [*lines, "  " + " ".join(map(str, shown)) + more]
    marks = {tokenizer.bos_id: "bos", tokenizer.eos_id: "eos"}
    ends = [marks[token] for token in (shown[:1] + (shown[-1:] if not more and len(shown) > 1 else [])) if token in marks]
    text = tokenizer.decode(shown) + more
    return [*lines, *([f"  with {' and '.join(ends)}"] if ends else []), *("  | " + line for line in text.splitlines())]


def tokenizer_warning(dataset: IndexedDataset, tokenizer: Tokenizer) -> str | None:
    """A line that says so if the dataset was made with another tokenizer."""
    noted = (read_sidecar(dataset.prefix) or {}).get("tokenizer_sha256")
    if noted in (None, tokenizer.sha256):
        return None
    return f"warning    made with another tokenizer: sha256 {noted}, {tokenizer.path} has {tokenizer.sha256}"


def _count_non_empty(dataset: IndexedDataset) -> int:
    entries = dataset.document_indices
    starts = range(0, dataset.num_documents, BLOCK_ENTRIES)
    return sum(int(np.count_nonzero(np.diff(entries[start : start + BLOCK_ENTRIES + 1]))) for start in starts)
