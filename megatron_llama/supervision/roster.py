"""Which nodes and devices the ranks run on, start after start: those that fail repeatedly give way to spare ones.

A *slot* is the place of a rank on a node: a device, where there are GPUs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

STRIKES = 2  # failures in a row on one node after which the slots that failed are the last to be used

Share = tuple[int, tuple[int, ...]]  # a node, and its slots in the order of their ranks


@dataclass(frozen=True)
class Plan:
    """What all supervisors do next: start ranks on these shares, in the order of the ranks; or end, with this code."""

    shares: tuple[Share, ...] = ()
    code: int | None = None

    @property
    def nodes(self) -> list[int]:
        return [node for node, _ in self.shares]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        fields = json.loads(text)
        return cls(tuple((node, tuple(slots)) for node, slots in fields["shares"]), fields["code"])


@dataclass(frozen=True)
class Outcome:
    """How the ranks of one node have ended: their joint exit code, and where a failure began as far as that node can see.

    `kind`: that of the incident, "death", "hang" or "elsewhere"; empty where there was none. `slot`: of the rank that it began
    with; None where that rank only died of another's death.
    """

    code: int
    kind: str = ""
    slot: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        return cls(**json.loads(text))


class Roster:
    """Deals out the slots: `ranks` of the `slots` that each of the nodes 0 to `nodes` - 1 has, on `needed` of them."""

    def __init__(self, nodes: int, needed: int, slots: int, ranks: int) -> None:
        self.nodes, self.needed, self.slots, self.ranks = nodes, needed, slots, ranks
        self._strikes: dict[int, list[int]] = {}  # per node the slots that have failed since the last progress
        self._suspect: Counter[tuple[int, int]] = Counter()  # how often a (node, slot) failed before it was set aside
        self._lost: set[int] = set()

    def deal(self) -> tuple[Share, ...]:
        """The next start's shares, one per node, ordered by node; empty where too few nodes are left.

        The slots that were set aside come last: they are used again where there is nothing else.
        """
        shares = {node: self._best_slots(node) for node in range(self.nodes) if node not in self._lost}
        if len(shares) < self.needed:
            return ()
        chosen = sorted(shares, key=lambda node: (self._doubts(node, shares[node]), node))[: self.needed]
        return tuple((node, shares[node]) for node in sorted(chosen))

    def lose(self, node: int) -> None:
        """The supervisor of that node is gone."""
        self._lost.add(node)

    def hear(self, outcomes: Mapping[int, Outcome], progress: bool) -> None:
        """Take in how a start has ended on its nodes; `progress`: there is a new checkpoint since the one before."""
        if progress:
            self._strikes.clear()
        for node, slot in _where_it_began(outcomes):
            failed = self._strikes.setdefault(node, [])
            failed.append(slot)
            if len(failed) >= STRIKES:
                self._suspect.update((node, slot) for slot in failed)
                failed.clear()

    def _best_slots(self, node: int) -> tuple[int, ...]:
        slots = sorted(range(self.slots), key=lambda slot: (self._suspect[node, slot], slot))
        return tuple(sorted(slots[: self.ranks]))

    def _doubts(self, node: int, slots: Iterable[int]) -> int:
        return sum(self._suspect[node, slot] for slot in slots)


def _where_it_began(outcomes: Mapping[int, Outcome]) -> list[tuple[int, int]]:
    """Nodes and slots to blame: those of ranks that have died by themselves; where there are none, those that hang.

    (While one rank dies, others stand still.)
    """
    for kind in ("death", "hang"):
        of_kind = {node: outcome.slot for node, outcome in outcomes.items() if outcome.kind == kind}
        found = [(node, slot) for node, slot in of_kind.items() if slot is not None]
        if found:
            return found
    return []
