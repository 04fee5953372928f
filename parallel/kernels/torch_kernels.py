"""Torch kernels with backward passes of their own: fewer passes over memory, and fewer tensors kept, than autograd makes.

The operations are those of `parallel.kernels.reference_kernels`. Kept for the backward pass are x (norm), the tables (rope) and
gate_up (swiglu), and nothing else of their size.

Legend: s sequence, b micro-batch, h hidden, n heads, d head dim, f ffn, o outputs, i inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # [s, b, h], [h] -> [s, b, h], [s, b, 1]
    """The normed x times the weight, and 1 / rms(x) in fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # fp32: statistics
    scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    return (x * scale).to(x.dtype).mul_(weight), scale


def _normalize_backward(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x before its last factor, `scale`, in fp32 [s, b, h], and that of the weight [h]."""
    normed = x * scale  # fp32, as all that follows
    dy = dy.float()
    dweight = (dy * normed).flatten(0, -2).sum(0)
    dx = dy * weight
    mean = (dx * normed).mean(-1, keepdim=True)
    return dx.addcmul_(normed, mean, value=-1.0), dweight.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """forward: y = n w, n = x / rms(x)                         [s, b, h]
    dgrad:   dx = (g - n mean(g n)) / rms(x), g = dy w          [s, b, h]
    wgrad:   dw = sum over s and b of dy n                      [h]
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dx, dweight = _normalize_backward(x, weight, scale, dy)
        return dx.mul_(scale).to(x.dtype), dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [s, b, h], [h] -> [s, b, h]
    """x / sqrt(mean(x^2) + eps) * weight; on GPUs torch's fused kernel. Source: Zhang and Sennrich 2019, equation 4."""
    return F.rms_norm(x, weight.shape, weight, eps) if x.is_cuda else _RMSNorm.apply(x, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    """forward: t = residual + delta, y = rms_norm(t)           [s, b, h]
    dgrad:   dresidual = ddelta = dt + (the norm's dx), the two added before they are rounded
    wgrad:   as in `_RMSNorm`
    """

    @staticmethod
    def forward(ctx: FunctionCtx, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = residual + delta
        y, scale = _normalize(total, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dtotal: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight, scale = ctx.saved_tensors
        dx, dweight = _normalize_backward(total, weight, scale, dy)
        dx = torch.addcmul(dtotal.float(), dx, scale).to(total.dtype)
        return dx, dx, dweight, None


def add_rms_norm(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # [s, b, h] twice, [h] -> [s, b, h] twice
    """residual + delta, and its `rms_norm`."""
    if residual.is_cuda:
        total = residual + delta
        return total, F.rms_norm(total, weight.shape, weight, eps)
    return _AddRMSNorm.apply(residual, delta, weight, eps)


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


def wgrad(main_grad: Tensor, x: Tensor, dy: Tensor) -> None:  # [o, i] fp32 or as x, [t, i], [t, o]
    """main_grad += dy^T x, the product kept in fp32."""
    if x.dtype == main_grad.dtype:
        main_grad.addmm_(dy.t(), x)
    elif x.is_cpu:
        main_grad.addmm_(dy.t().float(), x.float())
    else:
        torch.addmm(main_grad, dy.t(), x, out_dtype=torch.float32, out=main_grad)
