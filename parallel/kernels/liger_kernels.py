"""Liger Kernel's Triton functions (liger-kernel 0.8) behind the table's signatures.

Legend: s sequence, b micro-batch, h hidden, n heads, d head dim, f ffn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

IN_PLACE = False  # True would write input gradients over output gradients that others may still read


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [s, b, h], [h] -> [s, b, h]
    """RMSNorm by Liger's Triton kernel, statistics in fp32."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", IN_PLACE)


def add_rms_norm(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # [s, b, h] twice, [h] -> [s, b, h] twice
    """residual + delta, and the RMSNorm of it, in one pass."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    y, total = LigerFusedAddRMSNormFunction.apply(delta, residual, weight, eps, 0.0, "llama", IN_PLACE)
    return total, y


def _rotate(rotation: Callable[..., tuple[Tensor, ...]], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Liger rotates q and k together, batch-first and in place: a copy of x stands for q, one unused head for k."""
    s, b, n, d = x.shape
    q = x.clone(memory_format=torch.contiguous_format).view(1, s * b, n, d).transpose(1, 2)
    k = q.new_zeros(1, s * b, 1, d).transpose(1, 2)
    cos, sin = (table.expand(s, b, d // 2).reshape(1, s * b, d // 2) for table in (cos, sin))
    y, *_ = rotation(q, k, cos, sin, rotary_dim=d)
    return y.transpose(1, 2).view(s, b, n, d)


class _Rope(torch.autograd.Function):
    """`rope_forward` and `rope_backward`."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from liger_kernel.ops.rope import rope_forward

        ctx.save_for_backward(cos, sin)
        return _rotate(rope_forward, x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None, None]:
        from liger_kernel.ops.rope import rope_backward

        return _rotate(rope_backward, dy, *ctx.saved_tensors), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [s, b, n, d], [s, b or 1, d/2] fp32 -> [s, b, n, d]
    """RoPE on a copy of x: Liger's kernel overwrites what it is given."""
    return _Rope.apply(x, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:  # [s, b, 2f] -> [s, b, f]
    """SwiGLU by Liger's Triton kernel."""
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    y = LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(0, -2), IN_PLACE)  # its gradient is 2-d, whatever goes in
    return y.view(*gate_up.shape[:-1], -1)
