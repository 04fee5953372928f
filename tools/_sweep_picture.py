"""The picture of a sweep: throughput of each configuration with its deviation, beside what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from _sweep import Row
from matplotlib.figure import Figure

from parallel.errors import DataError

MEASURED, PREDICTED, GREY = "#24517f", "#cf6a37", "#666666"
WIDTH, ROW_HEIGHT, REST = 10.0, 0.42, 1.5  # inches
REASON_WIDTH = 125  # characters
RC = {"svg.fonttype": "none", "svg.hashsalt": "sweep", "font.family": "DejaVu Sans", "font.size": 9}


def save_picture(path: Path, rows: Sequence[Row]) -> None:
    """Draw into a PNG, SVG or PDF file, the fastest at the top. Raises DataError."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, REST + ROW_HEIGHT * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY)
        for place, row in enumerate(rows):
            if row.figures is None:
                reason = row.reason.splitlines()[0]
                text = reason if len(reason) <= REASON_WIDTH else f"{reason[: REASON_WIDTH - 3]}..."
                axes.text(0, place, f" {text}", va="center", color=GREY, fontsize=7.5)
                continue
            error = {"ecolor": "black", "capsize": 3, "elinewidth": 1}
            label = "measured, mean and deviation of its steps" if place == 0 else None
            axes.barh(place, row.tokens_per_second, xerr=row.deviation, color=MEASURED, height=0.6, error_kw=error, label=label)
        _mark_predictions(axes, rows)
        axes.set_yticks(range(len(rows)), [row.name for row in rows], color="black")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("tokens per second of all ranks", color=GREY)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles[::-1], labels[::-1], loc="outside upper right", ncols=2, frameon=False)
        try:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot write the picture: {error}") from error


def _mark_predictions(axes: matplotlib.axes.Axes, rows: Sequence[Row]) -> None:
    found = [(row.predicted_tokens_per_second, place) for place, row in enumerate(rows) if row.predicted_tokens_per_second]
    if found:
        speeds, places = zip(*found, strict=True)
        axes.plot(speeds, places, "D", color=PREDICTED, markersize=6, markeredgecolor="white", label="predicted")
