"""How much communication hides behind computation: training steps on two nodes joined by a slow link.

    sudo python tools/benchmark_overlap.py
    sudo python tools/benchmark_overlap.py --only tp --rounds 9 --json figures.json

The nodes are network namespaces on this machine, joined at --megabits by a token bucket (needs root and iproute2); a rank in
each, one thread, gloo over TCP, fp32. The program's own training step, in its modes in turn, in another order each round:

zero   dp 2, ZeRO stage 1: zero.overlap false | true
tp     tp 2 with sequence parallelism: parallel.tp_overlap none | backward | chunks

step        the second of two steps in a row, so that the first one's gathers are behind it; of the slower rank
computation the step with the link unlimited, of the fastest mode
exposed     the share of a step that is not computation: what communication adds
model       the exposed share that dependencies leave, by playing a step's products and messages against the link: product
            times and the link's bandwidth are measured, sizes are arithmetic
interface   bytes that a node's interface has sent, headers included, over those of the program's ledger

Each figure is a median, with the range of its rounds. The exit code is 1 where modes have different losses. The computations
need a processor core per rank: where other programs use the machine, the figures say little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

try:
    import torch
    from _measuring import Report
    from _nodes import ADDRESSES, INTERFACE, Nodes
    from _overlap_model import Linear, play, tensor_step, zero_step_seconds
    from _overlap_rank import MODES, Case

    from parallel.tensor.overlap import PIECE_BYTES, row_pieces
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

TOOLS = Path(__file__).parent
SIZES: dict[str, dict[str, int]] = {  # communication and computation of about the same length at 200 Mbit/s and 50 GFLOP/s
    "zero": dict(layers=4, hidden=512, ffn=1024, heads=8, vocabulary=512, sequence_length=512, batch=4),
    "tp": dict(layers=2, hidden=1536, ffn=4096, heads=12, vocabulary=512, sequence_length=512, batch=1),
}
LOSS_TOLERANCE = 1e-5  # relative: products by blocks of rows may add up in another order
PORT = "29500"  # in a namespace of its own every port is free
TIMEOUT_SECONDS = 1800

Measured = dict[str, Any]  # what `_overlap_rank` prints


def run_ranks(case: Case) -> list[Measured]:
    """A rank on each of two new nodes."""
    launcher = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT}
    environment = {**os.environ, **launcher, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / "_overlap_rank.py"), json.dumps(asdict(case))]
    with tempfile.TemporaryFile("w+") as errors, Nodes() as nodes:
        ranks = [nodes.start(rank, command, {**environment, "RANK": str(rank)}, errors) for rank in range(2)]
        outputs = [rank.communicate(timeout=TIMEOUT_SECONDS)[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            errors.seek(0)
            sys.exit(f"error: a rank failed\n{errors.read()}")
    return [json.loads(output) for output in outputs]


def slower(ranks: list[Measured], phase: str, mode: str, key: str) -> list[float]:
    """A figure of each round: the larger one of the two ranks'."""
    rounds = zip(*(rank[phase][mode] for rank in ranks), strict=True)
    return [max(step[key] for step in steps) for steps in rounds]


def check_losses(ranks: list[Measured], modes: tuple[str, ...], plant_error: bool) -> None:
    for phase in ("unlimited", "limited"):
        expected, *others = (slower(ranks, phase, mode, "loss") for mode in modes)
        expected[0] += plant_error
        for mode, losses in zip(modes[1:], others, strict=True):
            for right, found in zip(expected, losses, strict=True):
                if abs(found - right) > LOSS_TOLERANCE * max(abs(right), 1.0):
                    sys.exit(f"error: {mode} has a loss of {found}, {modes[0]} of {right}: not the same training")


def predicted_seconds(case: Case, mode: str, ranks: list[Measured], computation: float) -> float:
    """A step of that mode, by the model."""
    products, bandwidth = ranks[0]["products"], min(rank["bandwidth"] for rank in ranks)
    layer = sum(products[name] for name in ("wqkv", "wo", "w13", "w2"))
    table = case.vocabulary * case.hidden
    if case.kind == "zero":
        # Half of fp32 numbers travels, both ways. Computation goes by products, a third of it forward.
        forward = computation / 3 / (case.layers * layer + products["head"])
        sizes = [2.0 * case.layer_parameters] * case.layers
        seconds = [forward * layer] * case.layers
        sizes[-1] += 2.0 * table
        seconds[-1] += forward * products["head"]
        return zero_step_seconds([(0.0, 2.0 * table), *zip(seconds, sizes, strict=True)], 0.0, mode == "on", bandwidth)
    rows, row_bytes = case.sequence_length // 2, 4 * case.batch * case.hidden
    message, pieces = float(rows * row_bytes), len(row_pieces(rows, row_bytes, PIECE_BYTES["cpu"]))

    def linear(name: str, layer: str = "") -> Linear:
        return Linear(layer + name, name in ("wqkv", "w13", "head"), products[name], message, pieces)

    linears = [linear(name, f"{i} ") for i in range(case.layers) for name in ("wqkv", "wo", "w13", "w2")]
    linears.append(linear("head"))
    rest = max(0.0, computation - 3 * sum(linear.seconds for linear in linears))
    return play(list(tensor_step(linears, message, rest, mode)), bandwidth)


def report_case(report: Report, case: Case, ranks: list[Measured], plant_error: bool) -> None:
    modes = MODES[case.kind]
    check_losses(ranks, modes, plant_error)
    name, bandwidth = {"zero": "zero.overlap", "tp": "tp_overlap"}[case.kind], min(rank["bandwidth"] for rank in ranks)
    sizes = f"{case.layers} layers, hidden {case.hidden}, ffn {case.ffn}, {case.batch} x {case.sequence_length} tokens per rank"
    report.section(case.kind, f"{sizes}; link {8e-6 * bandwidth:.0f} of {case.megabits:g} Mbit/s")
    computation = min(median(slower(ranks, "unlimited", mode, "seconds")) for mode in modes)
    report.add("computation", computation, "s")
    seconds = {mode: slower(ranks, "limited", mode, "seconds") for mode in modes}
    for mode in modes:
        report.add(f"step, {name} = {mode}", seconds[mode], "s")
        report.add("  of it CPU", slower(ranks, "limited", mode, "cpu_seconds"), "CPU s")
    for mode in modes:
        step, predicted = median(seconds[mode]), predicted_seconds(case, mode, ranks, computation)
        exposed, by_model = (100 * (1 - computation / value) for value in (step, predicted))
        report.add(f"exposed, {name} = {mode}", exposed, "% of the step")
        report.add("  by the model", by_model, "% of the step")
        report.add("  difference", abs(exposed - by_model), "points", at_most=10)
    for mode in modes[1:]:
        ratios = [ours / plain for ours, plain in zip(seconds[mode], seconds[modes[0]], strict=True)]
        report.add(f"step, {mode} / {modes[0]}", ratios, "", at_most=0.8 if mode == modes[-1] else None)
    for mode in modes:
        sent = zip(*(slower(ranks, "limited", mode, key) for key in ("interface_bytes", "ledger_bytes")), strict=True)
        report.add(f"interface / ledger, {mode}", [wire / counted for wire, counted in sent], "", at_most=1.3)
        report.add("  ledger", slower(ranks, "limited", mode, "ledger_bytes"), "bytes per step")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SIZES), help="one of the two")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--megabits", type=float, default=200.0, metavar="N", help="per second (%(default)g)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="F", help="of hidden size and ffn (%(default)g)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    parser.add_argument("--plant-error", action="store_true", help="change one loss: the comparison must fail")
    return parser.parse_args()


def make_case(kind: str, arguments: argparse.Namespace) -> Case:
    sizes = SIZES[kind]
    unit = 2 * sizes["heads"]  # of an even head size
    widths = {name: max(1, round(arguments.scale * sizes[name] / unit)) * unit for name in ("hidden", "ffn")}
    return Case(kind=kind, rounds=arguments.rounds, megabits=arguments.megabits, **{**sizes, **widths})


def end(number: int, frame: object) -> None:
    """A signal takes the way out of an error, which removes the nodes."""
    sys.exit(128 + number)


def main() -> None:
    arguments = parse_arguments()
    setting = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": f"{os.cpu_count()} x {platform.machine()} CPU",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    for name, value in setting.items():
        print(f"{name:10s} {value}", flush=True)
    signal.signal(signal.SIGTERM, end)
    report = Report()
    for kind in [arguments.only] if arguments.only else SIZES:
        case = make_case(kind, arguments)
        try:
            ranks = run_ranks(case)
        except (OSError, subprocess.TimeoutExpired) as error:
            sys.exit(f"error: {error}")
        report_case(report, case, ranks, arguments.plant_error)
    if arguments.json:
        content = {**setting, "figures": report.as_json()}
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
