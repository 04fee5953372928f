"""Where the wall time of a run went, and how often to save.

    python tools/goodput.py runs/7b
    python tools/goodput.py runs/7b --project-gpus 1024 4096 16384 --output goodput.png
    python tools/goodput.py runs/7b --failures-per-gpu-day 0.0005 --restart-seconds 120      (what if?)

Reads metrics.jsonl, discarded.jsonl, supervisor.jsonl and rank 0's log of a run that is done, dead or under way. The best
interval between checkpoints follows from the rate of failures, the time a checkpoint holds training up, and the time from a
failure until training goes on: as measured, or as given. A projection assumes that both times stay what they are. Where
nothing has failed yet, the rate is that of Llama 3's training: 419 unexpected interruptions in 54 days on 16,384 GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

try:
    from megatron_llama.checkpoint_interval import LLAMA_3_FAILURES_PER_GPU_DAY, SECONDS_PER_DAY, Projection, Rates, project
    from megatron_llama.goodput import PARTS, Account, account, read_events, read_records, world_size
    from megatron_llama.tool_frame import positive_integer, positive_number, run_tool
    from parallel.errors import ConfigError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIRECTORY")
    parser.add_argument("--supervisor-log", type=Path, metavar="FILE", help="(default: supervisor.jsonl of the run, if any)")
    parser.add_argument("--failures-per-gpu-day", type=positive_number, metavar="X", help="(default: as measured)")
    parser.add_argument("--checkpoint-seconds", type=positive_number, metavar="X", help="of a save (default: as measured)")
    parser.add_argument("--restart-seconds", type=positive_number, metavar="X", help="per failure (default: as measured)")
    parser.add_argument("--gpus", type=positive_integer, metavar="N", help="of the run (default: as rank 0's log says)")
    parser.add_argument("--project-gpus", type=positive_integer, nargs="+", default=[], metavar="N", help="other sizes")
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw into this file: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON, all times in seconds")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    records = read_records(arguments.run)
    own_log = arguments.run / "supervisor.jsonl"
    supervisor_log = arguments.supervisor_log or (own_log if own_log.exists() else None)
    found = account(records, read_events(supervisor_log) if supervisor_log else [])
    rates = rates_of(found, arguments)
    sizes = sorted({rates.gpus, *arguments.project_gpus}) if rates else []
    projections = [project(rates, gpus, found.present_interval) for gpus in sizes]
    if arguments.json:
        print(json.dumps(values(found, rates, projections), indent=2))
    else:
        print("\n".join(account_lines(found)))
        print("\n".join(interval_lines(found, rates, projections)))
    if arguments.output:
        save(arguments.output, records, found, rates, projections)
        if not arguments.json:
            print(f"\npicture {arguments.output}")


def rates_of(found: Account, arguments: argparse.Namespace) -> Rates | None:
    """What is measured, or given in its place; None where something is neither, and nobody has asked for a projection."""
    gpus = arguments.gpus or world_size(arguments.run)
    checkpoint_seconds = arguments.checkpoint_seconds or found.checkpoint_seconds
    if not gpus or not checkpoint_seconds:
        if arguments.project_gpus:
            flag = "--checkpoint-seconds, as it has not saved yet" if gpus else "--gpus, as rank 0's log does not say"
            raise ConfigError(f"{arguments.run} does not show what --project-gpus needs: give {flag}")
        return None
    gpu_days = gpus * found.running_seconds / SECONDS_PER_DAY
    if arguments.failures_per_gpu_day:
        rate, source = arguments.failures_per_gpu_day, "given"
    elif found.failures and gpu_days:
        days = f"{gpu_days:,.0f}" if gpu_days >= 100 else f"{gpu_days:.3g}"
        rate, source = found.failures / gpu_days, f"measured: {found.failures} in {days} GPU-days"
    else:
        rate, source = LLAMA_3_FAILURES_PER_GPU_DAY, "Llama 3's, as nothing has failed yet"
    return Rates(gpus, rate, source, checkpoint_seconds, arguments.restart_seconds or found.restart_seconds or 0.0)


def account_lines(found: Account) -> Iterator[str]:
    """The table of where the time went."""
    yield f"{'':<26}{'time':>10}{'share':>8}"
    for part, name in PARTS.items():
        if found.seconds[part]:
            share = found.seconds[part] / found.wall_seconds
            yield f"{name:<26}{clock(found.seconds[part]):>10}{share:>8.1%}"
    yield f"{'wall time':<26}{clock(found.wall_seconds):>10}{1:>8.1%}"
    yield ""
    running = f" ({found.running_share:.1%} of the time it was running)" if found.seconds["idle"] else ""
    yield f"effective training time {found.effective_share:.1%}{running}: {found.steps:,} steps, {found.steps_redone:,} lost"
    each = f", {clock(found.restart_seconds)} each until training had started again" if found.restart_seconds else ""
    yield f"failures {found.failures}{each}"


def interval_lines(found: Account, rates: Rates | None, projections: list[Projection]) -> Iterator[str]:
    """How often to save, and what would be left of the time."""
    if rates is None:
        yield "no advice on the interval between checkpoints: give --gpus and --checkpoint-seconds"
        return
    yield f"failures per GPU and day {rates.failures_per_gpu_day:.3g} ({rates.source})"
    seconds = rates.restart_seconds
    restart = f"a failure for {clock(seconds)}" if seconds else "restarts are not counted, as none was seen"
    yield f"a checkpoint holds training up for {clock(rates.checkpoint_seconds)}, {restart}"
    yield ""
    yield f"{'GPUs':>8}{'a failure every':>17}{'best: save every':>18}{'steps':>9}{'effective':>11}{'at present':>12}"
    for one in projections:
        steps = max(1, round(one.interval / found.step_seconds))
        present = f"{one.present_share:.1%}" if one.present_share is not None else ""
        times = f"{clock(one.mean_time_between_failures):>17}{clock(one.interval):>18}"
        yield f"{one.gpus:>8,}{times}{steps:>9,}{one.share:>11.1%}{present:>12}"
    if found.save_every:
        yield f"at present: checkpoints every {found.save_every:,} steps"


def clock(seconds: float) -> str:
    """Seconds in the unit that reads best: 0.25 s, 12.0 s, 3.5 min, 2.1 h, 17 days."""
    for unit, size in (("days", SECONDS_PER_DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.3g} s"


def values(found: Account, rates: Rates | None, projections: list[Projection]) -> dict:
    """All figures by name."""
    shares = {name: getattr(found, name) for name in ("wall_seconds", "effective_share", "running_share")}
    return {**shares, **asdict(found), "rates": rates and asdict(rates), "projections": [asdict(one) for one in projections]}


def save(path: Path, *what: object) -> None:
    try:
        from _goodput_picture import save_picture
    except ImportError as error:
        raise ConfigError(f"--output needs {error.name}: pip install matplotlib; without --output, text is printed") from error
    save_picture(path, *what)


if __name__ == "__main__":
    run_tool(main)
