"""RMSNorm, also of a residual sum, as Triton kernels: each pass reads its inputs once and writes its results once.

The weight's gradient is that of this rank's tokens; under sequence parallelism the engine adds up the ranks'. Every program
sums the rows that fall to it, and the sums of the programs are added in a fixed order: the same bits each time.

Signatures and twins: `rms_norm` and `add_rms_norm` of `parallel.kernels.reference_kernels`.

Legend: s sequence, b micro-batch, t tokens = s b, h hidden, p programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MAX_PROGRAMS = 512  # of a backward pass: enough to fill a GPU, few enough for their sums [p, h] to be small


@triton.jit
def _forward_kernel(x, delta, weight, total, y, scale, hidden, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One token. With ADD its norm is of x + delta, as rounded to their dtype, which goes to `total`."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    dtype = x.dtype.element_ty
    values = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)  # fp32: statistics
    if ADD:
        values += tl.load(delta + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(dtype)
        tl.store(total + row + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 0) / hidden + eps)
    tl.store(scale + token, inverse)
    normed = (values * inverse).to(dtype).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row + column, (normed * w).to(dtype), mask=inside)


@triton.jit
def _backward_kernel(dy, dtotal, x, weight, scale, dx, dweight, tokens, hidden, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Every p-th token: dx = (g - n mean(g n)) scale (+ dtotal) with n = x scale, g = dy weight; and this program's sum of
    dy n."""
    program = tl.program_id(0).to(tl.int64)  # so that places in large tensors are 64-bit
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for token in range(program, tokens, tl.num_programs(0)):
        place = token * hidden + column
        inverse = tl.load(scale + token)
        normed = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * inverse
        gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        sums += gradient * normed
        gradient *= w
        result = (gradient - normed * (tl.sum(gradient * normed, 0) / hidden)) * inverse
        if ADD:
            result += tl.load(dtotal + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + program * hidden + column, sums, mask=inside)


def _launch_options(hidden: int) -> dict[str, int]:
    """A token is one block; about 16 of its values to a thread."""
    block = triton.next_power_of_2(hidden)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed values, the values themselves, and 1 / rms of each token [t] fp32."""
    hidden = x.shape[-1]
    tokens = x.numel() // hidden
    x = x.contiguous()
    y, scale = torch.empty_like(x), torch.empty(tokens, dtype=torch.float32, device=x.device)
    total = x if delta is None else torch.empty_like(x)
    other = x if delta is None else delta.contiguous()
    _forward_kernel[(tokens,)](x, other, weight, total, y, scale, hidden, eps, ADD=delta is not None, **_launch_options(hidden))
    return y, total, scale


def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:  # [s, b, h] three times, [h], [t] -> [s, b, h], [h]
    hidden = x.shape[-1]
    tokens = x.numel() // hidden
    programs = min(MAX_PROGRAMS, tokens)
    dy, dx = dy.contiguous(), torch.empty_like(x)
    dweight = torch.empty((programs, hidden), dtype=torch.float32, device=x.device)
    other = dy if dtotal is None else dtotal.contiguous()
    _backward_kernel[(programs,)](
        dy, other, x, weight, scale, dx, dweight, tokens, hidden, ADD=dtotal is not None, **_launch_options(hidden)
    )
    return dx, dweight.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """forward: y = n w, n = x / rms(x)                         [s, b, h]
    dgrad:   dx = (g - n mean(g n)) / rms(x), g = dy w          [s, b, h]
    wgrad:   dw = sum over s and b of dy n                      [h]
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, x, scale = _forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_backward(dy, None, *ctx.saved_tensors), None


class _AddRMSNorm(torch.autograd.Function):
    """forward: total = residual + delta, y = n w, n = total / rms(total)               [s, b, h]
    dgrad:   of both inputs, dtotal + (g - n mean(g n)) / rms(total), g = dy w          [s, b, h]
    wgrad:   dw = sum over s and b of dy n                                              [h]
    """

    @staticmethod
    def forward(ctx: FunctionCtx, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total, scale = _forward(residual, delta, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dtotal: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        dx, dweight = _backward(dy, dtotal, *ctx.saved_tensors)
        return dx, dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [s, b, h], [h] -> [s, b, h]
    """x / sqrt(mean(x^2) + eps) * weight. Source: Zhang and Sennrich 2019, equation 4."""
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # [s, b, h] twice, [h] -> [s, b, h] twice
    """residual + delta, and its `rms_norm`."""
    return _AddRMSNorm.apply(residual, delta, weight, eps)
