"""A sweep of profile_throughput.py: every combination of some settings' values, each measured by ranks of its own."""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from _local_ranks import RanksFailedError, run_local_ranks
from _throughput_rank import Wish, measure, prepared
from _throughput_report import Figures

from megatron_llama.config import RunConfig, load_config
from megatron_llama.plan.hardware import Hardware
from megatron_llama.progress import GIB
from parallel.errors import ConfigError, DataError

OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")  # a comma, but not of a list as layers_per_stage = [4,5]
REASON_WIDTH = 110


@dataclass(frozen=True)
class Row:
    """A combination: its settings as text, and what was measured or why that could not be."""

    settings: dict[str, str]
    figures: Figures | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """The settings without their sections."""
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.settings.items())

    @property
    def tokens_per_second(self) -> float:
        return self.figures.tokens_per_second if self.figures else 0.0

    @property
    def deviation(self) -> float:
        """Of the tokens per second."""
        return self.tokens_per_second * self.figures.deviation / self.figures.mean if self.figures else 0.0

    @property
    def predicted_tokens_per_second(self) -> float | None:
        prediction = self.figures.prediction if self.figures else None
        return prediction.tokens_per_second_per_gpu * self.figures.devices if prediction else None


def combinations(sweeps: Sequence[str]) -> list[dict[str, str]]:
    """All combinations of what `KEY=V1,V2,...` list. Raises ConfigError."""
    values: dict[str, list[str]] = {}
    for text in sweeps:
        key, equals, listed = text.partition("=")
        given = [value.strip() for value in OUTSIDE_BRACKETS.split(listed) if value.strip()]
        if not equals or not given:
            raise ConfigError(f"--sweep {text}: write the setting and its values, as --sweep train.micro_batch_size=1,2,4")
        if key in values:
            raise ConfigError(f"--sweep {key} is given twice: list all values at once")
        values[key.removeprefix("--")] = given
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def run_sweep(
    config: RunConfig,
    sweeps: Sequence[str],
    steps: int,
    warmup: int,
    ranks: int,
    threads: int | None,
    hardware: Hardware | None,
) -> list[Row]:
    """Measure each combination on `ranks` new ranks, the fastest first; those that fail come last, with their reasons.

    Raises ConfigError for a setting that does not exist or cannot have a value.
    """
    chosen = [(settings, load_config(_flags(settings), config)) for settings in combinations(sweeps)]
    rows = []
    for number, (settings, one) in enumerate(chosen, 1):
        row = _measured(settings, one, steps, warmup, ranks, threads, hardware)
        said = f"{row.tokens_per_second:,.0f} tokens/s" if row.figures else _short(row.reason)
        print(f"[{number}/{len(chosen)}] {row.name}: {said}", file=sys.stderr, flush=True)
        rows.append(row)
    return sorted(rows, key=lambda row: -row.tokens_per_second)


def _flags(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def _measured(
    settings: dict[str, str],
    config: RunConfig,
    steps: int,
    warmup: int,
    ranks: int,
    threads: int | None,
    hardware: Hardware | None,
) -> Row:
    try:
        prepared(config, warmup + steps, ranks)
    except ConfigError as error:
        return Row(settings, reason=f"not possible: {error}")
    try:
        measured = run_local_ranks(partial(measure, wish=Wish(config, steps, warmup)), ranks, threads)
    except RanksFailedError as error:
        return Row(settings, reason=f"failed: {error}")
    return Row(settings, Figures(measured, hardware))


def _short(reason: str) -> str:
    line = reason.splitlines()[0]
    return line if len(line) <= REASON_WIDTH else f"{line[: REASON_WIDTH - 3]}..."


# ---- the table ----------------------------------------------------------------------------------------------------------


def table_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What a table has of each row; a failed one has its `error` alone."""
    return [{**row.settings, **_columns(row)} for row in rows]


def _columns(row: Row) -> dict[str, Any]:
    figures = row.figures
    if figures is None:
        return {"error": row.reason.splitlines()[0]}
    predicted = row.predicted_tokens_per_second
    return {
        "tokens_per_second": row.tokens_per_second,
        "deviation": row.deviation,
        "tokens_per_second_per_gpu": row.tokens_per_second / figures.devices,
        "step_seconds": figures.mean,
        "step_seconds_deviation": figures.deviation,
        "mfu_causal": figures.mfu("causal"),
        "mfu_full": figures.mfu("full"),
        "bubble": figures.shares["bubble"],
        "exposed_communication": figures.exposed_communication,
        "memory_bytes": figures.fullest.peak_bytes,
        "predicted_tokens_per_second": predicted,
        "measured_over_predicted": row.tokens_per_second / predicted if predicted else None,
    }


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Raises DataError."""
    table = table_rows(rows)
    columns = list(dict.fromkeys(name for one in table for name in one))
    columns.sort(key=lambda name: (name not in rows[0].settings, name == "error"))
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(table)
    except OSError as error:
        raise DataError(f"{path}: cannot write: {error.strerror}") from error


def sweep_lines(rows: Sequence[Row]) -> list[str]:
    """The table for a terminal."""
    keys = list(rows[0].settings)
    widths = {key: max(len(key), *(len(row.settings[key]) for row in rows)) for key in keys}
    has_prediction = any(row.predicted_tokens_per_second for row in rows)
    head = "  ".join(key.ljust(widths[key]) for key in keys)
    head += "   tokens/s      +-   s/step     MFU  bubble  exposed  mem GiB" + ("  predicted  ratio" if has_prediction else "")
    return [head, *(line for row in rows for line in _row_lines(row, widths, has_prediction))]


def _row_lines(row: Row, widths: dict[str, int], has_prediction: bool) -> Iterator[str]:
    settings = "  ".join(row.settings[key].ljust(width) for key, width in widths.items())
    figures = row.figures
    if figures is None:
        yield f"{settings}  {_short(row.reason)}"
        return
    mfu = figures.mfu("causal")
    predicted = row.predicted_tokens_per_second
    yield (
        f"{settings} {row.tokens_per_second:10,.0f} {row.deviation:7,.0f} {figures.mean:8.4f} "
        f"{'-' if mfu is None else f'{mfu:.1%}':>7s} {figures.shares['bubble']:7.1%} {figures.exposed_communication:8.1%} "
        f"{figures.fullest.peak_bytes / GIB:8.2f}"
        + (f" {predicted:10,.0f} {row.tokens_per_second / predicted:6.2f}" if has_prediction and predicted else "")
    )
