"""A plan's picture: memory of each pipeline rank, where a step goes, throughput against the number of GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_llama.plan.configured import Prediction
from megatron_llama.plan.memory import Memory, gib
from parallel.errors import DataError

# The hues are those that colour-blind people tell apart; lightness tells them apart in grey.
MEMORY_COLOURS = {
    "weights": "#24517f",
    "gradients": "#4f86b8",
    "optimizer": "#a5c8e4",
    "activations": "#cf6a37",
    "workspace": "#eda03f",
    "buffers": "#7fb069",
    "framework": "#d9d9d9",
}
TIME_COLOURS = {
    "linear": "#24517f",
    "attention": "#4f86b8",
    "elementwise": "#a5c8e4",
    "head": "#7d6aa8",
    "recompute": "#7fb069",
    "optimizer": "#b9dda6",
    "tensor": "#cf6a37",
    "context": "#b5502a",
    "pipeline": "#e38a5a",
    "data": "#eda03f",
    "bubble": "#d9d9d9",
    "jitter": "#bdbdbd",
}
GREY = "#666666"
SIZE = (10.0, 9.5)  # inches
RC = {"svg.fonttype": "none", "svg.hashsalt": "plan", "font.family": "DejaVu Sans", "font.size": 9}


def save_picture(
    path: Path, title: str, best: Prediction, layouts: Mapping[str, Prediction], sizes: Mapping[int, float]
) -> None:
    """Draw into a PNG, SVG or PDF file. Raises DataError.

    `layouts`: the best ones by name, for the bars of a step; `sizes`: number of GPUs -> predicted tokens per second and GPU.
    """
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=SIZE, layout="constrained")
        memory, time, scaling = figure.subplots(3, gridspec_kw={"height_ratios": (3, 3, 2.4)})
        figure.suptitle(title, fontsize=10)
        for axes in (memory, time, scaling):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=GREY)
        _draw_memory(memory, best)
        _draw_time(time, layouts)
        _draw_scaling(scaling, sizes, best)
        try:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot write the picture: {error}") from error


def _draw_memory(axes: Axes, best: Prediction) -> None:
    """Stacked bars of each pipeline rank, and the GPU's capacity."""
    ranks, bottom = range(len(best.memory)), [0.0] * len(best.memory)
    for name in (item.name for item in fields(Memory)):
        heights = [gib(getattr(memory, name)) for memory in best.memory]
        axes.bar(ranks, heights, bottom=bottom, color=MEMORY_COLOURS[name], label=name, width=0.8 if len(ranks) > 2 else 0.3)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    capacity = gib(best.job.cluster.hardware.memory_bytes)
    axes.axhline(capacity, color="black", linewidth=1, linestyle="--")
    axes.text(len(ranks) - 0.5, capacity, f"{capacity:.0f} GiB of the GPU", ha="right", va="bottom", color=GREY)
    axes.set_ylim(0, 1.15 * max(capacity, *bottom))
    axes.set_xlim(-0.6, len(ranks) - 0.4)
    axes.set_xticks([rank for rank in ranks if len(ranks) <= 16 or rank % 4 == 0])
    axes.set_xlabel("pipeline rank", color=GREY)
    axes.set_ylabel("GiB", color=GREY)
    axes.set_title("memory of the first layout", loc="left", fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _draw_time(axes: Axes, layouts: Mapping[str, Prediction]) -> None:
    """Where a step goes in each of the best layouts, the fastest at the top."""
    places = list(range(len(layouts)))[::-1]
    left = [0.0] * len(layouts)
    for name in TIME_COLOURS:
        widths = [getattr(one.time, name) * one.calibration for one in layouts.values()]
        if max(widths) > 0.002 * max(one.step_seconds for one in layouts.values()):
            axes.barh(places, widths, left=left, color=TIME_COLOURS[name], label=name, height=0.7)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, list(layouts), fontsize=8)
    axes.set_xlabel("seconds of a step", color=GREY)
    axes.set_title("where a step goes", loc="left", fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _draw_scaling(axes: Axes, sizes: Mapping[int, float], best: Prediction) -> None:
    """Tokens per second and GPU of the best layout for each number of GPUs, with the same batch."""
    counts, own = sorted(sizes), best.job.cluster.gpus
    axes.plot(counts, [sizes[count] for count in counts], color="#24517f", marker="o", markersize=4)
    axes.plot([own], [best.tokens_per_second_per_gpu], color="#cf6a37", marker="o", markersize=7)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * max(sizes.values()))
    axes.set_xlabel("GPUs, the batch staying the same", color=GREY)
    axes.set_ylabel("tokens/s/GPU", color=GREY)
    axes.set_title("the best layout for each number of GPUs", loc="left", fontsize=9)
