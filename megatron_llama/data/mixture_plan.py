"""What a mixture gives for a budget of tokens: the paper's table, a simulation of the order, a picture."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llama.data.blend import integer_weights, period_table
from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.mixture import MixtureRow, capped_weights, format_tokens, redistribute
from megatron_llama.data.samples import Windows
from megatron_llama.data.vocabulary import read_sidecar
from parallel.errors import ConfigError, DataError

SOURCE_KEYS = {"name": str, "prefix": str, "weight": float, "tokens": int, "max_epochs": float}
FORM = '[[sources]] with name or prefix, and weight, tokens, max_epochs; or a run\'s configuration with data.train'


@dataclass(frozen=True)
class PlannedSource:
    """A source by its size alone. Without weights (None), sources are mixed in proportion to their sizes."""

    name: str
    tokens: int
    weight: float | None = None
    max_epochs: float | None = None


@dataclass(frozen=True)
class Simulation:
    """The order of the samples, looked at in one period, which repeats."""

    period: int
    deviation: list[float]  # of each source from its share at any prefix, in samples, at most
    per_batch: list[tuple[int, int]]  # the fewest and the most samples of each source in a batch


def read_plan(path: Path) -> list[PlannedSource]:
    """The sources of a TOML file: `[[sources]]`, or `data.train` of a run's configuration. Raises ConfigError, DataError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    data = content.get("data")
    entries = content["sources"] if "sources" in content else data.get("train") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: found no sources; needed: {FORM}")
    sources = [_planned(path, {"prefix": entry} if isinstance(entry, str) else entry) for entry in entries]
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError(f"{path}: some sources have a weight and some have none; give it to all or to none")
    return sources


def _planned(path: Path, entry: Any) -> PlannedSource:
    if not isinstance(entry, dict) or not {"name", "prefix"} & entry.keys():
        raise ConfigError(f"{path}: source {entry!r} has no name; needed: {FORM}")
    for key, value in entry.items():
        kind = SOURCE_KEYS.get(key)
        if kind is None:
            raise ConfigError(f"{path}: source {entry!r}: unknown key {key}; known are {', '.join(SOURCE_KEYS)}")
        numeric = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not (isinstance(value, str) if kind is str else numeric):
            raise ConfigError(f"{path}: source {entry!r}: {key} has to be {'text' if kind is str else 'a number above 0'}")
    prefix = entry.get("prefix", "")
    if "tokens" not in entry and not prefix:
        raise ConfigError(f"{path}: source {entry['name']} needs tokens, or the prefix of a dataset that says how many it has")
    tokens = int(entry["tokens"]) if "tokens" in entry else count_tokens(prefix)
    return PlannedSource(entry.get("name", prefix), tokens, entry.get("weight"), entry.get("max_epochs"))


def count_tokens(prefix: str) -> int:
    """The tokens of a dataset, from its sidecar or else its index. Raises DataError."""
    noted = (read_sidecar(prefix) or {}).get("tokens")
    return noted if isinstance(noted, int) else IndexedDataset(prefix).num_tokens


def plan_mixture(
    sources: Sequence[PlannedSource], tokens: int, sequence_length: int, on_cap: str = "error"
) -> tuple[list[MixtureRow], list[int]]:
    """How often a run of `tokens` reads each source, and the integer weights of the mixture.

    Where a source would exceed its max_epochs, rows say so (`on_cap` error), or its share goes to the others.
    Raises ConfigError for impossible weights and if all sources together are too small, DataError for a source too short.
    """
    windows = [Windows(source.tokens, sequence_length, 0, 0).num_samples for source in sources]
    for source, count in zip(sources, windows, strict=True):
        if count < 1:
            raise DataError(f"{source.name}: {source.tokens} tokens are too few for a sample of {sequence_length}")
    samples = math.ceil(tokens / sequence_length)
    given = [count if source.weight is None else source.weight for source, count in zip(sources, windows, strict=True)]
    integers = integer_weights(given)
    rows = _rows(sources, windows, integers, samples, sequence_length)
    if on_cap == "redistribute" and any(row.exceeds for row in rows):
        room = [math.inf if s.max_epochs is None else s.max_epochs * count for s, count in zip(sources, windows, strict=True)]
        amounts = redistribute(integers, room, samples)
        if amounts is None:
            most = format_tokens(sum(room) * sequence_length)
            raise ConfigError(f"all sources within their max_epochs have {most} tokens, fewer than {format_tokens(tokens)}")
        integers = capped_weights(amounts, room)
        rows = _rows(sources, windows, integers, samples, sequence_length)
    return rows, integers


def _rows(
    sources: Sequence[PlannedSource], windows: Sequence[int], integers: Sequence[int], samples: int, length: int
) -> list[MixtureRow]:
    table, _ = period_table(integers)
    periods, entries = divmod(samples, len(table))
    counts = np.bincount(table[:entries], minlength=len(sources)).tolist()
    return [
        MixtureRow(
            source.name, weight / len(table), count * length, (periods * weight + within) * length, source.max_epochs, length
        )
        for source, count, weight, within in zip(sources, windows, integers, counts, strict=True)
    ]


def simulate(integers: Sequence[int], batch_size: int) -> Simulation:
    """Counts the samples of each source at every prefix and in every batch."""
    table, _ = period_table(integers)
    period = len(table)
    prefixes = np.arange(1, period + 1)
    batch_starts = np.arange(0, period, math.gcd(period, batch_size))
    deviation, per_batch = [], []
    for number, weight in enumerate(integers):
        counts = np.concatenate([[0], np.cumsum(table == number)])
        deviation.append(float(np.abs(counts[1:] - prefixes * weight / period).max()))
        turns, ends = np.divmod(batch_starts + batch_size, period)
        in_batch = turns * weight + counts[ends] - counts[batch_starts]
        per_batch.append((int(in_batch.min()), int(in_batch.max())))
    return Simulation(period, deviation, per_batch)


def save_picture(rows: Sequence[MixtureRow], path: Path) -> None:
    """Draws tokens and epochs of each source. Raises DataError where matplotlib is missing or the file can't be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("--picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places, names = np.arange(len(rows)), [row.name for row in rows]
    tokens, unique = [row.tokens for row in rows], [row.unique_tokens for row in rows]
    left.barh(places - 0.2, tokens, height=0.36, color="#33608c", label="read")
    left.barh(places + 0.2, unique, height=0.36, color="#b8c9da", label="unique")
    for place, row in zip(places, rows, strict=True):
        left.text(row.tokens, place - 0.2, f" {format_tokens(row.tokens)}, {row.share:.1%}", va="center", fontsize=8)
    left.set_xlim(0, 1.35 * max(tokens + unique))
    left.xaxis.set_major_formatter(lambda value, _: format_tokens(value))
    left.set(yticks=places, yticklabels=names, xlabel="tokens", title=f"{format_tokens(sum(tokens))} tokens")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    epochs = [row.epochs for row in rows]
    right.barh(places, epochs, height=0.6, color=["#b3483a" if row.exceeds else "#4f8a5b" for row in rows])
    for place, row in zip(places, rows, strict=True):
        right.text(row.epochs, place, f" {row.epochs:.2f}", va="center", fontsize=8)
        if row.max_epochs is not None:
            right.plot([row.max_epochs] * 2, [place - 0.4, place + 0.4], color="#222222", linewidth=1.5)
    right.axvline(1, color="#888888", linewidth=0.8, linestyle="--")
    limits = [row.max_epochs for row in rows if row.max_epochs is not None]
    right.set_xlim(0, 1.15 * max(epochs + limits + [1]))
    right.set(xlabel="epochs", title="epochs" + (" (black: max_epochs)" if limits else ""))
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot write the picture: {error}") from error
