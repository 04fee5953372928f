"""What a rank sends in one step, by kind of message, axis and link."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.groups import Axis, ProcessGroups

NODE, NETWORK = "node", "network"
TO_NEIGHBOURS = ("send", "receive")  # messages to the next and the previous rank of their axis; all others concern all ranks


@dataclass(frozen=True)
class Traffic:
    """Calls of one `kind` over one axis of `size` ranks, and the bytes that this rank has sent in them over `link`."""

    kind: str
    axis: str
    size: int
    link: str
    calls: int
    sent_bytes: int


def traffic(groups: ProcessGroups, gpus_per_node: int) -> list[Traffic]:
    """What the ledger of `groups` holds, the most bytes first. Bytes are those of ring algorithms (`parallel.ledger`)."""
    axes = {axis.name: axis for axis in _axes(groups)}
    found = []
    for (kind, name), calls in groups.ledger.calls.items():
        link = _link(kind, axes[name], gpus_per_node)
        found.append(Traffic(kind, name, axes[name].size, link, calls, groups.ledger.sent_bytes[kind, name]))
    return sorted(found, key=lambda one: (-one.sent_bytes, one.kind, one.axis))


def _axes(groups: ProcessGroups) -> Iterator[Axis]:
    yield from (value for value in vars(groups).values() if isinstance(value, Axis))
    yield from groups.replicas.values()


def _link(kind: str, axis: Axis, gpus_per_node: int) -> str:
    """`node` where all ranks that a message concerns are on this rank's node: a ring is as slow as its slowest hop."""
    concerned = axis.ranks
    if kind in TO_NEIGHBOURS:
        concerned = tuple(axis.ranks[(axis.rank + step) % axis.size] for step in (-1, 0, 1))
    return NODE if len({rank // gpus_per_node for rank in concerned}) == 1 else NETWORK
