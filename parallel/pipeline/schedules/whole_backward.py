"""Schedules of whole backward passes: GPipe, 1F1B, interleaved 1F1B; and forward passes alone."""

from __future__ import annotations

from parallel.errors import ConfigError
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules.action import Action, Schedule


def forward_only(placement: Placement, micro_batches: int) -> Schedule:
    """Evaluation and generation: each micro-batch through every stage, in order."""
    return [
        [Action("F", m, chunk) for m in range(micro_batches) for chunk in range(placement.chunks)] for _ in range(placement.pp)
    ]


def gpipe(placement: Placement, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes. Keeps every micro-batch's activations.

    Source: Huang et al. 2019 (GPipe), figure 2c; the backward passes run first to last here.
    """
    assert placement.chunks == 1, "gpipe has one chunk per rank"
    batches = range(micro_batches)
    return [[Action("F", m) for m in batches] + [Action("B", m) for m in batches] for _ in range(placement.pp)]


def one_forward_one_backward(placement: Placement, micro_batches: int) -> Schedule:
    """1F1B: after `pp - 1 - rank` forward passes to fill the pipeline, one forward and one backward in turn.

    Rank r keeps the activations of at most `pp - r` micro-batches.
    Source: Narayanan et al. 2021 (PipeDream-Flush), section 2.2.
    """
    assert placement.chunks == 1, "1f1b has one chunk per rank"
    forward = [Action("F", m) for m in range(micro_batches)]
    backward = [Action("B", m) for m in range(micro_batches)]
    return [_alternate(forward, backward, placement.pp - 1 - rank) for rank in range(placement.pp)]


def interleaved(placement: Placement, micro_batches: int, group_size: int | None = None) -> Schedule:
    """Interleaved 1F1B: 1F1B over `chunks` stages per rank, `group_size` (default pp) micro-batches of a chunk at a time.

    With at least pp micro-batches the bubble is that of 1F1B over the number of chunks, whether or not groups divide them: the
    remainder is spread over the groups, so none is shorter than `group_size`. Rank 0 keeps
    `2 pp - 1 + (chunks - 1) * (longest group)` chunk activations at most; a larger group keeps more, and gives each message
    more time. Source: Narayanan et al. 2021, section 2.2, with the warm-up of its implementation, Megatron-LM.
    """
    pp, chunks = placement.pp, placement.chunks
    assert placement.kind == "loop", "interleaved goes around the ranks"
    size = pp if group_size is None else group_size
    if size < pp:
        raise ConfigError(
            f"the micro-batch group size {size} of parallel.schedule = interleaved is below parallel.pp = {pp}: set it to {pp}"
        )
    forward: list[Action] = []
    backward: list[Action] = []
    groups = _groups(micro_batches, size)
    for group in groups:
        forward += [Action("F", m, chunk) for chunk in range(chunks) for m in group]
        backward += [Action("B", m, chunk) for chunk in reversed(range(chunks)) for m in group]
    fill = (chunks - 1) * max(map(len, groups))
    return [_alternate(forward, backward, 2 * (pp - 1 - rank) + fill) for rank in range(pp)]


def _groups(micro_batches: int, size: int) -> list[range]:
    """Consecutive micro-batches in groups of `size` or a few more, as even as can be; one group if there are too few."""
    count = max(1, micro_batches // size)
    ends = [micro_batches * (index + 1) // count for index in range(count)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _alternate(forward: list[Action], backward: list[Action], warm_up: int) -> list[Action]:
    """`warm_up` forward passes, then one forward and one backward in turn, then the backward passes that are left."""
    warm_up = min(warm_up, len(forward))
    actions = forward[:warm_up]
    for pair in zip(forward[warm_up:], backward, strict=False):
        actions += pair
    return actions + backward[len(forward) - warm_up :]
