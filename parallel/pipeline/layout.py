"""Which layers form which stage, and which rank holds which stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """The map of global stages to (pp rank, chunk). `pp * chunks` stages, in the order of the layers.

    `loop`: stage s is chunk s // pp of rank s % pp (Megatron's interleaving; with one chunk the plain pipeline).
    `v`: the same, but every odd chunk runs from the last rank back to the first.
    """

    pp: int
    chunks: int = 1
    kind: str = "loop"

    def __post_init__(self) -> None:
        assert self.kind in ("loop", "v"), self.kind

    @property
    def num_stages(self) -> int:
        return self.pp * self.chunks

    def rank(self, stage: int) -> int:
        """The pp rank that holds `stage`."""
        turn, place = divmod(stage, self.pp)
        return self.pp - 1 - place if self.kind == "v" and turn % 2 else place

    def chunk(self, stage: int) -> int:
        """The index of `stage` among its rank's chunks."""
        return stage // self.pp

    def stage(self, rank: int, chunk: int) -> int:
        """The global stage that is chunk `chunk` of pp rank `rank`."""
        place = self.pp - 1 - rank if self.kind == "v" and chunk % 2 else rank
        return chunk * self.pp + place

    @property
    def embedding_ranks(self) -> tuple[int, int]:
        """pp ranks of the first and of the last stage."""
        return self.rank(0), self.rank(self.num_stages - 1)


def split_layers(num_layers: int, num_stages: int, wanted: str | Sequence[int] = "auto") -> list[range]:
    """The layers of each global stage.

    `wanted` is the number of layers per stage in global order, or "auto": as even as can be, the stages in the middle
    taking the remainder (the first and last also hold the embedding and the head). Raises ConfigError where the numbers
    don't fit.
    """
    if num_layers < num_stages:
        raise ConfigError(
            f"model.num_layers = {num_layers} is less than the {num_stages} pipeline stages (parallel.pp x parallel.chunks): "
            f"set parallel.pp or parallel.chunks so that there are at most {num_layers} stages"
        )
    if wanted == "auto":
        base, extra = divmod(num_layers, num_stages)
        first = (num_stages - extra) // 2
        counts = [base + (first <= stage < first + extra) for stage in range(num_stages)]
    else:
        counts = [int(count) for count in wanted]
        if len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 1:
            raise ConfigError(
                f"parallel.layers_per_stage = {counts} must be {num_stages} numbers of at least 1 (parallel.pp x "
                f"parallel.chunks) that sum to model.num_layers = {num_layers}; they are {len(counts)} and sum to {sum(counts)}"
            )
    starts = [sum(counts[:stage]) for stage in range(num_stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
