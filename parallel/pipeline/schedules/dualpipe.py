"""DualPipeV: DualPipe cut in half, two chunks per rank in a V."""

from __future__ import annotations

from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules.action import Schedule, actions_of


def dualpipe_v(placement: Placement, micro_batches: int) -> Schedule:
    """DualPipeV: in the steady state each forward pass of one chunk stands beside a backward pass of the other.

    The pairs, which DualPipe runs as one, are an F and then a B here. Only as many backward passes are split as shorten the
    start and the end. At most `2 pp + 1` chunk activations; needs `2 pp` micro-batches. Source: DeepSeek-AI 2024 (DeepSeek-V3
    Technical Report, arXiv 2412.19437), "cut in half" by Sea AI Lab; the phases are those of DualPipe's repository.
    """
    assert (placement.chunks, placement.kind) == (2, "v"), "dualpipe-v has two chunks per rank in a V"
    assert micro_batches >= 2 * placement.pp, "dualpipe-v needs 2 pp micro-batches"
    return [actions_of(_pattern(rank, placement.pp, micro_batches), micro_batches) for rank in range(placement.pp)]


def _pattern(rank: int, pp: int, micro_batches: int) -> str:
    """Fill the pipeline; run pairs of a forward and a backward pass; drain it, the later half with split backward passes."""
    until, behind = rank + 1, pp - 1 - rank  # ranks up to this one and after it
    fill = "F" * (2 * behind) + "Ff" * until + "iWf" * behind
    pairs = "FbfB" * (micro_batches - 2 * pp + until) + "bfB" * behind
    drain = ("bB" * until)[:until] + ("iI" * until)[until:] + "WI" * behind + "W" * until
    return fill + pairs + drain
