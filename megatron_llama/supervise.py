"""Watches a training: starts a node's ranks, finds dead and hanging ones, says what happened, and starts them again.

    python -m megatron_llama.supervise [--ranks N] [options] -- train --config FILE.toml [--section.field value ...]

One supervisor per node, started as a rank would be. docs/failures.md says what it does in which case.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch.distributed as dist

from megatron_llama import train
from megatron_llama.config import RunConfig, checkpoint_directory, load_config
from megatron_llama.incident import Incident, write_report
from megatron_llama.program import LOST, STOPPED, asks_for_help, run_program
from megatron_llama.progress import format_duration
from megatron_llama.rank_processes import PASSED_ON, RankProcesses
from megatron_llama.supervisors import NEVER_AGAIN, Supervisors, joint_code
from parallel import launch as launching
from parallel.checkpoint.steps import committed_steps
from parallel.errors import ConfigError, LaunchError, LostContactError
from parallel.heartbeat import Limits, Watch
from parallel.launch import Launch

LOOK_SECONDS = 0.1  # between two looks at the heartbeats; the end of a process is noticed at once
SETTLE_SECONDS = 0.3  # in which the ranks end that miss the one that has died
SHARED_MEMORY = Path("/dev/shm")


class SupervisorParser(argparse.ArgumentParser):
    """Wrong options are ConfigErrors, as in the other programs."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the options)")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The supervisor's own options, and the arguments of the training. Raises ConfigError."""
    parser = SupervisorParser(
        prog="python -m megatron_llama.supervise",
        usage="%(prog)s [options] -- train --config FILE.toml [--section.field value ...]",
        description="Start the ranks of a training on this node, and start them again when one dies or hangs.",
        allow_abbrev=False,
    )
    limits = Limits()
    add = parser.add_argument
    add("--ranks", type=int, default=1, metavar="N", help="ranks to start on this node: one per GPU (default 1)")
    add("--max-restarts", type=int, default=3, metavar="N", help="restarts in a row without a new checkpoint (default 3)")
    add("--first-timeout", type=float, default=limits.first, metavar="SECONDS",
        help=f"how long a rank may stand still before it counts as hanging (default {limits.first:g})")  # fmt: skip
    add("--least-timeout", type=float, default=limits.least, metavar="SECONDS",
        help=f"how long at least in steps and evaluations, once they are known (default {limits.least:g})")  # fmt: skip
    add("--timeout-factor", type=float, default=limits.factor, metavar="K",
        help=f"how many times the longest pause that was seen in them (default {limits.factor:g})")  # fmt: skip
    add("--grace", type=float, default=5.0, metavar="SECONDS", help="from TERM to KILL after a failure (default 5)")
    before = argv.index("--") if "--" in argv else len(argv)
    program = argv[before + 1 :]
    if program[:1] != ["train"] and not asks_for_help(argv[:before]):
        raise ConfigError("what to supervise is to follow `--`: ... -- train --config FILE.toml")
    options = parser.parse_args(argv[:before])
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks} is below 1")
    return options, program[1:]


def main(launch: Launch, argv: list[str]) -> int:
    """Supervise a training, and return its exit code: 0 done, 75 stopped with its state saved, 78 to be mended first.

    69: ranks have died or hung, and further restarts would bring nothing; or another supervisor is gone.
    """
    options, arguments = parse(argv)
    config = load_config(arguments)
    if launch.local_world_size > 1:
        raise LaunchError(
            f"{launch.launcher} has started {launch.local_world_size} supervisors on this node: start one per node "
            f"(srun --ntasks-per-node=1), with --ranks {launch.local_world_size} each"
        )
    supervisors = Supervisors()
    if launch.world_size > 1:
        point, timeout = launch.meeting_point, timedelta(seconds=config.train.start_timeout)
        host = point.host if point is not None and point.serves else socket.gethostname()
        supervisors = Supervisors(launch.rank, launch.world_size, host, launching.meet(launch, timeout))
    try:
        return Supervisor(config, options, supervisors, lambda rank: train.main(rank, arguments)).run()
    except dist.DistError as error:
        reason = str(error).strip().splitlines()[0]
        raise LostContactError(f"the supervisor of node {launch.rank} has lost another one: {reason}") from error


class Supervisor:
    """Runs `main` on `options.ranks` ranks until they are done, are stopped, or fail without bringing new checkpoints."""

    def __init__(
        self, config: RunConfig, options: argparse.Namespace, supervisors: Supervisors, main: Callable[[Launch], int]
    ) -> None:
        self.options, self.supervisors, self.main = options, supervisors, main
        self.run_directory, self.checkpoints = Path(config.log.directory), checkpoint_directory(config)
        self.watch = Watch(Limits(options.first_timeout, options.least_timeout, options.timeout_factor))
        self.signals: list[int] = []  # received, and not passed on yet
        self.stopping = False
        self.fruitless = 0  # failures since the last new checkpoint

    def run(self) -> int:
        """Start the ranks as often as it helps; returns the exit code."""
        start, newest = 1, self._newest_step()
        with self._signals_noted():
            while True:
                self._note("start", newest, f"start {start} of {self.options.ranks} ranks")
                code = self.supervisors.agree(start, self._run_ranks(start))
                before, newest = newest, self._newest_step()
                self.fruitless = 1 if newest > before else self.fruitless + 1
                ended = code in (0, STOPPED, *NEVER_AGAIN) or self.stopping
                wanted = not ended and self.fruitless <= self.options.max_restarts
                if not self.supervisors.go_on(start, wanted):
                    spent = "" if ended else f" after {self.fruitless} failures in a row without a new checkpoint"
                    self._note("end", newest, f"ended with code {code}{spent}", code=code)
                    return code
                start += 1
                budget = f"restart {self.fruitless} of {self.options.max_restarts} without a new checkpoint"
                self._note("restart", newest, f"starting again at step {newest} ({budget})")

    def _run_ranks(self, start: int) -> int:
        """Start this node's ranks, watch them to their end, and return what they end with."""
        node, nodes, local = self.supervisors.node, self.supervisors.nodes, self.options.ranks
        point = self.supervisors.meeting_point(start)
        launches = [
            Launch(node * local + i, i, nodes * local, local, "supervisor", replace(point, serves=node + i == 0))
            for i in range(local)
        ]
        began = time.monotonic()
        self.watch.forget_ranks()
        with TemporaryDirectory(prefix="heartbeats-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
            ranks = RankProcesses(self.main, launches, Path(folder))
            try:
                incident = self._watch_ranks(ranks, start)
                if incident is None:
                    return joint_code(ranks.codes.values())
                self.supervisors.alarm(start)
                code = LOST if incident.kind == "hang" else joint_code(incident.codes.values())
                if code not in NEVER_AGAIN:  # in these cases the rank has said what is wrong
                    self._tell(incident, start, time.monotonic() - began)
                return code
            finally:
                ranks.end(self.options.grace)

    def _watch_ranks(self, ranks: RankProcesses, start: int) -> Incident | None:
        """Return when all ranks have ended well (None) or some have died or hang, here or on another node."""
        while ranks.alive:
            ranks.wait(LOOK_SECONDS)
            while self.signals:
                ranks.signal(self.signals.pop())
            beats = ranks.beats()
            overdue = self.watch.look({rank: beats[rank] for rank in ranks.alive}, time.monotonic())
            failed = any(code not in (0, STOPPED) for code in ranks.codes.values())
            if failed or overdue or self.supervisors.alarmed(start):
                limits = {rank: self.watch.limit(self.watch.phase(rank)) for rank in overdue}
                return _look_closer(ranks, limits)
        return None if all(code in (0, STOPPED) for code in ranks.codes.values()) else _look_closer(ranks, {})

    def _tell(self, incident: Incident, start: int, seconds: float) -> None:
        """Log an incident and write its report."""
        newest = self._newest_step()
        facts = {
            "start": f"{start}, {format_duration(seconds)} after it",
            "node": f"{self.supervisors.node} of {self.supervisors.nodes}",
            "checkpoint": f"step {newest} is the newest" if newest else "none yet",
        }
        try:
            path = str(write_report(self.run_directory / "reports", incident, facts))
        except OSError as error:  # a full disk must not end the supervision
            path = f"no report: {error}"
        where = {"rank": incident.rank, "code": incident.codes.get(incident.rank), "report": path}
        self._note(incident.kind, incident.step, f"{incident.headline()}; {path}", **where)

    def _note(self, event: str, step: int, text: str, **fields: Any) -> None:
        """A line for people on standard error, and one of `supervisor.jsonl` for programs (tools/goodput.py)."""
        print(f"supervisor: {text}", file=sys.stderr, flush=True)
        if self.supervisors.node and event != "death" and event != "hang":
            return
        record = {"time": round(time.time(), 3), "event": event, "step": step, **fields, "text": text}
        try:
            self.run_directory.mkdir(parents=True, exist_ok=True)
            with open(self.run_directory / "supervisor.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"supervisor: not in supervisor.jsonl: {error}", file=sys.stderr, flush=True)

    def _newest_step(self) -> int:
        """The newest step that is saved, 0 where there is none."""
        return max(committed_steps(self.checkpoints), default=0)

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Inside, TERM and USR1 are noted, to be passed on to the ranks, which stop after saving."""

        def note(number: int, frame: object) -> None:
            self.signals.append(number)
            self.stopping = True

        before = {number: signal.signal(number, note) for number in PASSED_ON}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _look_closer(ranks: RankProcesses, limits: dict[int, float]) -> Incident:
    """What there is to know about ranks that have failed, or that stand still beyond their `limits`."""
    stacks = ranks.stacks()
    if not limits:
        time.sleep(SETTLE_SECONDS)  # those that miss a dead rank end by themselves
    codes, beats = ranks.codes, ranks.beats()
    stacks = {rank: text for rank, text in stacks.items() if text or rank not in codes}
    return Incident(codes, limits, {rank: beat for rank, beat in beats.items() if beat is not None}, stacks, time.monotonic())


if __name__ == "__main__":
    sys.exit(run_program(lambda launch: main(launch, sys.argv[1:])))
