"""The rank grid: pure arithmetic, `grid = arange(world).reshape(pp, dp, cp, tp)`.

The fastest-running axis is tp (its collectives are the most frequent, so its ranks are neighbours), the slowest pp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Coordinates:
    """One rank's place on the grid."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Topology:
    """Sizes of the four mesh axes and what follows from them."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @cached_property
    def grid(self) -> np.ndarray:
        """Global ranks as an array [pp, dp, cp, tp]."""
        return np.arange(self.world_size).reshape(self.pp, self.dp, self.cp, self.tp)

    def coordinates(self, rank: int) -> Coordinates:
        assert 0 <= rank < self.world_size, f"rank {rank} is not on a grid of {self.world_size}"
        return Coordinates(*(int(i) for i in np.unravel_index(rank, self.grid.shape)))

    def rank(self, place: Coordinates) -> int:
        return int(self.grid[place.pp, place.dp, place.cp, place.tp])

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """All groups of ranks that differ only along `axes` (one name, or several for a combined axis), in rank order.

        Example: `Topology(pp=2, tp=2).groups("tp") == [(0, 1), (2, 3)]`.
        """
        moved = [AXES.index(axis) for axis in axes]
        kept = [d for d in range(len(AXES)) if d not in moved]
        size = int(np.prod([self.grid.shape[d] for d in moved]))
        rows = self.grid.transpose(*kept, *sorted(moved)).reshape(-1, size)
        return [tuple(int(r) for r in row) for row in rows]

    def subgroups(self, axis: str, size: int) -> list[tuple[int, ...]]:
        """Each group of `axis` cut into runs of `size` consecutive ranks (replicas of kv heads, say)."""
        return [g[i : i + size] for g in self.groups(axis) for i in range(0, len(g), size)]

    def __str__(self) -> str:
        return f"pp {self.pp} x dp {self.dp} x cp {self.cp} x tp {self.tp} = {self.world_size} ranks"
