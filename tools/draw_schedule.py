"""Draws pipeline schedules: which rank works on which micro-batch when.

    python tools/draw_schedule.py 1f1b --pp 4 --micro-batches 8
    python tools/draw_schedule.py zb-v --pp 4 --micro-batches 8 --costs F=1,I=1.2,W=0.8,send=0.1 --output zb-v.png
    python tools/draw_schedule.py --compare --pp 4 --micro-batches 8 --output schedules.svg
    python tools/draw_schedule.py --trace runs/llama/traces/step_2.json --output step.png

The first three are predictions; a trace (log.trace_steps) is what a run has measured. Without --output the picture is text:
F forward, B backward, I and W its halves (gradients of inputs, of weights), small letters for odd chunks; pipe long lines
into less -S. Bubble: the share of all ranks' time in which nothing runs. Peak activations: the most micro-batches whose
activations (of all layers of a rank) are kept at once.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

try:
    from megatron_llama.tool_frame import positive_integer, run_tool
    from parallel.errors import ConfigError
    from parallel.pipeline.costs import Costs
    from parallel.pipeline.schedules import SCHEDULES
    from parallel.pipeline.timeline import compare, predict, read_trace, text_lines
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

COSTS = {"F": "forward", "B": "backward", "I": "input_backward", "W": "weight_backward", "send": "send"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedule", nargs="?", choices=tuple(SCHEDULES), metavar="SCHEDULE", help=", ".join(SCHEDULES))
    parser.add_argument("--compare", action="store_true", help="draw all schedules that fit the sizes, the fastest first")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="draw a step of a run, the first rank of each stage")
    parser.add_argument("--pp", type=positive_integer, default=4, metavar="N", help="pipeline ranks (default: 4)")
    parser.add_argument("--chunks", type=positive_integer, metavar="N", help="per rank (the fewest; --compare: 1 or 2)")
    parser.add_argument("--micro-batches", type=positive_integer, default=8, metavar="N", help="(default: 8)")
    parser.add_argument(
        "--costs", type=costs, default=Costs(), metavar="F=1,I=1,W=1,send=0",
        help="time of one micro-batch in all layers of a rank, and of a message; B is I + W unless it is given",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw into this file: .png, .svg or .pdf")
    arguments = parser.parse_args()
    if sum(map(bool, (arguments.schedule, arguments.compare, arguments.trace))) != 1:
        parser.error("give the name of a schedule, or --compare, or --trace")
    return arguments


def costs(text: str) -> Costs:
    """F=1,I=1.5,send=0.1 as Costs. Only a message may take no time."""
    given = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        value = float(number)
        if name not in COSTS or not 0 <= value < math.inf or (value == 0 and name != "send"):
            raise ValueError(part)
        given[COSTS[name]] = value
    values = replace(Costs(), **given)
    return values if "backward" in given else replace(values, backward=values.input_backward + values.weight_backward)


def main() -> None:
    arguments = parse_arguments()
    sizes = arguments.micro_batches, arguments.costs
    if arguments.trace:
        timelines = [read_trace(arguments.trace)]
    elif arguments.compare:
        timelines = compare(arguments.pp, arguments.chunks or 2, *sizes)
    else:
        kind = SCHEDULES[arguments.schedule]
        timelines = [predict(kind, arguments.pp, arguments.chunks or kind.min_chunks, *sizes)]
    if arguments.output:
        save(timelines, arguments.output)
    else:
        width = shutil.get_terminal_size().columns
        print("\n\n".join("\n".join(text_lines(timeline, width)) for timeline in timelines))
    if arguments.compare:
        others = set(SCHEDULES) - {timeline.name for timeline in timelines}
        print(f"\nnot for these sizes: {', '.join(sorted(others)) or 'none'}")


def save(timelines: list, path: Path) -> None:
    try:
        from parallel.pipeline.draw import save_picture
    except ImportError as error:
        raise ConfigError(f"--output needs {error.name}: pip install matplotlib; without --output, text is printed") from error
    save_picture(timelines, path)
    for timeline in timelines:
        print(f"{timeline.name:<12} {timeline.sizes}; {timeline.figures}")
    print(f"picture      {path}")


if __name__ == "__main__":
    run_tool(main)
