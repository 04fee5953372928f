"""Transformer Engine's extension (2.20) behind the table's signatures.

Importing `transformer_engine.pytorch` is what makes `transformer_engine_torch` importable, wherever its file lies.

Legend: s sequence, b micro-batch, h hidden, f ffn, o outputs, i inputs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

SM_MARGIN = 0  # multiprocessors left free for other streams
ZERO_CENTERED = False  # the weight is the factor, not the factor minus 1


def extension() -> ModuleType:
    """The compiled module."""
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch

    return transformer_engine_torch


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # [s, b, h], [h] -> [s, b, h], [s b]
    """The norm of x, and 1 / rms(x)."""
    from transformer_engine.pytorch.constants import TE_DType

    output, quantizer = None, None
    y, _, scale = extension().rmsnorm_fwd(
        x.view(-1, x.shape[-1]), weight, eps, output, quantizer, TE_DType[x.dtype], SM_MARGIN, ZERO_CENTERED
    )
    return y.view(x.shape), scale


class _RMSNorm(torch.autograd.Function):
    """`rmsnorm_fwd` and `rmsnorm_bwd`."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, scale = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        flat = (-1, x.shape[-1])
        dx, dweight = extension().rmsnorm_bwd(
            dy.contiguous().view(flat), x.view(flat), scale, weight, SM_MARGIN, ZERO_CENTERED
        )
        return dx.view(x.shape), dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [s, b, h], [h] -> [s, b, h]
    """RMSNorm by Transformer Engine's extension."""
    return _RMSNorm.apply(x, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    """`rmsnorm_fwd` after an addition, and `rmsnorm_bwd_add`, which adds the residual's gradient in the same pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = (residual + delta).contiguous()
        y, scale = _normalize(total, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dtotal: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight, scale = ctx.saved_tensors
        flat = (-1, total.shape[-1])
        dx, dweight = extension().rmsnorm_bwd_add(
            dy.contiguous().view(flat),
            total.view(flat),
            dtotal.contiguous().view(flat),
            scale,
            weight,
            SM_MARGIN,
            ZERO_CENTERED,
        )
        dx = dx.view(total.shape)
        return dx, dx, dweight, None


def add_rms_norm(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # [s, b, h] twice, [h] -> [s, b, h] twice
    """residual + delta, and the RMSNorm of it; the backward pass adds both gradients in one kernel."""
    return _AddRMSNorm.apply(residual, delta, weight, eps)


class _SwiGLU(torch.autograd.Function):
    """`swiglu` and `dswiglu`; the gate is the first half, as ours."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor) -> Tensor:
        gate_up, quantizer = gate_up.contiguous(), None
        ctx.save_for_backward(gate_up)
        return extension().swiglu(gate_up, quantizer)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> Tensor:
        (gate_up,), quantizer = ctx.saved_tensors, None
        return extension().dswiglu(dy.contiguous(), gate_up, quantizer)


def swiglu(gate_up: Tensor) -> Tensor:  # [s, b, 2f] -> [s, b, f]
    """SwiGLU by Transformer Engine's extension."""
    return _SwiGLU.apply(gate_up)


def wgrad(main_grad: Tensor, x: Tensor, dy: Tensor) -> None:  # [o, i] fp32, [t, i], [t, o]
    """A cuBLASLt GEMM that adds to main_grad. Layout NT of column-major x and dy is dy^T x of row-major ones."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(
        x.contiguous(), dy.contiguous(), out_dtype=torch.float32, accumulate=True, layout="NT", out=main_grad, grad=True
    )
