"""Buffers of gradients on their way between the data ranks (parallel/zero/buckets.py, traffic.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llama.config import RunConfig
from megatron_llama.plan.block_memory import Platform
from megatron_llama.plan.situations import Situation
from megatron_llama.plan.state_memory import BYTES, FP32, BucketSize
from parallel.zero.traffic import REDUCTIONS_UNDER_WAY

ORDER = ("head", "norm", "w2", "w13", "wo", "wqkv", "embedding")  # in which a backward pass completes gradients
UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Reduction:
    """What reducing a rank's gradients holds besides. `per_element`: bytes of a bucket under way; `limit`: how many may be.

    `every_pass`: buckets leave in every backward pass, not in the last one only, and are of `gradient_bytes` per element while
    they fill.
    """

    per_element: float
    limit: int
    every_pass: bool
    overlap: bool
    gradient_bytes: int

    def leaves(self, one: Situation) -> bool:
        """Whether buckets leave in the action, and hold anything then."""
        if not (self.per_element and self.overlap) or one.kind not in "BW":
            return False
        return one.last or self.every_pass

    def under_way(self, left: Sequence[int], starts: bool) -> float:
        """The bytes of buckets that have left, whose sizes come in the order of their leaving; `starts`: the last does now."""
        count = (self.limit if self.overlap else 0) + starts
        return self.per_element * sum(left[-count:]) if count else 0.0

    def begun(self, buckets: Sequence[BucketSize]) -> float:
        """The bucket that fills from the head to the embedding, whose table is one, where it is not there between passes."""
        tied = [one.size for one in buckets if one.tied and not one.replicated]
        return self.gradient_bytes * sum(tied) if self.every_pass else 0.0


def reduction(config: RunConfig, shards: int, copies: int, platform: Platform) -> Reduction:
    """Of the configuration's engine, its state split over `shards` ranks and kept `copies` times.

    A reduce-scatter that adds up in fp32 what came in fewer bits, or any on gloo, is an exchange of as many bytes as are sent;
    messages in fewer bits than gradients are kept in are copies. In stage 2 the sent buffer stays, and the sum comes beside.
    Where shards are added up over their copies, that waits for the exchange once the next bucket leaves.
    """
    zero = config.zero
    gradient = BYTES[zero.gradient_dtype]
    wire = min(gradient, BYTES[zero.reduce_dtype])
    every_pass = zero.stage == 2
    exchanged = wire if platform.exchanges or wire != FP32 else 0
    per_element = float(gradient) if every_pass else 0.0
    if shards > 1:
        per_element += FP32 / shards if every_pass else 0.0
        per_element += exchanged + (wire if wire != gradient else 0)
    elif copies > 1 and wire != FP32:
        per_element += 2 * wire + FP32 / copies
    limit = REDUCTIONS_UNDER_WAY if every_pass or wire != gradient else UNLIMITED
    if shards > 1 and copies > 1 and not every_pass:
        limit = min(limit, 1)
    return Reduction(per_element, limit, every_pass, zero.overlap, gradient)


def in_order(buckets: Sequence[BucketSize]) -> list[BucketSize]:
    """Those that leave in a backward pass, in the order in which it fills them."""
    return sorted((one for one in buckets if not one.replicated), key=lambda one: (-one.block, ORDER.index(one.use)))
