"""Kernels for meta tensors, which have shapes and no numbers: torch's own, and an attention that makes shapes alone.

Legend: s sequence, b micro-batch, n heads, k kv heads, d head dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.flop_counter import register_flop_formula

from parallel.kernels.documents import Documents
from parallel.kernels.providers import Workload
from parallel.kernels.table import Kernels, resolve_kernels
from parallel.kernels.torch_attention import batch_major

_LIBRARY = torch.library.Library("meta_kernels", "DEF")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
_KEPT = "Tensor q, Tensor k, Tensor v, Tensor y, Tensor sums"
_LIBRARY.define(f"attention_backward(Tensor dy, {_KEPT}) -> (Tensor, Tensor, Tensor)")


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s, b, n, d = q.shape
    y = q.new_empty(b, s, n, d).transpose(0, 1)  # flash attention is batch-first
    return y, q.new_empty(b, n, s, dtype=torch.float32)


def _backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.transpose(0, 1).shape).transpose(0, 1) for x in (q, k, v))
    return dq, dk, dv


_LIBRARY.impl("attention", _forward, "Meta")
_LIBRARY.impl("attention_backward", _backward, "Meta")
_OPERATORS = torch.ops.meta_kernels


@register_flop_formula(_OPERATORS.attention)
def _forward_flops(q: torch.Size, *others: object, **settings: object) -> int:
    """Two products of [s, d] and [d, s] for each head, of which the causal half is made."""
    s, b, n, d = q
    return 2 * b * n * d * s**2


@register_flop_formula(_OPERATORS.attention_backward)
def _backward_flops(dy: torch.Size, *others: object, **settings: object) -> int:
    """Five such products: the scores again, and the gradients of scores, q, k and v."""
    s, b, n, d = dy
    return 5 * b * n * d * s**2


class _Attention(torch.autograd.Function):
    """Shapes as flash attention makes them: for the backward pass q, k, v, y and the logarithms of the softmax's sums."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, sums = _OPERATORS.attention(q, k, v)
        ctx.save_for_backward(q, k, v, y, sums)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _OPERATORS.attention_backward(dy, *ctx.saved_tensors)


def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """What flash attention makes and keeps, and nothing in it. Documents are one after the other, as its kernels want them."""
    if documents is not None:
        s, b = q.shape[:2]
        q, k, v = (batch_major(x).unflatten(0, (b, s)).transpose(0, 1) for x in (q, k, v))
    return _Attention.apply(q, k, v)


def meta_kernels(dtype: torch.dtype, tp_size: int) -> Kernels:
    """The kernels of a process that runs on meta tensors: those of a CPU, and for sdpa the shapes of its flash attention."""
    return replace(resolve_kernels(workload=Workload(torch.device("cpu"), dtype, tp_size)), attention=attention)
