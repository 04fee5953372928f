"""The picture of goodput.py: steps over wall time, where the time went, and what comes of which checkpoint interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_llama.checkpoint_interval import SECONDS_PER_DAY, Projection, Rates, productive_share
from megatron_llama.goodput import PARTS, Account, Record
from parallel.errors import DataError

# The hues are those that colour-blind people tell apart; lightness tells them apart in grey.
COLOURS = {
    "steps": "#24517f",
    "redone": "#cf6a37",
    "skipped": "#e38a5a",
    "checkpoints": "#7fb069",
    "evaluation": "#b9dda6",
    "starting": "#eda03f",
    "idle": "#d9d9d9",
    "other": "#ececec",
}
GREY = "#666666"
WIDTH, HEIGHTS = 10.0, (3.2, 0.55, 3.2)  # inches
SPREAD = 30  # the curves go from the best interval / 30 to the best interval x 30
RC = {"svg.fonttype": "none", "svg.hashsalt": "goodput", "font.family": "DejaVu Sans", "font.size": 9}
UNITS = ((SECONDS_PER_DAY, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def save_picture(
    path: Path, records: Sequence[Record], found: Account, rates: Rates | None, projections: Sequence[Projection]
) -> None:
    """Draw into a PNG, SVG or PDF file; without rates, the last panel is left out. Raises DataError."""
    heights = HEIGHTS if rates else HEIGHTS[:2]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.9 * len(heights)), layout="constrained")
        panels = figure.subplots(len(heights), gridspec_kw={"height_ratios": heights})
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=GREY)
        _draw_steps(panels[0], records, found)
        _draw_shares(panels[1], found)
        if rates:
            _draw_intervals(panels[2], found, rates, projections)
        try:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot write the picture: {error}") from error


def _draw_steps(axes: Axes, records: Sequence[Record], found: Account) -> None:
    """Steps over wall time, one line per start of the program; what was lost in another colour."""
    size, unit = next(((size, unit) for size, unit in UNITS if found.wall_seconds >= 2 * size), UNITS[-1])
    programs = np.cumsum([record.event == "start" for record in records])
    for program in range(1, programs[-1] + 1):
        own = [record for record, number in zip(records, programs, strict=True) if number == program]
        times = np.array([(record.time - found.begin) / size for record in own])
        steps = np.array([record.step for record in own])
        axes.plot(times, steps, color=COLOURS["steps"], linewidth=1.6, solid_capstyle="butt")
        lost = next((i for i, record in enumerate(own) if record.part == "redone"), len(own))
        axes.plot(times[max(0, lost - 1) :], steps[max(0, lost - 1) :], color=COLOURS["redone"], linewidth=1.6)
        saved = [i for i, record in enumerate(own) if record.part == "checkpoints"]
        axes.plot(times[saved], steps[saved], "o", color=COLOURS["checkpoints"], markersize=3)
    axes.set(xlabel=f"wall time, {unit}", ylabel="step", xlim=(0, found.wall_seconds / size), ylim=(0, None))
    axes.set_title(f"effective training time {found.effective_share:.1%}; failures: {found.failures}", loc="left")


def _draw_shares(axes: Axes, found: Account) -> None:
    begin = 0.0
    for part, name in PARTS.items():
        share = found.seconds[part] / found.wall_seconds
        if share:
            axes.barh(0, share, left=begin, color=COLOURS[part], label=f"{name} {share:.1%}")
        begin += share
    axes.set(xlim=(0, 1), yticks=[], title="")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.set_xlabel("of wall time")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, labelcolor=GREY)


def _draw_intervals(axes: Axes, found: Account, rates: Rates, projections: Sequence[Projection]) -> None:
    best = [one.interval for one in projections]
    intervals = np.geomspace(min(best) / SPREAD, max(best) * SPREAD, 400)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, len(projections)))
    for one, shade in zip(projections, shades, strict=True):
        times = rates.checkpoint_seconds, rates.restart_seconds, one.mean_time_between_failures
        shares = [productive_share(interval, *times) for interval in intervals]
        axes.plot(intervals, shares, color=shade, label=f"{one.gpus:,} GPUs: at best {one.share:.1%}")
        axes.plot([one.interval], [one.share], "o", color=shade)
    if found.present_interval:
        axes.axvline(found.present_interval, color=GREY, linestyle="--", linewidth=1, label="at present")
    axes.set(xscale="log", ylim=(0, 1), xlabel="seconds of training between checkpoints", ylabel="effective training time")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.legend(frameon=False, labelcolor=GREY)
