"""The planner's predictions beside published measurements.

    python tools/evaluate_planner.py
    python tools/evaluate_planner.py --rows FILE.json --json
    python tools/evaluate_planner.py --hold-out            (fits again without each source in turn: minutes)

A row is one published run, in the format of megatron_llama/plan/published_runs.json, whose meta.fields explains every field.
All predictions use one set of efficiencies per GPU, frozen in megatron_llama/plan/hardware. Errors are those of tokens per
second and GPU, predicted over measured less one:

median, p90   of the size of the errors of a source's 16-bit rows whose layout is known
bias          the median with its sign
one run       the median after one of the source's rows has set a factor for the others (over all choices of that row)
no traits     the median where every row is taken for the same, partly fused software
core          the headline set: rows of tier "core"
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

try:
    from megatron_llama.plan import evaluation, rows
    from megatron_llama.plan.evaluation import Predicted, summary
    from megatron_llama.tool_frame import run_tool
    from parallel.errors import DataError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=rows.PUBLISHED, metavar="FILE", help="(default: those of the project)")
    parser.add_argument("--json", action="store_true", help="print every row and all figures as JSON")
    parser.add_argument("--hold-out", action="store_true", help="predict each source with efficiencies fitted to the others")
    parser.add_argument("--fit", action="store_true", help="fit the efficiencies to the rows and print them as TOML")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    all_rows = list(readable(rows.read_rows(arguments.rows)))
    known = [row for row in all_rows if rows.usable(row)]
    sixteen_bit = [row for row in known if row["precision"] == "bf16"]
    if arguments.fit:
        print("\n".join(efficiency_lines(known, sixteen_bit)))
        return
    predicted = [evaluation.predict_row(row) for row in all_rows]
    held_out = evaluation.held_out(sixteen_bit, progress) if arguments.hold_out else []
    if arguments.json:
        print(json.dumps(figures(predicted, held_out), indent=1))
    else:
        print("\n".join(report_lines(predicted, held_out)))


def readable(all_rows: Sequence[rows.Row]) -> Iterator[rows.Row]:
    """The rows that say all that a prediction needs; of the others stderr has a line each."""
    for row in all_rows:
        try:
            rows.job_of(row)
            yield row
        except DataError as error:
            print(f"left out: {error}", file=sys.stderr)


def progress(source: str) -> None:
    print(f"without {source} ...", file=sys.stderr)


def report_lines(predicted: Sequence[Predicted], held_out: Sequence[Predicted]) -> Iterator[str]:
    """All tables."""
    sixteen_bit = [one for one in predicted if rows.usable(one.row) and one.row["precision"] == "bf16"]
    without = {id(one.row): evaluation.predict_row(one.row, traits=False) for one in sixteen_bit}
    yield from source_lines("16-bit rows", sixteen_bit, without)
    if held_out:
        yield ""
        yield from source_lines("each source held out", held_out, {})
    others = [one for one in predicted if rows.usable(one.row) and one.row["precision"] != "bf16"]
    if others:
        yield ""
        yield from source_lines("float8 rows", others, {})
    yield ""
    yield from choice_lines(sixteen_bit)
    yield ""
    yield from memory_lines([one.row for one in predicted])


def source_lines(title: str, predicted: Sequence[Predicted], without: dict[int, Predicted]) -> Iterator[str]:
    """A table of errors: one line per source, and the headline."""
    last = f"{'no traits':>11}" if without else ""
    yield f"{title:<22}{'rows':>5}{'median':>9}{'p90':>8}{'bias':>8}{'one run':>9}{last}"
    groups = {
        **evaluation.by_source(predicted),
        "all": predicted,
        "core": [one for one in predicted if rows.core(one.row)],
    }
    for name, group in groups.items():
        found = summary(one.error for one in group)
        if found is None:
            continue
        once = evaluation.one_run_median(group)
        neutral = summary(without[id(one.row)].error for one in group).median if without else None
        yield (
            f"{name:<22}{found.rows:>5}{found.median:>9.1%}{found.p90:>8.1%}{found.bias:>+8.1%}"
            f"{'' if once is None else f'{once:.1%}':>9}{'' if neutral is None else f'{neutral:.1%}':>11}"
        )


def choice_lines(predicted: Sequence[Predicted]) -> Iterator[str]:
    """What is lost by taking the predicted best of each sweep."""
    regrets = evaluation.layout_regrets(predicted)
    if not regrets:
        yield "no sweeps over layouts"
        return
    values = sorted(regrets.values())
    yield f"{'layout chosen in sweeps':<80}{'lost':>8}"
    for name, regret in regrets.items():
        yield f"{name:<80}{regret:>8.1%}"
    yield f"{f'median of {len(values)} sweeps':<80}{values[len(values) // 2]:>8.1%}"


def memory_lines(measured: Sequence[rows.Row]) -> Iterator[str]:
    """Errors of memory by source and by what is reported."""
    yield f"{'memory':<22}{'rows':>5}{'median':>9}{'p90':>8}{'bias':>8}"
    for (source, field), errors in evaluation.memory_errors(measured).items():
        found = summary(errors)
        what = "allocated" if field == evaluation.ALLOCATED else "as the allocator or the driver says"
        yield f"{source:<22}{found.rows:>5}{found.median:>9.1%}{found.p90:>8.1%}{found.bias:>+8.1%}  {what}"


def efficiency_lines(known: Sequence[rows.Row], sixteen_bit: Sequence[rows.Row]) -> Iterator[str]:
    """The [efficiency] tables of the hardware profiles."""
    float8 = evaluation.fitted([row for row in known if row["precision"] != "bf16"], float8=True)
    for gpu, efficiency in evaluation.fitted(sixteen_bit).items():
        yield f"# {gpu}.toml"
        yield "[efficiency]"
        values = asdict(efficiency)
        if gpu in float8:
            values["float8"] = float8[gpu].float8
        yield from (f"{name} = {value:.3g}" for name, value in values.items())
        yield ""


def figures(predicted: Sequence[Predicted], held_out: Sequence[Predicted]) -> dict:
    """Everything by name, errors as shares."""
    sixteen_bit = [one for one in predicted if rows.usable(one.row) and one.row["precision"] == "bf16"]
    core = [one for one in sixteen_bit if rows.core(one.row)]
    without = [evaluation.predict_row(one.row, traits=False) for one in core]
    return {
        "sources": {
            name: asdict(summary(one.error for one in group)) for name, group in evaluation.by_source(sixteen_bit).items()
        },
        "core": summarised([one.error for one in core]),
        "core_without_traits": summarised([one.error for one in without]),
        "core_held_out": summarised([one.error for one in held_out if rows.core(one.row)]),
        "one_run_median": {name: evaluation.one_run_median(group) for name, group in evaluation.by_source(sixteen_bit).items()},
        "layout_regret": evaluation.layout_regrets(sixteen_bit),
        "memory": {f"{source} {field}": summarised(e) for (source, field), e in memory(predicted).items()},
        "rows": [
            {
                "id": one.row["id"],
                "group": one.row["group"],
                "tier": one.row["tier"],
                "measured_tokens_per_second_per_gpu": one.row["tok_s_gpu"],
                "tokens_per_second_per_gpu": one.tokens_per_second_per_gpu,
                "error": one.error,
            }
            for one in predicted
        ],
    }


def memory(predicted: Sequence[Predicted]) -> dict[tuple[str, str], list[float]]:
    return evaluation.memory_errors([one.row for one in predicted])


def summarised(errors: Sequence[float]) -> dict | None:
    found = summary(errors)
    return found and asdict(found)


if __name__ == "__main__":
    run_tool(main)
