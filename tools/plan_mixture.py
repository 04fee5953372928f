"""Plans a mixture: for a budget of tokens, how much and how often a run reads each source.

    python tools/plan_mixture.py examples/configs/mixtures/llama-1.toml --tokens 1.4T --picture mixture.png

FILE.toml lists sources ([[sources]], as that file does), or is the configuration of a run, whose data.train is planned.
Sizes come from the file or from the datasets.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

try:
    from megatron_llama.data.mixture import format_tokens, table_lines
    from megatron_llama.data.mixture_plan import plan_mixture, read_plan, save_picture, simulate
    from megatron_llama.tool_frame import positive_integer, run_tool
    from parallel.errors import ConfigError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

UNITS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="the sources, or a run's configuration")
    parser.add_argument("--tokens", type=tokens, required=True, help="that the run reads, for example 1.4T or 300B")
    parser.add_argument("--sequence-length", type=positive_integer, default=2048, metavar="N")
    parser.add_argument("--batch-size", type=positive_integer, default=2048, metavar="N", help="sequences, for the simulation")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="leave this source out; may be repeated")
    parser.add_argument("--on-cap", choices=("error", "redistribute"), default="error", help="where max_epochs is exceeded")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw tokens and epochs of each source")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args()


def tokens(text: str) -> int:
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    count = float(number) * unit
    if not 1 <= count < math.inf:
        raise ValueError(text)
    return round(count)


def main() -> int:
    """Returns the exit code: 2 where a source exceeds its max_epochs."""
    arguments = parse_arguments()
    sources = read_plan(arguments.file)
    for name in arguments.without:
        if name not in [source.name for source in sources]:
            raise ConfigError(f"--without {name}: the sources are {', '.join(source.name for source in sources)}")
    sources = [source for source in sources if source.name not in arguments.without]
    if not sources:
        raise ConfigError("--without leaves no source")
    rows, integers = plan_mixture(sources, arguments.tokens, arguments.sequence_length, arguments.on_cap)
    simulation = simulate(integers, arguments.batch_size)
    if arguments.picture:
        save_picture(rows, arguments.picture)
    if arguments.json:
        plan = [{**asdict(row), "epochs": row.epochs, "exceeds": row.exceeds} for row in rows]
        print(json.dumps({"rows": plan, "weights": integers, "simulation": asdict(simulation)}, indent=2))
    else:
        if arguments.on_cap == "redistribute":
            asked, _ = plan_mixture(sources, arguments.tokens, arguments.sequence_length)
            if any(row.exceeds for row in asked):
                print("\n".join(["as configured:", *table_lines(asked), "", "redistributed:"]))
        print("\n".join(table_lines(rows)))
        total, deviation = format_tokens(sum(row.tokens for row in rows)), max(simulation.deviation)
        print(f"\n{total} tokens; the order of the sources repeats after {simulation.period:,} samples")
        print(f"every prefix is in proportion to within {deviation:.2f} samples; in a batch of {arguments.batch_size}:")
        for row, (fewest, most) in zip(rows, simulation.per_batch, strict=True):
            print(f"  {row.name}: {fewest if fewest == most else f'{fewest} to {most}'}")
        if arguments.picture:
            print(f"\npicture    {arguments.picture}")
    return 2 if any(row.exceeds for row in rows) else 0


if __name__ == "__main__":
    run_tool(main)
