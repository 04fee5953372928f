"""Pipeline schedules executed against predicted, and beside torch.distributed.pipelining.

    python tools/benchmark_pipeline.py
    python tools/benchmark_pipeline.py --schedules 1f1b zb-v --micro-batches 8 --json figures.json

One process per pp rank, gloo. A stage sleeps 20 ms for each F, I and W (B is I + W), whatever the chunks: a rank with two
chunks has twice the work, so compare a schedule with its own prediction. A message between ranks takes 5 ms. Contestants take
turns, in another order each round.

predicted    the cost model with these times and one overhead for all actions of the run: how much later an action starts than
             the end of the one before and the arrival of its message allow (mean of a step's actions, median of the steps)
executed     a step between barriers; the first is dropped, the median of the others counts
idle         the share of the time between a rank's own first and last action, all ranks together, in which it does not sleep:
             what papers call the bubble. One step alone takes longer than that says:
bubble       the share of the time between the first action of any rank and the last one of any
peak         the most activations, of chunks, that a rank keeps from F to B or W, counted by references
in a row     time per step without barriers; predicted from the lists repeated
blocking     the same list, but a rank goes on only when what it sent has arrived; divided by the prediction above

The exit code is 1 where a rank's order is not exactly that of its list, or a peak is above the prediction. Where other
programs use the machine, run it as root under `chrt --fifo 10`: sleepers then wake in time, and take nothing from anybody.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import median

try:
    import _pipeline_figures as figures
    import torch
    import torch.distributed as dist
    from _pipeline_figures import Case, Measurement, Row, Setting, Step
    from _pipeline_stages import TORCH_SCHEDULES, Blocking, Contestant, Ours, Torch
    from torch.multiprocessing.spawn import start_processes

    from megatron_llama.tool_frame import run_tool
    from parallel.groups import build_groups
    from parallel.pipeline.layout import Placement
    from parallel.pipeline.schedules import SCHEDULES
    from parallel.topology import Topology
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

BOUND = 0.05  # of executed beyond predicted
OVERHEAD_BOUND_SECONDS = 5e-4
TIMEOUT = timedelta(minutes=2)
PEERS = {  # ours -> torch's nearest; we have no InterleavedZeroBubble: zb-v is ours of two chunks with a split backward pass
    "interleaved": ["Interleaved1F1B"],
    "zb-v": ["ZBVZeroBubble", "InterleavedZeroBubble"],
    "dualpipe-v": ["DualPipeV"],
}


def build_contestants(case: Case, setting: Setting, rank: int) -> dict[str, Contestant]:
    groups = build_groups(Topology(pp=case.pp), rank, timeout=TIMEOUT, both_ways=True)
    sizes = case.micro_batches, setting.sleep_seconds, setting.link_seconds
    actions, placement = case.schedule[rank], case.placement
    contestants: dict[str, Contestant] = {"ours": Ours(groups, actions, placement, *sizes)}
    if case.predict_blocking(setting.costs(blocking_sends=True)) is not None:
        contestants["blocking"] = Blocking(groups, actions, placement, *sizes)
    for name in PEERS.get(case.name, []):
        contestants[name] = Torch(name, rank, Placement(case.pp, placement.chunks, TORCH_SCHEDULES[name][1]), *sizes)
    return contestants


def rank_main(rank: int, case: Case, setting: Setting, folder: str) -> None:
    """One rank's process, forked."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=case.pp, timeout=TIMEOUT)
    contestants = build_contestants(case, setting, rank)
    names, steps = list(contestants), range(1 + setting.steps)
    isolated: dict[str, list] = {name: [] for name in names}
    for number in steps:
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            dist.barrier()
            isolated[name].append(contestants[name].measured_step())
    dist.barrier()
    in_a_row = [contestants["ours"].measured_step() for _ in steps]
    Path(folder, f"rank-{rank}").write_bytes(pickle.dumps((isolated, in_a_row)))
    dist.barrier()


def measure(case: Case, setting: Setting) -> Measurement:
    """Run all contestants on processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(rank_main, (case, setting, folder), nprocs=case.pp, start_method="fork")
        ranks = [pickle.loads(Path(folder, f"rank-{rank}").read_bytes()) for rank in range(case.pp)]
    isolated, in_a_row = zip(*ranks, strict=True)
    return Measurement({name: _steps([of_rank[name] for of_rank in isolated]) for name in isolated[0]}, _steps(in_a_row))


def _steps(of_ranks: Sequence[list]) -> list[Step]:
    return [Step([works for works, _ in step], [peak for _, peak in step]) for step in zip(*of_ranks, strict=True)]


def check(case: Case, setting: Setting, measurement: Measurement, plant_error: bool) -> None:
    """End the program where a step is not what its list and its prediction say."""
    schedule = case.schedule
    if plant_error:
        schedule[0][-2:] = reversed(schedule[0][-2:])
    for name, steps in {**measurement.isolated, "in a row": measurement.in_a_row}.items():
        if name in TORCH_SCHEDULES:
            figures.check_complete(case, name, steps)
        else:
            figures.check_order(case, schedule, steps)
            figures.check_peaks(case, case.predict(setting.costs()).peak_memory, steps)


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        first, *others = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))


def cells_of(row: Row) -> list[str]:
    blocking = "deadlock"
    if row.blocking_predicted_over_predicted is not None:
        blocking = f"{row.blocking_predicted_over_predicted:.3f} / {row.blocking_executed_over_predicted:.3f}"
    return [
        row.schedule,
        str(row.chunks),
        str(row.micro_batches),
        f"{1e3 * row.predicted_seconds:.0f}",
        milliseconds(row.executed_seconds),
        f"{row.executed_over_predicted:.3f}",
        f"{100 * row.idle_predicted:.1f} / {100 * row.idle_executed:.1f}",
        f"{100 * row.bubble_predicted:.1f} / {100 * row.bubble_executed:.1f}",
        f"{row.peak_predicted:g} / {row.peak_executed}",
        f"{1e3 * row.in_a_row_predicted_seconds:.0f} / {1e3 * row.in_a_row_executed_seconds:.0f}",
        blocking,
    ]


def milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * median(seconds):.0f} ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})"


def report(rows: Sequence[Row], overhead_seconds: float) -> None:
    titles = ["schedule", "chunks", "m", "predicted, ms", "executed", "ratio"]
    pairs = ["idle, %", "bubble, %", "peak", "in a row, ms", "blocking"]
    print("\npairs: predicted / executed")
    print_table([*titles, *pairs], [cells_of(row) for row in rows])
    peers = [
        [f"torch {peer.schedule}", str(row.micro_batches), milliseconds(peer.executed_seconds), str(peer.peak_executed)]
        + [f"{peer.ours_over_this:.3f}", row.schedule]
        for row in rows
        for peer in row.torch
    ]
    if peers:
        print()
        print_table(["the same stages", "m", "executed, ms", "peak", "ours / this", "ours is"], peers)
    print("\nevery rank ran exactly its list, and no peak was above the prediction")
    for what, is_met in verdicts(rows, overhead_seconds):
        print(f"{what}: {'met' if is_met else 'missed'}")


def verdicts(rows: Sequence[Row], overhead_seconds: float) -> list[tuple[str, bool]]:
    limit = f"{1e3 * OVERHEAD_BOUND_SECONDS:g} ms"
    errors = [abs(row.executed_over_predicted - 1) for row in rows]
    found = [
        (f"overhead {1e3 * overhead_seconds:.3f} ms per action, below {limit}", overhead_seconds < OVERHEAD_BOUND_SECONDS),
        (f"executed within {BOUND:.0%} of predicted, the farthest {max(errors):.1%} off", max(errors) <= BOUND),
    ]
    slow = [row for row in rows if (row.blocking_predicted_over_predicted or 0) > 1 + BOUND]
    if slow:
        least = min(row.blocking_executed_over_predicted for row in slow)
        what = f"blocking sends beyond {BOUND:.0%} in the {len(slow)} of {len(rows)} cases where the model says so"
        found.append((f"{what}, the nearest {least - 1:.1%} off", least > 1 + BOUND))
    ratios = [peer.ours_over_this for row in rows for peer in row.torch]
    if ratios:
        found.append((f"not slower than torch's, ours / this at most {max(ratios):.3f}", max(ratios) <= 1.0))
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--schedules", nargs="+", choices=tuple(SCHEDULES), metavar="NAME",
        help=f"default: all that the sizes allow of {', '.join(SCHEDULES)}",
    )  # fmt: skip
    parser.add_argument("--pp", type=int, default=4, metavar="N", help="pipeline ranks (%(default)s)")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16], metavar="N", help="(8 and 16)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="that count (%(default)s)")
    parser.add_argument("--sleep-ms", type=float, default=20.0, metavar="MS", help="of F, I and W each (%(default)g)")
    parser.add_argument("--link-ms", type=float, default=5.0, metavar="MS", help="of a message (%(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--plant-error", action="store_true", help="expect two actions the other way round: a check must fail")
    return parser.parse_args()


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """What is asked for; raises ConfigError where a schedule that is named cannot have these sizes."""
    cases = []
    for name in arguments.schedules or SCHEDULES:
        kind = SCHEDULES[name]
        for micro_batches in arguments.micro_batches:
            if arguments.schedules:
                kind.validate(arguments.pp, kind.min_chunks, micro_batches)
            if kind.allows(arguments.pp, kind.min_chunks, micro_batches):
                cases.append(Case(name, arguments.pp, micro_batches))
    return cases


def describe(arguments: argparse.Namespace) -> dict[str, str]:
    load = " ".join(f"{load:.1f}" for load in os.getloadavg())
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": f"{os.cpu_count()} x {platform.machine()} CPU; load average {load}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "sizes": f"pp {arguments.pp}; F, I, W {arguments.sleep_ms:g} ms, link {arguments.link_ms:g}; steps {arguments.steps}",
    }
    for name, fact in facts.items():
        print(f"{name:11s}{fact}", flush=True)
    return facts


def main() -> None:
    arguments = parse_arguments()
    cases = cases_of(arguments)
    facts = describe(arguments)
    setting = Setting(arguments.sleep_ms / 1e3, arguments.link_ms / 1e3, arguments.steps)
    torch.set_num_threads(1)  # the ranks are forked
    gc.freeze()  # going through all that is imported takes as long as an action
    measurements = []
    for case in cases:
        print(f"measuring {case}", file=sys.stderr, flush=True)
        measurements.append(measure(case, setting))
        check(case, setting, measurements[-1], arguments.plant_error)
    overhead_seconds = figures.overhead_seconds([step for one in measurements for step in one.isolated["ours"][1:]])
    rows = [figures.row_of(case, setting, overhead_seconds, one) for case, one in zip(cases, measurements, strict=True)]
    report(rows, overhead_seconds)
    if arguments.json:
        content = {**facts, "overhead_seconds": overhead_seconds, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
