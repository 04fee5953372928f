"""V-Half and V-Min: two chunks per rank in a V, activations of half or a third of 1F1B's micro-batches.

A building block says when one micro-batch's F and I run on each rank, in units of F = I = W; it repeats every six units (F, I
and W of two chunks). How long a block keeps an activation, and with it the memory, follows from its slopes: the units from one
rank to the next. Source: Qi et al. 2024 (Pipeline Parallelism with Controllable Memory, arXiv 2405.15362).
"""

from __future__ import annotations

from itertools import product

from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules.action import Action, Schedule
from parallel.pipeline.schedules.zero_bubble import fill_with_weight_gradients

PERIOD = 6
PASSES = (("F", 0), ("F", 1), ("I", 1), ("I", 0))  # (kind, chunk), in the order in which a micro-batch goes through them


def v_half(placement: Placement, micro_batches: int) -> Schedule:
    """V-Half: at most (pp + 2) // 2 micro-batches' activations (twice as many of chunks), about half of 1F1B's bubble."""
    return _repeat((2, 1, 2, 1), placement, micro_batches, 2 * ((placement.pp + 2) // 2))


def v_min(placement: Placement, micro_batches: int) -> Schedule:
    """V-Min: at most (pp + 4) // 3 micro-batches' activations (twice as many of chunks), about two thirds of 1F1B's bubble."""
    return _repeat((1, 1, 1, 1), placement, micro_batches, 2 * ((placement.pp + 4) // 3))


def _repeat(slopes: tuple[int, ...], placement: Placement, micro_batches: int, limit: int) -> Schedule:
    """The order of the repeated building block; waiting times shrink, and W fills what is left of them."""
    assert (placement.chunks, placement.kind) == (2, "v"), "v-half and v-min have two chunks per rank in a V"
    orders = []
    for times in _building_block(placement.pp, slopes):
        timed = [
            (time + PERIOD * m, Action(kind, m, chunk))
            for time, (kind, chunk) in zip(times, PASSES, strict=True)
            for m in range(micro_batches)
        ]
        orders.append([action for _, action in sorted(timed)])
    return fill_with_weight_gradients(orders, placement, limit)


def _building_block(pp: int, slopes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Per rank, the start of each of PASSES: the shortest block whose repetitions never want a rank at the same time."""
    for pauses in sorted(product(range(PERIOD), repeat=len(PASSES) - 1), key=sum):
        block = [_starts(rank, pp, slopes, (*pauses, 0)) for rank in range(pp)]
        if all(len({time % PERIOD for time in times}) == len(PASSES) for times in block):
            return block
    raise AssertionError(f"no building block for {pp} ranks and slopes {slopes}")


def _starts(rank: int, pp: int, slopes: tuple[int, ...], pauses: tuple[int, ...]) -> tuple[int, ...]:
    """A micro-batch goes down the ranks, up, and both again backwards, with a pause of some units where it turns."""
    starts = []
    turned = 0
    for index, (slope, pause) in enumerate(zip(slopes, pauses, strict=True)):
        ranks_before = rank if index % 2 == 0 else pp - 1 - rank
        starts.append(turned + slope * ranks_before)
        turned += slope * (pp - 1) + 1 + pause
    return tuple(starts)
