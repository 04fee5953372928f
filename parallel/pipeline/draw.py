"""Pictures of timelines: one row per pp rank, one panel per timeline. Importing this module needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from matplotlib.text import Annotation
from PIL import Image

from parallel.errors import DataError
from parallel.pipeline.timeline import Bar, Timeline

# Per kind, its name and its colour for the first and for the last chunk. The hues (blue, red, orange, green) are those that
# colour-blind people tell apart; each kind has a range of lightness of its own, so they stay apart in grey too.
STYLES = {
    "F": ("forward", "#24517f", "#4f82b5"),
    "B": ("backward", "#cf6a37", "#e38a5a"),
    "I": ("input gradient", "#eda03f", "#f4b867"),
    "W": ("weight gradient", "#b9dda6", "#d0e9c1"),
    "wait": ("waiting", "#ececec", "#ececec"),
}
INK, GREY, IDLE = "#222222", "#666666", "#f8f8f8"

WIDTH, LEFT, RIGHT = 10.0, 0.62, 0.52  # inches: of the picture, of the ranks' names, of their peaks
ABOVE, BELOW = 0.38, 0.72  # inches: of each panel's title, of the axis and the legend
ROW, LEAST_ROW, TALLEST_PANEL = 0.30, 0.11, 9.0  # inches
LABEL = 0.15  # inches that a rank's name needs
LARGEST_FONT, SMALLEST_FONT = 8.0, 5.0  # points, of the numbers inside the bars
POINTS = 72  # an inch
PNG_DPI, PALETTE = 150, 64

RC = {"svg.fonttype": "none", "svg.hashsalt": "timeline", "font.family": "DejaVu Sans"}  # the same file every time


def save_picture(timelines: Sequence[Timeline], path: Path) -> None:
    """Draw timelines below each other on one time axis, as PNG, SVG or PDF, by the name of the file.

    Raises DataError where the file cannot be written.
    """
    row_heights = [max(LEAST_ROW, min(ROW, TALLEST_PANEL / len(timeline.rows))) for timeline in timelines]
    heights = [row * len(timeline.rows) for row, timeline in zip(row_heights, timelines, strict=True)]
    total = top = sum(heights) + ABOVE * len(heights) + BELOW
    longest = max(timeline.makespan for timeline in timelines)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, total))
        for timeline, row, height in zip(timelines, row_heights, heights, strict=True):
            top -= ABOVE + height
            axes = figure.add_axes((LEFT / WIDTH, top / total, (WIDTH - LEFT - RIGHT) / WIDTH, height / total))
            axes.tick_params(length=0, labelsize=8, labelcolor=GREY, labelbottom=timeline is timelines[-1])
            _Panel(axes, timeline, longest, row).draw()
        _draw_legend(figure, timelines)
        try:
            _write_file(figure, path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot write the picture: {error}") from error


def _write_file(figure: Figure, path: Path) -> None:
    if path.suffix != ".png":
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        return
    figure.set_dpi(PNG_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A palette makes the file a quarter of its size.
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(PALETTE).save(path, optimize=True)


def colour(kind: str, chunk: int, chunks: int) -> tuple[float, ...]:
    """The colour of a kind's bars, lighter from the first chunk to the last; red, green, blue in 0 to 1."""
    _, first, last = STYLES[kind]
    share = chunk / (chunks - 1) if chunks > 1 else 0.0
    return tuple((1 - share) * a + share * b for a, b in zip(to_rgb(first), to_rgb(last), strict=True))


@dataclass
class _Panel:
    """One timeline on an axis of `longest`, with rows of `row_inches`."""

    axes: Axes
    timeline: Timeline
    longest: float
    row_inches: float

    def draw(self) -> None:
        axes, timeline = self.axes, self.timeline
        num_rows, peaks = len(timeline.rows), timeline.peaks
        axes.set(xlim=(0, self.longest), ylim=(num_rows, 0))
        axes.spines[:].set_visible(False)
        named = range(0, num_rows, math.ceil(LABEL / self.row_inches))
        axes.set_yticks([rank + 0.5 for rank in named], [f"rank {rank}" for rank in named])
        for rank in named:
            self._write(f"{peaks[rank]:.3g}", (1, rank + 0.5), (6, 0), ("axes fraction", "data"), va="center", fontsize=8)
        for rank, row in enumerate(timeline.rows):
            self._draw_bars(rank, row)
            self._number_bars(rank, row)
        self._draw_title()

    def _draw_bars(self, rank: int, row: list[Bar]) -> None:
        band = rank + 0.04, 0.92
        self.axes.broken_barh([(0, self.timeline.makespan)], band, facecolor=IDLE)
        self.axes.broken_barh(
            [(bar.start, bar.end - bar.start) for bar in row],
            band,
            facecolors=[colour(bar.kind, bar.chunk, self.timeline.chunks) for bar in row],
            edgecolor="white",
            linewidth=min(0.6, 0.08 * self._points(self.timeline.makespan / len(row))),
        )

    def _number_bars(self, rank: int, row: list[Bar]) -> None:
        """Each action's micro-batch inside its bar, where there is room to read it."""
        for bar in row:
            text = str(bar.micro_batch)
            room = (self._points(bar.end - bar.start) - 1) / (0.64 * len(text))
            size = min(LARGEST_FONT, 0.6 * self.row_inches * POINTS, room)
            if bar.kind == "wait" or size < SMALLEST_FONT:
                continue
            red, green, blue = colour(bar.kind, bar.chunk, self.timeline.chunks)
            ink = INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            self.axes.text((bar.start + bar.end) / 2, rank + 0.52, text, size=size, color=ink, ha="center", va="center")

    def _points(self, seconds: float) -> float:
        return seconds / self.longest * (WIDTH - LEFT - RIGHT) * POINTS

    def _draw_title(self) -> None:
        """Above the panel: name and sizes at the left, figures at the right, in columns that panels share."""
        timeline = self.timeline
        name = self._write(timeline.name, (0, 1), (0, 6), color=INK, weight="bold")
        self._write(timeline.sizes, (1, 1), (8, 6), (name, "axes fraction"))
        self._write(f"time {timeline.time}", (1, 1), (-200, 6), ha="right")
        self._write(f"bubble {timeline.bubble:.1%}", (1, 1), (-100, 6), ha="right")
        self._write("peak activations", (1, 1), (0, 6), ha="right")
        self._write(f"{max(timeline.peaks):.3g}", (1, 1), (6, 6), color=INK, weight="bold")

    def _write(
        self, text: str, place: tuple[float, float], points: tuple[float, float], coordinates: Any = "axes fraction", **style
    ) -> Annotation:
        """Text at a distance of some points from a place."""
        style = {"fontsize": 9, "color": GREY} | style
        return self.axes.annotate(text, place, points, xycoords=coordinates, textcoords="offset points", **style)


def _draw_legend(figure: Figure, timelines: Sequence[Timeline]) -> None:
    """Below the last panel: what the axis is, and the colours."""
    used = {(bar.kind, min(bar.chunk, 1)) for timeline in timelines for row in timeline.rows for bar in row}
    shades = {kind: [colour(kind, shade, 2) for shade in (0, 1) if (kind, shade) in used] for kind in STYLES}
    handles = {STYLES[kind][0]: tuple(Patch(facecolor=c) for c in colours) for kind, colours in shades.items() if colours}
    inches = figure.get_figheight()
    figure.legend(
        handles.values(), handles.keys(), handler_map={tuple: HandlerTuple(ndivide=None, pad=0)}, loc="lower left",
        bbox_to_anchor=(LEFT / WIDTH, 0.04 / inches), ncols=len(handles), fontsize=8, frameon=False, labelcolor=GREY,
        borderaxespad=0, borderpad=0.3, handlelength=1.6, columnspacing=1.6,
    )  # fmt: skip
    figure.text(LEFT / WIDTH, 0.34 / inches, timelines[0].time_label, fontsize=8, color=GREY)
