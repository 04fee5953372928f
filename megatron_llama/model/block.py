"""One decoder block, and the norm it uses.

Legend: s sequence, b micro-batch, h hidden; /tp = split over tensor ranks.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron_llama.model.attention import Attention
from megatron_llama.model.build import ModelContext
from megatron_llama.model.mlp import FeedForward
from megatron_llama.model.rope import Places
from parallel.shards import Box, Replica, Segment, Shard


def replicated_shard(name: str, shape: tuple[int, ...], context: ModelContext) -> Shard:
    """The place of a parameter that every tensor rank holds whole, and that is not decayed.

    Under sequence parallelism each rank sees its tokens only, so the copies' gradients are parts to be summed.
    """
    tp, replica = context.groups.tp, None
    if tp.size > 1:
        replica = Replica("tp", tp.rank, tp.size, partial_gradient=context.sequence_parallel)
    return Shard(shape, (Segment(name, shape, Box.whole(shape), Box.whole(shape), replica),), decay=False)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim: [s/tp, b, h] -> [s/tp, b, h]."""

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        self.eps, self.kernels = context.model.norm_eps, context.kernels
        self.weight = context.parameter(replicated_shard(name, (context.model.hidden_size,), context), ones=True)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # [s/tp, b, h] each
        """The norm of x; with a `residual`, residual + x and the norm of that. One entrance: engines wait there for weights."""
        if residual is None:
            return self.kernels.rms_norm(x, self.weight, self.eps)
        return self.kernels.add_rms_norm(residual, x, self.weight, self.eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): [s/tp, b, h] -> [s/tp, b, h]."""

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(context, f"layers.{layer}.attention_norm")
        self.attention = Attention(context, layer)
        self.ffn_norm = RMSNorm(context, f"layers.{layer}.ffn_norm")
        self.feed_forward = FeedForward(context, layer)

    def forward(self, x: Tensor, places: Places) -> Tensor:  # [s/tp, b, h] -> [s/tp, b, h]
        x, normed = self.ffn_norm(self.attention(self.attention_norm(x), places), x)
        return x + self.feed_forward(normed)
