"""Torch kernels with backward passes of their own: fewer passes over memory, and fewer tensors kept, than autograd makes.

The operations are those of `parallel.kernels.torch_kernels`, which are the references. Kept for the backward pass are x (norm),
the tables (rope) and gate_up (swiglu), and nothing else of their size.

Legend: s sequence, b micro-batch, h hidden, n heads, d head dim, f ffn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _RMSNorm(torch.autograd.Function):
    """forward: y = n w, n = x / rms(x)                         [s, b, h]
    dgrad:   dx = (g - n mean(g n)) / rms(x), g = dy w          [s, b, h]
    wgrad:   dw = sum over s and b of dy n                      [h]
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # fp32: statistics
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)  # [s, b, 1]
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # fp32, as all that follows
        dy = dy.float()
        dweight = (dy * normed).flatten(0, -2).sum(0)
        dx = dy * weight
        mean = (dx * normed).mean(-1, keepdim=True)
        dx = dx.addcmul_(normed, mean, value=-1.0).mul_(scale)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [s, b, h], [h] -> [s, b, h]
    """x / sqrt(mean(x^2) + eps) * weight. Source: Zhang and Sennrich 2019, equation 4."""
    return _RMSNorm.apply(x, weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:  # [s, b, n, d], [s, b or 1, d/2] twice
    """Turn each pair by its angle (sign 1) or back (sign -1)."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x.float().chunk(2, dim=-1)  # fp32: tables and rotation
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    y_first, y_second = y.chunk(2, dim=-1)
    torch.mul(first, cos, out=y_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=y_second).addcmul_(first, sin, value=sign)
    return y.to(x.dtype)


class _Rope(torch.autograd.Function):
    """forward: y = R x, R the rotation of each pair by its angle. dgrad: dx = R^-1 dy, the rotation back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(dy, *ctx.saved_tensors, -1.0), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [s, b, n, d], [s, b or 1, d/2] fp32 -> [s, b, n, d]
    """Rotate each pair (x[j], x[j + d/2]) by its angle (half-split order). Source: Su et al. 2021, equation 34."""
    return _Rope.apply(x, cos, sin)


class _SwiGLU(torch.autograd.Function):
    """forward: y = silu(gate) up                               [s, b, f]
    dgrad:   dgate = dy up silu'(gate), dup = dy silu(gate)     [s, b, 2f]; silu(gate) is made again
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return dgate_up


def swiglu(gate_up: Tensor) -> Tensor:  # [s, b, 2f] -> [s, b, f]
    """silu(gate) * up, gate being the first half. Source: Shazeer 2020, equation 6."""
    return _SwiGLU.apply(gate_up)
