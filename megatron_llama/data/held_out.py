"""Held-out data: of each dataset the first windows, in the order of its file, the same ones in every evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llama.data.blend import Blend, build_blend
from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.vocabulary import read_sidecar
from parallel.errors import ConfigError


@dataclass(frozen=True)
class HeldOutSource:
    """One dataset of an evaluation."""

    name: str  # no other source has it
    blend: Blend  # of this dataset alone; sample i is the window i of its file
    num_windows: int  # evaluated, from the first one on
    bytes_per_token: float | None  # of UTF-8 text, in the whole dataset; None where no sidecar says it


def open_held_out(
    entries: Sequence[tuple[str, float | None]], sequence_length: int, vocab_size: int, tokens: int, setting: str
) -> list[HeldOutSource]:
    """Opens and checks the datasets of `entries`, each (prefix, weight or None), to evaluate `tokens` of them together.

    They share the tokens by their weights, or without weights by their sizes; each has at least one window, and none is
    read twice. `setting` is what the user gave the entries with. Raises ConfigError for entries that don't go together,
    DataError for what is wrong with a dataset.
    """
    mixture = build_blend(entries, sequence_length, 0, vocab_size, shuffle=False, setting=setting)  # no order, no seed
    names = source_names([prefix for prefix, _ in entries], setting)
    shares = mixture.draws_before(min(mixture.num_windows, max(1, tokens // sequence_length)))
    return [
        HeldOutSource(
            name,
            Blend([source], vocab_size=vocab_size),
            min(max(1, share), source.num_windows),
            bytes_per_token(source.dataset),
        )
        for name, source, share in zip(names, mixture.sources, shares, strict=True)
    ]


def source_names(prefixes: Sequence[str], setting: str) -> list[str]:
    """The last part of each path, and as many parts before it as tell it from the others. Raises ConfigError for twins."""
    paths = [Path(os.path.abspath(prefix)).parts[1:] for prefix in prefixes]
    for number, prefix in enumerate(prefixes):
        if paths[number] in paths[:number]:
            raise ConfigError(f"{setting}: {prefix} is there twice; remove one of them")
    endings = [["/".join(path[-count:]) for count in range(1, len(path) + 1)] for path in paths]
    return [
        next(ending for ending in own if sum(ending in other for other in endings) == 1 or ending == own[-1])
        for own in endings
    ]


def bytes_per_token(dataset: IndexedDataset) -> float | None:
    """UTF-8 bytes of text for each token of the dataset, bos and eos among them; None where no sidecar says it."""
    sidecar = read_sidecar(dataset.prefix) or {}
    if sidecar.get("tokens") != dataset.num_tokens or not sidecar.get("text_bytes"):
        return None
    return sidecar["text_bytes"] / dataset.num_tokens
