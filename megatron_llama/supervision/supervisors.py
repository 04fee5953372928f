"""What the supervisors of several nodes tell each other, through a store that the first one serves.

All of them say about once a second that they are alive. The first one notices who is silent, decides what is done next, and
tells the others.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch.distributed as dist

from megatron_llama.program import INTERRUPTED, LOST, STOPPED, USER_ERROR
from megatron_llama.supervision.roster import Outcome, Plan
from parallel.errors import LostContactError
from parallel.launchers import MeetingPoint

NEVER_AGAIN = (USER_ERROR, 2, INTERRUPTED)  # what somebody has to mend first, wrong usage, Ctrl-C
BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.1  # between two looks at the store


class Supervisors:
    """The supervisors of all nodes, as the one of node `node` sees them. One alone needs no `store`.

    `host` is this node's name for the others. A supervisor that is silent for `silence_seconds` is lost, and one that has not
    come in `start_seconds`. Each start of the ranks has a number, and keys of its own in the store. The methods raise DistError
    where the first supervisor is gone, LostContactError where it is silent, or has given this one up.
    """

    def __init__(
        self,
        node: int = 0,
        nodes: int = 1,
        host: str = "127.0.0.1",
        store: dist.Store | None = None,
        silence_seconds: float = 30.0,
        start_seconds: float = 600.0,
    ) -> None:
        self.node, self.nodes, self.host = node, nodes, host
        self.store = dist.HashStore() if store is None else store
        self.silence_seconds, self.start_seconds = silence_seconds, start_seconds
        self.lost: set[int] = set()  # known to the first one
        others = range(1, nodes) if node == 0 else (0,)  # that this one listens to
        self._counts = dict.fromkeys(others, 0)  # of their beats
        self._silent = dict.fromkeys(others, 0.0)  # for how long
        self._looked_at = time.monotonic()

    @property
    def leads(self) -> bool:
        """Whether this is the first one."""
        return self.node == 0

    def _ask(self, method: Callable[..., Any], *arguments: object) -> Any:
        """Call a method of the store. Raises LostContactError where no answer comes: the store itself would wait for ever."""
        if self.nodes == 1:
            return method(*arguments)
        answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put((method(*arguments), None))
            except Exception as error:
                answers.put((None, error))

        Thread(target=ask, daemon=True).start()
        try:
            answer, error = answers.get(timeout=self.silence_seconds)
        except Empty:
            raise self._first_is_silent() from None
        if error is not None:
            raise error
        return answer

    def beat(self) -> list[int]:
        """Say that this one is alive, where it is time to; call it often. Returns the nodes that the first one finds lost."""
        passed = time.monotonic() - self._looked_at
        if self.nodes == 1 or passed < BEAT_SECONDS:
            return []
        self._looked_at += passed
        self._ask(self.store.add, f"beats of {self.node}", 1)
        silent = [node for node in self._counts if node not in self.lost and self._is_silent(node, passed)]
        if self.leads:
            for node in silent:
                self._ask(self.store.set, f"{node} is lost", "")
            self.lost.update(silent)
            return silent
        if silent:
            raise self._first_is_silent()
        if self._ask(self.store.check, [f"{self.node} is lost"]):
            raise LostContactError(
                f"the first supervisor has given up this one, of node {self.node} ({self.host}), as it was silent for "
                f"{self.silence_seconds:.0f} s; the ranks go on without it, where there is a spare node"
            )
        return []

    def _first_is_silent(self) -> LostContactError:
        return LostContactError(
            f"the first supervisor has been silent for {self.silence_seconds:.0f} s: its node, or the network, is down"
        )

    def _is_silent(self, node: int, passed: float) -> bool:
        count = self._ask(self.store.add, f"beats of {node}", 0)
        if count > self._counts[node]:
            self._counts[node], self._silent[node] = count, 0.0
            return False
        # where this process itself has been stopped, the others may have been, too
        self._silent[node] += min(passed, 2 * BEAT_SECONDS)
        return self._silent[node] > (self.silence_seconds if count else self.start_seconds)

    def arrivals(self) -> int:
        """How many have come, as the first one sees it."""
        return 1 + sum(count > 0 for count in self._counts.values())

    def announce(self, start: int, plan: Plan) -> None:
        """Tell all what to do; the first one does."""
        self._ask(self.store.set, f"{start}/plan", plan.to_json())

    def plan(self, start: int) -> Plan:
        """What to do, as soon as the first one has said so."""
        key = f"{start}/plan"
        while not self._ask(self.store.check, [key]):
            self.beat()
            time.sleep(LOOK_SECONDS)
        return Plan.from_json(self._ask(self.store.get, key).decode())

    def meeting_point(self, start: int, serves: bool) -> MeetingPoint | None:
        """Where the ranks of this start meet: a free port of the node that `serves`, which has rank 0.

        None where the start has failed before that is known.
        """
        key = f"{start}/meeting point"
        if serves:
            self._ask(self.store.set, key, f"{self.host} {free_port()}")
        while not self._ask(self.store.check, [key]):
            if self.alarmed(start):
                return None
            self.beat()
            time.sleep(LOOK_SECONDS)
        host, port = self._ask(self.store.get, key).decode().split()
        return MeetingPoint(host, int(port), serves=False)

    def alarm(self, start: int) -> None:
        """Tell all that ranks of this start have failed."""
        self._ask(self.store.set, f"{start}/alarm", "")

    def alarmed(self, start: int) -> bool:
        """Whether any of them has."""
        return self._ask(self.store.check, [f"{start}/alarm"])

    def conclude(self, start: int, outcome: Outcome) -> None:
        """Say how the ranks of this node have ended."""
        self._ask(self.store.set, f"{start}/outcome of {self.node}", outcome.to_json())

    def outcome(self, start: int, node: int) -> Outcome | None:
        """What a node has concluded; None where it has not yet."""
        key = f"{start}/outcome of {node}"
        return Outcome.from_json(self._ask(self.store.get, key).decode()) if self._ask(self.store.check, [key]) else None

    def part(self) -> None:
        """Return when all have heard of the end: the first one, which serves the store, goes last."""
        if not self.leads:
            with suppress(dist.DistError, LostContactError):  # the first one is gone already, as it did not wait any longer
                self._ask(self.store.add, "parted", 1)
            return
        end = time.monotonic() + self.silence_seconds
        while self._ask(self.store.add, "parted", 0) < self.nodes - 1 - len(self.lost) and time.monotonic() < end:
            self.beat()
            time.sleep(LOOK_SECONDS)


def joint_code(codes: Iterable[int]) -> int:
    """One exit code for several processes that have ended by themselves: the one that says most about what to do.

    A death by signal counts as LOST; so does an orderly end beside a failure. Defects of ours (1, say) go before LOST.
    """
    codes = {LOST if code < 0 else code for code in codes}
    for code in NEVER_AGAIN:
        if code in codes:
            return code
    if codes <= {0}:
        return 0
    if codes <= {0, STOPPED}:
        return STOPPED
    return min(codes - {0, STOPPED, LOST}, default=LOST)


def free_port() -> int:
    """A TCP port of this host that nobody has at the moment."""
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]
