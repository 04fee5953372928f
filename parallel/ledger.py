"""The ledger: what a rank has sent, and the latest call it made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from parallel.heartbeat import Heartbeat


@dataclass
class Ledger:
    """Bytes that this rank has sent and calls it has made, by (kind, axis name), since the last `clear`.

    Bytes are those of the ring algorithm: all-reduce `2 (n-1)/n` of the tensor, all-gather and reduce-scatter `(n-1)/n` of the
    whole, send and broadcast its size (a broadcast's receivers send nothing). `last` names the latest call: the breadcrumb
    after a hang, and `heartbeat` shows it to a supervisor.
    """

    sent_bytes: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)
    last: str = "none"
    heartbeat: Heartbeat = field(default_factory=Heartbeat, repr=False, compare=False)

    def record(self, kind: str, axis_name: str, ranks: tuple[int, ...], sent_bytes: int) -> None:
        """Note a call over the axis of these ranks that is about to start."""
        self.sent_bytes[kind, axis_name] += sent_bytes
        self.calls[kind, axis_name] += 1
        self.heartbeat.call(kind, axis_name, ranks)
        self.last = f"{kind} over {axis_name} {ranks}, {sent_bytes} bytes, call {self.calls[kind, axis_name]}"

    def clear(self) -> None:
        self.sent_bytes.clear()
        self.calls.clear()
