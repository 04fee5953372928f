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

    `wanted` is the number of layers per stage in global order (`balance_layers` finds numbers that count the embedding and
    the head), or "auto": as even as can be, the stages in the middle taking the remainder. Raises ConfigError where the
    numbers don't fit.
    """
    if num_layers < num_stages:
        raise ConfigError(
            f"model.num_layers = {num_layers} is less than the {num_stages} pipeline stages (parallel.pp x parallel.chunks): "
            f"set parallel.pp or parallel.chunks so that there are at most {num_layers} stages"
        )
    if wanted == "auto":
        counts = balance_layers(num_layers, Placement(num_stages))
    else:
        counts = [int(count) for count in wanted]
        if len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 1:
            raise ConfigError(
                f"parallel.layers_per_stage = {counts} must be {num_stages} numbers of at least 1 (parallel.pp x "
                f"parallel.chunks) that sum to model.num_layers = {num_layers}; they are {len(counts)} and sum to {sum(counts)}"
            )
    starts = [sum(counts[:stage]) for stage in range(num_stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def balance_layers(num_layers: int, placement: Placement, embedding: float = 0.0, head: float = 0.0) -> list[int]:
    """The number of layers of each global stage that makes the slowest rank as fast as can be, a rank's stages evened out.

    `embedding` and `head` (with the loss): their costs in units of one layer; the first and the last stage bear them. Each
    stage gets a layer at least. Where places are equally good, layers go to the middle.
    """
    num_stages = placement.num_stages
    assert num_layers >= num_stages, f"{num_layers} layers for {num_stages} stages"
    counts = [1] * num_stages
    stage_costs = [1.0] * num_stages
    stage_costs[0] += embedding
    stage_costs[-1] += head
    rank_costs = [0.0] * placement.pp
    for stage, cost in enumerate(stage_costs):
        rank_costs[placement.rank(stage)] += cost
    from_the_middle = sorted(range(num_stages), key=lambda stage: abs(2 * stage - num_stages + 1))
    for _ in range(num_layers - num_stages):
        stage = min(from_the_middle, key=lambda stage: (rank_costs[placement.rank(stage)], stage_costs[stage]))
        counts[stage] += 1
        stage_costs[stage] += 1.0
        rank_costs[placement.rank(stage)] += 1.0
    return counts
