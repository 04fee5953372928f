"""The rotary embedding of a fused q|k|v projection as one Triton kernel each way, which splits, rotates and lays out
for attention.

Legend: s sequence, b micro-batch, n heads, k kv heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MAX_HEADS = 32  # of one step of a program


@triton.jit
def _rotate(first, second, cos, sin, is_rotated):
    """Turn pairs by their angles; those of v stay."""
    cos = tl.where(is_rotated, cos, 1.0)
    sin = tl.where(is_rotated, sin, 0.0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _forward_kernel(
    qkv, cos, sin, out, s, b, rotated, heads, d, table_b, token_stride, BLOCK: tl.constexpr, HALF: tl.constexpr
):
    """One token [heads, d] of qkv to its places in out [b, heads, s, d]; the first `rotated` heads are turned."""
    token = tl.program_id(0)
    position = token // b
    sample = token % b
    column = tl.arange(0, HALF)[None, :]
    half = d // 2
    table = (position * table_b + sample % table_b) * half + column
    cosines = tl.load(cos + table, mask=column < half, other=0.0)
    sines = tl.load(sin + table, mask=column < half, other=0.0)
    for start in range(0, heads, BLOCK):
        head = start + tl.arange(0, BLOCK)[:, None]
        inside = (head < heads) & (column < half)
        source = qkv + token.to(tl.int64) * token_stride + head * d + column
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # fp32: tables and rotation
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        first, second = _rotate(first, second, cosines, sines, head < rotated)
        target = out + ((sample * heads + head).to(tl.int64) * s + position) * d + column
        tl.store(target, first.to(out.dtype.element_ty), mask=inside)
        tl.store(target + half, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_heads(pointer, position, sample, head, column, s_stride, b_stride, n_stride, inside):
    place = position.to(tl.int64) * s_stride + sample.to(tl.int64) * b_stride + head * n_stride + column
    return tl.load(pointer + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _backward_kernel(
    dq, dk, dv, cos, sin, dqkv, b, n, k, d, table_b,
    q_s, q_b, q_n, k_s, k_b, k_n, v_s, v_b, v_n,
    BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token of dq, dk and dv, each by its strides, turned back and packed into dqkv [s, b, n + 2k, d]."""
    token = tl.program_id(0)
    position = token // b
    sample = token % b
    column = tl.arange(0, HALF)[None, :]
    half = d // 2
    heads = n + 2 * k
    table = (position * table_b + sample % table_b) * half + column
    cosines = tl.load(cos + table, mask=column < half, other=0.0)
    sines = tl.load(sin + table, mask=column < half, other=0.0)
    for start in range(0, heads, BLOCK):
        head = start + tl.arange(0, BLOCK)[:, None]
        inside = (head < heads) & (column < half)
        is_q = inside & (head < n)
        is_k = inside & (head >= n) & (head < n + k)
        is_v = inside & (head >= n + k)
        first = _load_heads(dq, position, sample, head, column, q_s, q_b, q_n, is_q)
        first += _load_heads(dk, position, sample, head - n, column, k_s, k_b, k_n, is_k)
        first += _load_heads(dv, position, sample, head - n - k, column, v_s, v_b, v_n, is_v)
        second = _load_heads(dq, position, sample, head, column + half, q_s, q_b, q_n, is_q)
        second += _load_heads(dk, position, sample, head - n, column + half, k_s, k_b, k_n, is_k)
        second += _load_heads(dv, position, sample, head - n - k, column + half, v_s, v_b, v_n, is_v)
        first, second = _rotate(first, second, cosines, -sines, head < n + k)
        target = dqkv + token.to(tl.int64) * heads * d + head * d + column
        tl.store(target, first.to(dqkv.dtype.element_ty), mask=inside)
        tl.store(target + half, second.to(dqkv.dtype.element_ty), mask=inside)


def _launch_options(heads: int, d: int) -> dict[str, Any]:
    return {"BLOCK": min(MAX_HEADS, triton.next_power_of_2(heads)), "HALF": triton.next_power_of_2(d // 2)}


class _QkvRope(torch.autograd.Function):
    """forward: q = R q, k = R k, v = v, R the rotation of each pair by its angle; [s, b, (n + 2k) d] -> [s, b, n, d] and so on
    dgrad:   dqkv = (R^-1 dq, R^-1 dk, dv)
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, b, width = qkv.shape
        total = heads + 2 * kv_heads
        d = width // total
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        out = qkv.new_empty((b, total, s, d))
        _forward_kernel[(s * b,)](
            qkv, cos, sin, out, s, b, heads + kv_heads, total, d, cos.shape[1], width, **_launch_options(total, d)
        )
        ctx.save_for_backward(cos, sin)
        return out.permute(2, 0, 1, 3).split([heads, kv_heads, kv_heads], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (s, b, n, d), k = dq.shape, dk.shape[2]
        gradients = [x if x.stride(3) == 1 else x.contiguous() for x in (dq, dk, dv)]
        strides = [stride for x in gradients for stride in x.stride()[:3]]
        dqkv = dq.new_empty((s, b, (n + 2 * k) * d))
        _backward_kernel[(s * b,)](
            *gradients, cos, sin, dqkv, b, n, k, d, cos.shape[1], *strides, **_launch_options(n + 2 * k, d)
        )
        return dqkv, None, None, None, None


def qkv_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, rotate: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # [s, b, (n + 2k) d], [s, b or 1, d/2] fp32 twice -> [s, b, n, d], [s, b, k, d] twice
    """q, k and v of a fused projection, q and k rotated (half-split order). They lie in memory as [b, n, s, d], each sample's
    heads one after the other, which is how attention reads them. `rotate`, for providers that only split, is not used.

    Source: Su et al. 2021, equation 34.
    """
    return _QkvRope.apply(qkv, cos, sin, heads, kv_heads)
