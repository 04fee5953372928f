"""Watches a training: starts a node's ranks, finds dead and hanging ones, says what happened, and starts them again.

    python -m megatron_llama.supervise [--ranks N] [options] -- train --config FILE.toml [--section.field value ...]

One supervisor per node, started as a rank would be; spare nodes and devices stand by. docs/failures.md says what it does in
which case.
"""

from __future__ import annotations

import argparse
import os
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
from typing import NoReturn

import torch.distributed as dist

from megatron_llama import train
from megatron_llama.config import RunConfig, checkpoint_directory, load_config
from megatron_llama.program import LOST, STOPPED, asks_for_help, command_line, run_program
from megatron_llama.progress import format_duration
from megatron_llama.supervision.event_log import EventLog
from megatron_llama.supervision.incident import Incident, write_report
from megatron_llama.supervision.lead import Lead
from megatron_llama.supervision.rank_processes import PASSED_ON, RankProcesses
from megatron_llama.supervision.roster import Outcome, Plan, Roster
from megatron_llama.supervision.supervisors import LOOK_SECONDS, NEVER_AGAIN, Supervisors, joint_code
from parallel import launch as launching
from parallel.checkpoint.steps import committed_steps
from parallel.errors import ConfigError, LaunchError, LostContactError
from parallel.heartbeat import Limits, Watch
from parallel.launch import Launch

BUSY_SECONDS = 2.0  # that a supervisor may be silent for while it looks into a failure, besides the time of grace
SETTLE_SECONDS = 0.3  # in which the ranks end that miss the one that has died
BLAME_SECONDS = 1.0  # for a rank to end that others have lost
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
    add("--nodes", type=int, metavar="N", help="nodes that the ranks run on: further supervisors stand by (default: all)")
    add("--spares", type=int, default=0, metavar="N", help="further devices of each node that stand by (default 0)")
    add("--max-restarts", type=int, default=3, metavar="N", help="restarts in a row without a new checkpoint (default 3)")
    add("--first-timeout", type=float, default=limits.first, metavar="SECONDS",
        help=f"how long a rank may stand still before it counts as hanging (default {limits.first:g})")  # fmt: skip
    add("--least-timeout", type=float, default=limits.least, metavar="SECONDS",
        help=f"how long at least in steps, evaluations and audits, once known (default {limits.least:g})")  # fmt: skip
    add("--timeout-factor", type=float, default=limits.factor, metavar="K",
        help=f"how many times the longest pause that was seen in them (default {limits.factor:g})")  # fmt: skip
    add("--grace", type=float, default=5.0, metavar="SECONDS", help="from TERM to KILL after a failure (default 5)")
    add("--node-timeout", type=float, default=30.0, metavar="SECONDS",
        help="how long a node's supervisor may be silent before the node counts as lost (default 30)")  # fmt: skip
    before = argv.index("--") if "--" in argv else len(argv)
    program = argv[before + 1 :]
    if program[:1] != ["train"] and not asks_for_help(argv[:before]):
        raise ConfigError("what to supervise is to follow `--`: ... -- train --config FILE.toml")
    options = parser.parse_args(argv[:before])
    for name, value, least in (("ranks", options.ranks, 1), ("nodes", options.nodes, 1), ("spares", options.spares, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value} is below {least}")
    if options.node_timeout < options.grace + BUSY_SECONDS:
        raise ConfigError(
            f"--node-timeout {options.node_timeout:g} is too short: a supervisor that ends its ranks (--grace "
            f"{options.grace:g}) is silent for up to {options.grace + BUSY_SECONDS:g} s"
        )
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
    if (options.nodes or 1) > launch.world_size:
        raise ConfigError(f"--nodes {options.nodes} is more than the {launch.world_size} supervisors that were started")
    supervisors = Supervisors()
    if launch.world_size > 1:
        supervisors = _meet(launch, options.node_timeout, config.train.start_timeout)
    try:
        return Supervisor(config, options, supervisors, lambda rank: train.main(rank, arguments)).run()
    except dist.DistError as error:
        reason = str(error).strip().splitlines()[0]
        raise LostContactError(f"the supervisor of node {launch.rank} has lost the first one: {reason}") from error


def _meet(launch: Launch, silence_seconds: float, start_seconds: float) -> Supervisors:
    """Join the supervisors of the other nodes. Raises LaunchError, LostContactError and DistError."""
    point = launch.meeting_point
    host = point.host if point is not None and point.serves else socket.gethostname()
    store = launching.meet(launch, timedelta(seconds=start_seconds))
    store.set_timeout(timedelta(seconds=silence_seconds))
    return Supervisors(launch.rank, launch.world_size, host, store, silence_seconds, start_seconds)


class Supervisor:
    """Runs `main` on the ranks of this node, as often as the first supervisor wants, which it may be itself."""

    def __init__(
        self, config: RunConfig, options: argparse.Namespace, supervisors: Supervisors, main: Callable[[Launch], int]
    ) -> None:
        self.options, self.supervisors, self.main = options, supervisors, main
        self.run_directory, self.checkpoints = Path(config.log.directory), checkpoint_directory(config)
        self.log = EventLog(self.run_directory, supervisors.node)
        self.watch = Watch(Limits(options.first_timeout, options.least_timeout, options.timeout_factor))
        self.signals: list[int] = []  # received, and not passed on yet
        self.stopping = False
        self.lead: Lead | None = None
        if supervisors.leads:
            nodes = supervisors.nodes
            roster = Roster(nodes, options.nodes or nodes, options.ranks + options.spares, options.ranks)
            self.lead = Lead(supervisors, roster, self.log, self._newest_step, options.max_restarts)

    def run(self) -> int:
        """Start this node's ranks whenever the plan has some on it; returns the exit code, the same on all nodes."""
        with self._signals_noted():
            start = 1
            while True:
                if self.lead is not None:
                    plan = self.lead.first_plan() if start == 1 else self.lead.next_plan(start - 1, self.stopping)
                    self.supervisors.announce(start, plan)
                plan = self.supervisors.plan(start)
                if plan.code is not None:
                    self.supervisors.part()
                    return plan.code
                if self.supervisors.node in plan.nodes:
                    self.supervisors.conclude(start, self._run_ranks(start, plan))
                start += 1

    def _run_ranks(self, start: int, plan: Plan) -> Outcome:
        """Start this node's ranks, watch them to their end, and return how they end."""
        place = plan.nodes.index(self.supervisors.node)
        slots, first = plan.shares[place][1], place * self.options.ranks
        point = self.supervisors.meeting_point(start, serves=place == 0)
        if point is None:
            return Outcome(LOST, "elsewhere")
        launches = [
            Launch(first + i, i, len(plan.nodes) * len(slots), len(slots), "supervisor", replace(point, serves=first + i == 0))
            for i in range(len(slots))
        ]
        devices = launching.visible_devices(slots) if self.options.spares else None
        began = time.monotonic()
        self.watch.forget_ranks()
        memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        with TemporaryDirectory(prefix=f"heartbeats-{os.getpid()}-", dir=memory) as folder:
            ranks = RankProcesses(self.main, launches, Path(folder), devices)
            try:
                incident = self._watch_ranks(ranks, start)
                if incident is None:
                    return Outcome(joint_code(ranks.codes.values()))
                self.supervisors.alarm(start)
                code = LOST if incident.kind == "hang" else joint_code(incident.codes.values())
                if code not in NEVER_AGAIN:  # in these cases the rank has said what is wrong
                    self._tell(incident, start, time.monotonic() - began)
                return Outcome(code, incident.kind, slots[incident.rank - first] if incident.began_here else None)
            finally:
                ranks.end(self.options.grace)

    def _watch_ranks(self, ranks: RankProcesses, start: int) -> Incident | None:
        """Return when all ranks have ended well (None) or some have died or hang, here or on another node."""
        while ranks.alive:
            ranks.wait(LOOK_SECONDS)
            self._keep_contact(start)
            while self.signals:
                ranks.signal(self.signals.pop())
            beats = ranks.beats()
            overdue = self.watch.look({rank: beats[rank] for rank in ranks.alive}, time.monotonic())
            failed = any(code not in (0, STOPPED) for code in ranks.codes.values())
            if failed or overdue or self.supervisors.alarmed(start):
                limits = {rank: self.watch.limit(self.watch.phase(rank)) for rank in overdue}
                return _look_closer(ranks, limits)
        return None if all(code in (0, STOPPED) for code in ranks.codes.values()) else _look_closer(ranks, {})

    def _keep_contact(self, start: int) -> None:
        if self.lead is None:
            self.supervisors.beat()
        else:
            self.lead.look_after(start)

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
        where = {"rank": incident.rank, "code": incident.codes.get(incident.rank), "report": path, "noticed": incident.noticed}
        self.log.note(incident.kind, incident.step, f"{incident.headline()}; {path}", **where)

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
    noticed = time.time()
    stacks = ranks.stacks()
    if not limits:
        _let_settle(ranks)
    codes, beats, events = ranks.codes, ranks.beats(), ranks.events()
    stacks = {rank: text for rank, text in stacks.items() if text or rank not in codes}
    begun = {rank: beat for rank, beat in beats.items() if beat is not None}
    return Incident(codes, limits, begun, stacks, time.monotonic(), events, noticed)


def _let_settle(ranks: RankProcesses) -> None:
    """Wait for those that miss a dead rank to end by themselves; for longer where none has ended yet that is to blame."""
    began = time.monotonic()
    while ranks.alive and time.monotonic() - began < (BLAME_SECONDS if set(ranks.codes.values()) == {LOST} else SETTLE_SECONDS):
        ranks.wait(LOOK_SECONDS)


if __name__ == "__main__":
    sys.exit(run_program(lambda launch: main(launch, command_line(launch))))
