"""What the supervisors of several nodes tell each other, through a store that the first one serves."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from megatron_llama.program import INTERRUPTED, LOST, STOPPED, USER_ERROR
from parallel.launchers import MeetingPoint

NEVER_AGAIN = (USER_ERROR, 2, INTERRUPTED)  # what somebody has to mend first, wrong usage, Ctrl-C
PATIENCE = timedelta(seconds=120)  # of a supervisor whose ranks have ended, with the others


class Supervisors:
    """The supervisors of all nodes, as the one of node `node` sees them. One alone needs no `store`.

    `host` is this node's name for the others. Each start of the ranks has a number, and keys of its own in the store. The
    methods raise DistError where the first supervisor is gone, or one that is waited for.
    """

    def __init__(self, node: int = 0, nodes: int = 1, host: str = "127.0.0.1", store: dist.Store | None = None) -> None:
        self.node, self.nodes, self.host = node, nodes, host
        self.store = dist.HashStore() if store is None else store

    def meeting_point(self, start: int) -> MeetingPoint:
        """Where the ranks of this start meet: a free port of the first node."""
        key = f"{start}/meeting point"
        if self.node == 0:
            self.store.set(key, f"{self.host} {_free_port()}")
        host, port = self.store.get(key).decode().split()
        return MeetingPoint(host, int(port), serves=False)

    def alarm(self, start: int) -> None:
        """Tell all that ranks of this start have failed."""
        self.store.set(f"{start}/alarm", "")

    def alarmed(self, start: int) -> bool:
        """Whether any of them has."""
        return self.store.check([f"{start}/alarm"])

    def agree(self, start: int, code: int) -> int:
        """The exit code of the whole start, once the ranks of all nodes have ended; those of this node did so with `code`."""
        keys = [f"{start}/code of {node}" for node in range(self.nodes)]
        self.store.set(keys[self.node], str(code))
        self.store.wait(keys, PATIENCE)
        return joint_code(int(self.store.get(key)) for key in keys)

    def go_on(self, start: int, wanted: bool) -> bool:
        """Whether the ranks are to be started again: what the first supervisor wants."""
        key = f"{start}/go on"
        if self.node == 0:
            self.store.set(key, "yes" if wanted else "no")
        return self.store.get(key) == b"yes"


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


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]
