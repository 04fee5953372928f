"""The ledger: what a rank has sent, and the latest call it made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from parallel.heartbeat import Heartbeat
from parallel.waiting import WaitClock

LISTED_RANKS = 8  # in a message


@dataclass
class Ledger:
    """Bytes that this rank has sent and calls it has made, by (kind, axis name), since the last `clear`.

    Bytes are those of the ring algorithm: all-reduce `2 (n-1)/n` of the tensor, all-gather and reduce-scatter `(n-1)/n` of the
    whole, send and broadcast its size (a broadcast's receivers send nothing). `last` names the latest call: the breadcrumb
    after a failure; `heartbeat` shows it to a supervisor. `clock` measures waits.
    """

    sent_bytes: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)
    _last: tuple[str, str, tuple[int, ...], int, int] | None = None
    heartbeat: Heartbeat = field(default_factory=Heartbeat, repr=False, compare=False)
    clock: WaitClock = field(default_factory=WaitClock, repr=False, compare=False)

    def record(self, kind: str, axis_name: str, ranks: tuple[int, ...], sent_bytes: int) -> None:
        """Note a call over the axis of these ranks that is about to start."""
        key = kind, axis_name
        self.sent_bytes[key] += sent_bytes
        self.calls[key] += 1
        self.heartbeat.call(kind, axis_name, ranks)
        self._last = kind, axis_name, ranks, sent_bytes, self.calls[key]

    @property
    def last(self) -> str:
        if self._last is None:
            return "none"
        kind, axis_name, ranks, sent_bytes, number = self._last
        return f"{kind} over {axis_name} {_listed(ranks)}, {sent_bytes} bytes, call {number}"

    def clear(self) -> None:
        self.sent_bytes.clear()
        self.calls.clear()


def _listed(ranks: tuple[int, ...]) -> str:
    """The ranks of an axis; of many the ends, as they are evenly spaced."""
    if len(ranks) <= LISTED_RANKS:
        return str(ranks)
    return f"({ranks[0]}, {ranks[1]}, ... {ranks[-1]}: {len(ranks)} ranks)"
