"""The SwiGLU feed-forward layer, split over tensor ranks by its inner dim.

Legend: s sequence, b micro-batch, h hidden, f ffn; /tp = split over tensor ranks.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron_llama.model.build import ModelContext
from parallel.recompute import recompute
from parallel.tensor.linear import Column, ColumnParallelLinear, RowParallelLinear, column_shard, row_shard


class FeedForward(nn.Module):
    """x [s/tp, b, h] -> [s/tp, b, h]: w2 (silu(w1 x) * w3 x), w1 (gate) and w3 (up) fused."""

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        model, tp = context.model, context.groups.tp
        self.kernels, self.selective = context.kernels, context.recompute == "selective"
        name = f"layers.{layer}.feed_forward"
        columns = [Column(f"{name}.w1", model.ffn_hidden_size), Column(f"{name}.w3", model.ffn_hidden_size)]
        w13 = context.parameter(column_shard(model.hidden_size, columns, tp))
        w2 = context.parameter(row_shard(f"{name}.w2", model.ffn_hidden_size, model.hidden_size, tp))
        linear = tp, context.sequence_parallel, context.kernels, context.queue, context.tp_overlap
        self.w13, self.w2 = ColumnParallelLinear(w13, *linear), RowParallelLinear(w2, *linear)

    def forward(self, x: Tensor) -> Tensor:  # [s/tp, b, h] -> [s/tp, b, h]
        gate_up = self.w13(x)  # [s, b, 2f/tp]
        swiglu = self.kernels.swiglu
        return self.w2(recompute(swiglu, gate_up) if self.selective and self.training else swiglu(gate_up))
