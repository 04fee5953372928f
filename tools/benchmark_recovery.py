"""How fast a supervised training is found dead or hanging and works again, and what the watching costs while nothing happens.

    python tools/benchmark_recovery.py
    python tools/benchmark_recovery.py --only overhead --steps 100 --json figures.json

Real processes on this machine's CPUs, 4 ranks (tp 2, pp 2) over gloo, in a folder of their own.

recovery    a rank is killed, or stopped (SIGSTOP), round by round another one; later the supervisor is killed and started again
  dead rank found       from the kill until the supervisor notices
  hanging rank found    from the stop until it notices, less the limit of the phase
  report                from then until the report is written, with the stacks of all ranks
  restart, warm         from the report until the record of the first new step: ranks are forked
  restart, cold         from the start of the command until that record: Python, torch and all the rest are imported first
overhead    a training in whose odd steps the heartbeat does nothing
  counted               beats per step times the cost of one, which is measured in a loop
  compared              median CPU time of the steps with beats less that of the steps without: differences this small drown in
                        the noise of a shared machine
  verdicts              reading a step's numbers, watching them for spikes and slow ranks: CPU time of the main thread
  audits                of an audit, divided by the steps between two (the default of watch.audit_every)

Figures of overhead are those of the rank with the highest. CPU times don't count waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

try:
    import numpy as np
    import torch
    from _measuring import Report
    from _overhead_rank import run

    from megatron_llama.config import WatchConfig
    from megatron_llama.data.indexed import IndexedDatasetWriter
    from megatron_llama.supervise import SHARED_MEMORY
    from megatron_llama.supervision.rank_processes import RankProcesses
    from megatron_llama.supervision.supervisors import free_port
    from parallel.heartbeat import Heartbeat, beat_path
    from parallel.launch import Launch
    from parallel.launchers import MeetingPoint
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

RANKS, LAYOUT = 4, ("--parallel.tp", 2, "--parallel.pp", 2)
SIZES = {"tiny": (2, 32, 96, 128, 16), "full": (4, 256, 704, 2048, 128)}  # layers, hidden, ffn, vocabulary, sequence length
BETWEEN, SAVE_EVERY = 7, 3  # steps between two faults, and between two checkpoints
BEATS = 20_000  # of a loop
PATIENCE_SECONDS = 300.0
STEP_SECONDS = 0.1  # that the overhead is compared with


def flags(folder: Path, size: str) -> list[str]:
    """A training on random tokens in `folder`."""
    layers, hidden, ffn, vocabulary, length = SIZES[size]
    prefix = folder / "tokens"
    if not prefix.with_suffix(".bin").exists():
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document(np.random.default_rng(0).integers(3, vocabulary, 200_000).tolist())
    settings = {
        "model.num_layers": layers, "model.hidden_size": hidden, "model.ffn_hidden_size": ffn, "model.vocab_size": vocabulary,
        "model.num_heads": 4, "model.num_kv_heads": 4, "train.sequence_length": length, "train.global_batch_size": 8,
        "train.micro_batch_size": 1, "train.device": "cpu", "train.dtype": "fp32", "train.steps": 1_000_000,
        "optimizer.warmup_steps": 1, "data.train": json.dumps([str(prefix)]), "log.directory": folder / "run",
    }  # fmt: skip
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)] + list(map(str, LAYOUT))


# ---- recovery -----------------------------------------------------------------------------------------------------------


class Supervised:
    """A supervised training in `folder`, in processes of its own."""

    def __init__(self, folder: Path) -> None:
        self.run_directory = folder / "run"
        options = ["--ranks", RANKS, "--first-timeout", 30, "--least-timeout", 2, "--timeout-factor", 4, "--grace", 1]
        saves = ["--checkpoint.save_every", SAVE_EVERY, "--checkpoint.keep", 2]
        words = [*options, "--", "train", *flags(folder, "tiny"), *saves]
        self.command = [sys.executable, "-m", "megatron_llama.supervise", *map(str, words)]
        self.log = open(folder / "log", "a")

    def start(self) -> float:
        """Start the supervisor; returns when."""
        began = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, env=environment)
        return began

    def ranks(self) -> list[int]:
        """The process ids of the ranks, in their order."""
        pid = self.process.pid
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def wait_for_step_after(self, moment: float, steps: int = 1) -> float:
        """When the `steps`-th step was recorded that comes after that time."""
        return self._wait("metrics.jsonl", lambda line: "loss" in line, moment, steps)["time"]

    def wait_for_event(self, event: str, moment: float) -> dict[str, Any]:
        """The first event of that name that was logged after that time."""
        return self._wait("supervisor.jsonl", lambda line: line["event"] == event, moment, 1)

    def kill(self) -> None:
        """End the supervisor and, by that, its ranks."""
        ranks = self.ranks()
        self.process.kill()
        self.process.wait()
        wait_until(lambda: not any(map(is_alive, ranks)), lambda: "the ranks did not die with their supervisor")
        for heartbeats in SHARED_MEMORY.glob(f"heartbeats-{self.process.pid}-*"):
            shutil.rmtree(heartbeats)

    def _wait(self, name: str, counts: Callable[[dict[str, Any]], bool], moment: float, number: int) -> dict[str, Any]:
        """The `number`-th line of that file that counts and was written after that time."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self._lines(name) if line["time"] > moment and counts(line)]

        wait_until(
            lambda: self.process.poll() is not None or len(found()) >= number,
            self._said,
        )
        if self.process.poll() is not None:
            sys.exit(f"error: the supervisor has ended with code {self.process.returncode}; {self._said()}")
        return found()[number - 1]

    def _said(self) -> str:
        return f"its log is\n{Path(self.log.name).read_text()}"

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.run_directory / name
        text = path.read_text() if path.exists() else ""
        return map(json.loads, text[: text.rfind("\n") + 1].splitlines())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], complaint: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"error: nothing has happened for {PATIENCE_SECONDS:.0f} s: {complaint()}")
        time.sleep(0.01)


def measure_recovery(report: Report, rounds: int) -> None:
    figures: dict[str, list[float]] = {name: [] for name in ("dead", "hanging", "report", "warm", "cold")}
    with TemporaryDirectory() as name:
        training = Supervised(Path(name))
        began = training.start()
        try:
            training.wait_for_step_after(began, steps=BETWEEN)
            for number in range(rounds):
                for fault, event in ((signal.SIGKILL, "death"), (signal.SIGSTOP, "hang")):
                    struck = time.time()
                    os.kill(training.ranks()[number % RANKS], fault)
                    told = training.wait_for_event(event, struck)
                    seconds, written = told["noticed"] - struck, told["time"]
                    if event == "death":
                        figures["dead"].append(seconds)
                    else:
                        limit = Path(told["report"]).read_text().split("limit        ")[1].split(" s ")[0]
                        figures["hanging"].append(seconds - float(limit))
                    figures["report"].append(written - told["noticed"])
                    figures["warm"].append(training.wait_for_step_after(written) - written)
                    training.wait_for_step_after(written, steps=BETWEEN)
                training.kill()
                began = training.start()
                figures["cold"].append(training.wait_for_step_after(began) - began)
                training.wait_for_step_after(began, steps=BETWEEN)
        finally:
            training.kill()
    report.section("recovery", f"{RANKS} ranks, {rounds} rounds")
    report.add("dead rank found", figures["dead"], "s", at_most=1.0)
    report.add("hanging rank found, after its limit", figures["hanging"], "s", at_most=1.5)
    report.add("report written", figures["report"], "s")
    report.add("restart to the first new step, warm", figures["warm"], "s", at_most=3.0)
    report.add("restart to the first new step, cold", figures["cold"], "s", at_most=15.0)


# ---- overhead -----------------------------------------------------------------------------------------------------------


def beat_seconds(folder: Path) -> dict[str, float]:
    """CPU seconds of a beat of each kind: the least of five loops."""
    heartbeat = Heartbeat(beat_path(folder, RANKS))
    kinds: dict[str, Callable[[], None]] = {
        "phase": lambda: heartbeat.enter("step", 1),
        "action": lambda: heartbeat.act("F12.1"),
        "call": lambda: heartbeat.call("all_reduce", "tp", (0, 1)),
        "nothing": lambda: None,
    }

    def loop(beat: Callable[[], None]) -> float:
        began = time.process_time()
        for _ in range(BEATS):
            beat()
        return (time.process_time() - began) / BEATS

    seconds = {kind: min(loop(beat) for _ in range(5)) for kind, beat in kinds.items()}
    return {kind: value - seconds["nothing"] for kind, value in seconds.items() if kind != "nothing"}


def measure_overhead(report: Report, size: str, steps: int) -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        words = [*flags(folder, size), "--train.exit_step", str(steps + 2), "--watch.audit_every", "20"]
        point = MeetingPoint("127.0.0.1", free_port(), serves=False)
        launches = [Launch(rank, rank, RANKS, RANKS, "supervisor", point) for rank in range(RANKS)]
        ranks = RankProcesses(lambda launch: run(launch, folder, words), launches, folder)
        while ranks.alive:
            ranks.wait(1.0)
        if any(ranks.codes.values()):
            sys.exit(f"error: the ranks have ended with the codes {ranks.codes}")
        measured = [json.loads((folder / f"measured-{rank}.json").read_text()) for rank in range(RANKS)]
        each = beat_seconds(folder)
    report_overhead(report, measured, each, " x ".join(map(str, SIZES[size])))


def report_overhead(report: Report, ranks: list[dict[str, Any]], each: dict[str, float], sizes: str) -> None:
    def of_steps(rank: dict[str, Any], on: bool, key: str) -> list[float]:
        return [step[key] for step in rank["steps"] if step["on"] is on]

    def per_call(name: str) -> float:
        return max(rank["seconds"][name] / rank["calls"][name] for rank in ranks)

    report.section("overhead", f"{RANKS} ranks; layers x hidden x ffn x vocabulary x sequence length {sizes}")
    report.add("step of this training", 1e3 * median(of_steps(ranks[0], True, "seconds")), "ms")
    report.add("  of it CPU, a rank", [1e3 * median(of_steps(rank, True, "cpu_seconds")) for rank in ranks], "ms")
    beats = max(median(of_steps(rank, True, "beats")) for rank in ranks)
    report.add("beats", beats, "per step")
    kinds = ranks[0]["kinds"]
    for kind, seconds in each.items():
        report.add(f"  of kind {kind}, {kinds[kind] / sum(kinds.values()):.0%}: one takes", 1e9 * seconds, "ns")
    counted = max(
        beats * sum(each[kind] * count for kind, count in rank["kinds"].items()) / sum(rank["kinds"].values()) for rank in ranks
    )
    report.add("heartbeats, counted", 1e6 * counted, "us per step")
    with_beats, without = ([median(of_steps(rank, on, "cpu_seconds")) for rank in ranks] for on in (True, False))
    differences = [1e6 * (ours - bare) for ours, bare in zip(with_beats, without, strict=True)]
    report.add("heartbeats, compared", differences, "us per step")
    parts = {name: per_call(name) for name in ranks[0]["seconds"] if name.startswith("verdict/")}
    verdicts = sum(parts.values())
    report.add("verdicts", 1e6 * verdicts, "us per step")
    for name, seconds in parts.items():
        report.add(f"  {name.removeprefix('verdict/')}", 1e6 * seconds, "us per step")
    audit, between = per_call("audit/trainer.check_replicas"), WatchConfig().audit_every
    report.add("an audit", 1e3 * audit, "ms")
    report.add(f"audits, one in {between} steps", 1e6 * audit / between, "us per step")
    total = counted + verdicts + audit / between
    report.add("all of it", 100 * total / STEP_SECONDS, "% of 100 ms", at_most=0.5)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["recovery", "overhead"], help="one of the two")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="of recovery (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of overhead (%(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="of the model of overhead (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    setting = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": f"{os.cpu_count()} x {platform.machine()} CPU, load average {os.getloadavg()[0]:.1f}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    for name, value in setting.items():
        print(f"{name:10s} {value}", flush=True)
    report = Report()
    if arguments.only != "overhead":
        measure_recovery(report, arguments.rounds)
    if arguments.only != "recovery":
        measure_overhead(report, arguments.size, arguments.steps)
    if arguments.json:
        arguments.json.write_text(json.dumps({**setting, "figures": report.as_json()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
