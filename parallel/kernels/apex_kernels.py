"""NVIDIA Apex's extension modules (its source of July 2026) behind the table's signatures.

The compiled modules are called as they are: Apex's Python package has no wrapper for some of them any more, and its name may
belong to another project. All are positional.

Legend: s sequence, b micro-batch, h hidden, n heads, d head dim, v vocabulary, o outputs, i inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from parallel.groups import Axis


class _RMSNorm(torch.autograd.Function):
    """`rms_forward_affine_mixed_dtypes` and `rms_backward_affine`: x and weight may differ in dtype, statistics are fp32."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        import fused_layer_norm_cuda

        x, ctx.eps = x.contiguous(), eps
        y, scale = fused_layer_norm_cuda.rms_forward_affine_mixed_dtypes(x, weight.shape, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        import fused_layer_norm_cuda

        x, weight, scale = ctx.saved_tensors
        recompute_x = False  # from y, Apex's "memory efficient" mode
        dx, dweight = fused_layer_norm_cuda.rms_backward_affine(
            dy.contiguous(), scale, x, weight.shape, weight, ctx.eps, recompute_x
        )
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [s, b, h], [h] -> [s, b, h]
    """RMSNorm by `fused_layer_norm_cuda`, which takes an fp32 weight beside bf16 activations too."""
    return _RMSNorm.apply(x, weight, eps)


class _Rope(torch.autograd.Function):
    """`forward_cached` and `backward_cached`, which rotate halves by tables [s, 1, 1, d] that name each angle twice."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        import fused_rotary_positional_embedding

        ctx.save_for_backward(cos, sin)
        transpose_output = False
        return fused_rotary_positional_embedding.forward_cached(x, cos, sin, transpose_output)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None, None]:
        import fused_rotary_positional_embedding

        transpose_output = False
        return fused_rotary_positional_embedding.backward_cached(dy, *ctx.saved_tensors, transpose_output), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [s, b, n, d], [s, b or 1, d/2] fp32 -> [s, b, n, d]
    """Where samples have tables of their own, sequence and batch are one long sequence: Apex knows one table for all."""
    cos, sin = (torch.cat([table, table], dim=-1) for table in (cos, sin))
    if cos.shape[1] == 1:
        return _Rope.apply(x, cos[:, :, None], sin[:, :, None])
    tables = (table.flatten(0, 1)[:, None, None] for table in (cos, sin))
    return _Rope.apply(x.flatten(0, 1)[:, None], *tables).view(x.shape)


def wgrad(main_grad: Tensor, x: Tensor, dy: Tensor) -> None:  # [o, i] fp32, [t, i], [t, o]
    """One cuBLAS call that adds the product to main_grad; all three are read as contiguous."""
    import fused_weight_gradient_mlp_cuda

    assert main_grad.is_contiguous()
    fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x.contiguous(), dy.contiguous(), main_grad)


class _CrossEntropy(torch.autograd.Function):
    """`forward` and `backward` of the extension. Apex's Python class, which isn't used, drops the targets with id 0."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:  # [t, v], [t] -> [t] fp32
        import xentropy_cuda

        smoothing, half_to_float = 0.0, logits.dtype == torch.float16
        losses, log_sum = xentropy_cuda.forward(logits, targets, smoothing, half_to_float)
        ctx.save_for_backward(logits, log_sum, targets)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor) -> tuple[Tensor, None]:
        import xentropy_cuda

        smoothing = 0.0
        return xentropy_cuda.backward(dloss.contiguous(), *ctx.saved_tensors, smoothing), None


def cross_entropy(logits: Tensor, targets: Tensor, vocabulary: int, tp: Axis) -> Tensor:  # [s, b, v], [s, b] -> [s, b] fp32
    """The loss of each token by `xentropy_cuda`, which knows whole vocabularies only."""
    assert tp.size == 1
    values = logits.flatten(0, -2)[:, :vocabulary].contiguous()
    return _CrossEntropy.apply(values, targets.flatten()).view(targets.shape)
