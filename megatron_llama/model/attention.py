"""Causal self-attention with grouped kv heads, split over tensor ranks by heads.

Legend: s sequence, b micro-batch, h hidden, n heads, k kv heads, d head dim; /tp = split over tensor ranks.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron_llama.model.build import ModelContext
from megatron_llama.model.rope import Places
from parallel.recompute import recompute
from parallel.tensor.linear import Column, ColumnParallelLinear, RowParallelLinear, column_shard, row_shard


def kv_replicas(num_kv_heads: int, tp_size: int) -> int:
    """How many tensor ranks share one kv head: more than 1 where there are fewer kv heads than ranks."""
    return max(1, tp_size // num_kv_heads)


class Attention(nn.Module):
    """x [s/tp, b, h] -> [s/tp, b, h]: fused q|k|v projection, RoPE, causal attention, output projection."""

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        model, tp = context.model, context.groups.tp
        self.head_dim = model.hidden_size // model.num_heads
        self.local_heads = model.num_heads // tp.size
        replicas = kv_replicas(model.num_kv_heads, tp.size)
        self.local_kv_heads = model.num_kv_heads * replicas // tp.size
        self.kernels, self.selective = context.kernels, context.recompute == "selective"
        kv_rows = model.num_kv_heads * self.head_dim
        columns = [
            Column(f"layers.{layer}.attention.wq", model.num_heads * self.head_dim),
            Column(f"layers.{layer}.attention.wk", kv_rows, replicas, "kv"),
            Column(f"layers.{layer}.attention.wv", kv_rows, replicas, "kv"),
        ]
        inner = model.num_heads * self.head_dim
        wqkv = context.parameter(column_shard(model.hidden_size, columns, tp))
        wo = context.parameter(row_shard(f"layers.{layer}.attention.wo", inner, model.hidden_size, tp))
        linear = tp, context.sequence_parallel, context.kernels, context.queue, context.tp_overlap
        self.wqkv, self.wo = ColumnParallelLinear(wqkv, *linear), RowParallelLinear(wo, *linear)

    def forward(self, x: Tensor, places: Places) -> Tensor:  # [s/tp, b, h] -> [s/tp, b, h]
        qkv = self.wqkv(x)  # [s, b, (n + 2k) d/tp]
        core = recompute(self._core, qkv, places) if self.selective and self.training else self._core(qkv, places)
        return self.wo(core)

    def _core(self, qkv: Tensor, places: Places) -> Tensor:  # [s, b, (n + 2k) d/tp] -> [s, b, n d/tp]
        s, b, _ = qkv.shape
        kernels = self.kernels
        q, k, v = kernels.qkv_rope(qkv, places.cos, places.sin, self.local_heads, self.local_kv_heads, kernels.rope)
        return kernels.attention(q, k, v, places.documents).reshape(s, b, -1)
