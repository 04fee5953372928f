"""What the first supervisor decides for all: whether the ranks are started again, and on which nodes and devices."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_llama.program import LOST, STOPPED
from megatron_llama.supervision.event_log import EventLog
from megatron_llama.supervision.roster import Outcome, Plan, Roster, Share
from megatron_llama.supervision.supervisors import LOOK_SECONDS, NEVER_AGAIN, Supervisors, joint_code


class Lead:
    """Starts the ranks as often as it helps: `max_restarts` times in a row without a new checkpoint.

    `newest_step()` is the newest that is saved, 0 where there is none.
    """

    def __init__(
        self, supervisors: Supervisors, roster: Roster, log: EventLog, newest_step: Callable[[], int], max_restarts: int
    ) -> None:
        self.supervisors, self.roster, self.log = supervisors, roster, log
        self.newest_step, self.max_restarts = newest_step, max_restarts
        self.step = newest_step()  # as the latest start began
        self.fruitless = 0  # failures since the last new checkpoint
        self.plan = Plan()

    def first_plan(self) -> Plan:
        """The plan of the first start, once all supervisors have come, or those that are still missing are given up."""
        while self.supervisors.arrivals() + len(self.supervisors.lost) < self.supervisors.nodes:
            self.look_after(0)
            time.sleep(LOOK_SECONDS)
        return self._start(1)

    def next_plan(self, start: int, stopping: bool) -> Plan:
        """What follows this start, once its ranks have ended on all nodes. `stopping`: nobody wants another one."""
        outcomes = self._outcomes(start)
        missing = [LOST] * (len(self.plan.nodes) - len(outcomes))
        code = joint_code([*(outcome.code for outcome in outcomes.values()), *missing])
        before, self.step = self.step, self.newest_step()
        progress = self.step > before
        self.fruitless = 1 if progress else self.fruitless + 1
        ended = code in (0, STOPPED, *NEVER_AGAIN) or stopping
        if ended or self.fruitless > self.max_restarts:
            spent = "" if ended else f" after {self.fruitless} failures in a row without a new checkpoint"
            return self._end(code, spent)
        self.roster.hear(outcomes, progress)
        return self._start(start + 1)

    def look_after(self, start: int) -> None:
        """Notice who is silent, and wake all if ranks of this start are lost by it."""
        for node in self.supervisors.beat():
            self.roster.lose(node)
            self.log.note("lost", self.step, f"node {node} is lost: nothing has been heard of its supervisor", lost=node)
            if node in self.plan.nodes:
                self.supervisors.alarm(start)

    def _outcomes(self, start: int) -> dict[int, Outcome]:
        """How the ranks have ended, by node; without the lost ones."""
        outcomes: dict[int, Outcome] = {}
        while True:
            for node in self.plan.nodes:
                outcome = None if node in outcomes else self.supervisors.outcome(start, node)
                if outcome is not None:
                    outcomes[node] = outcome
            if all(node in outcomes or node in self.supervisors.lost for node in self.plan.nodes):
                return outcomes
            self.look_after(start)
            time.sleep(LOOK_SECONDS)

    def _start(self, start: int) -> Plan:
        before, shares = self.plan.shares, self.roster.deal()
        if not shares:
            left = self.supervisors.nodes - len(self.supervisors.lost)
            return self._end(LOST, f": of {self.roster.needed} nodes that the ranks need, {left} are left")
        if start > 1:
            budget = f"restart {self.fruitless} of {self.max_restarts} without a new checkpoint"
            moved = f", now on {describe(shares)}" if shares != before else ""
            self.log.note("restart", self.step, f"starting again at step {self.step}{moved} ({budget})")
        self.plan = Plan(shares)
        self.log.note("start", self.step, f"start {start} of {sum(len(slots) for _, slots in shares)} ranks", shares=shares)
        return self.plan

    def _end(self, code: int, why: str) -> Plan:
        self.log.note("end", self.step, f"ended with code {code}{why}", code=code)
        return Plan(code=code)


def describe(shares: tuple[Share, ...]) -> str:
    """The nodes and slots of a plan, for people."""
    return ", ".join(f"node {node} (slot{'s' * (len(slots) > 1)} {' '.join(map(str, slots))})" for node, slots in shares)
