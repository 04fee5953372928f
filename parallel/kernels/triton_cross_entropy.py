"""The two passes of a cross entropy over logits as Triton kernels: one read of the logits, then one read and write in place.

Signatures and twins: `parallel.kernels.cross_entropy_kernels`. Source of the one-pass sum: Milakov and Gimelshein 2018,
algorithm 3.

Legend: t tokens, c columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.cross_entropy_kernels import CrossEntropyKernels, no_columns

MAX_BLOCK = 4096  # columns of one step
NUM_WARPS = 8


@triton.jit
def _statistics_kernel(logits, targets, found, tokens, columns, row_stride, BLOCK: tl.constexpr):
    """One token: maximum and sum of exponentials (fp32), corrected whenever the maximum grows."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * row_stride
    top = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(row + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(values, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(values - new_top), 0)
        top = new_top
    target = tl.load(targets + token)
    here = (target >= 0) & (target < columns)
    tl.store(found + token, top)
    tl.store(found + tokens + token, total)
    tl.store(found + 2 * tokens + token, tl.load(row + target, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(logits, targets, log_sum, scale, columns, row_stride, BLOCK: tl.constexpr):
    """Some columns of one token: logits become (softmax - onehot(target)) * scale."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + token.to(tl.int64) * row_stride + column
    inside = column < columns
    softmax = tl.exp(tl.load(place, mask=inside).to(tl.float32) - tl.load(log_sum + token))
    gradient = tl.where(column == tl.load(targets + token), softmax - 1.0, softmax) * tl.load(scale + token)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


def _block(columns: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(columns))


def _statistics(logits: Tensor, targets: Tensor) -> Tensor:  # [t, c], [t] -> [3, t]
    tokens, columns = logits.shape
    if columns == 0:
        return no_columns(targets)
    assert logits.stride(1) == 1 and targets.is_contiguous()
    found = torch.empty((3, tokens), dtype=torch.float32, device=logits.device)
    size = _block(columns)
    _statistics_kernel[(tokens,)](logits, targets, found, tokens, columns, logits.stride(0), BLOCK=size, num_warps=NUM_WARPS)
    return found


def _gradient_(logits: Tensor, targets: Tensor, log_sum: Tensor, scale: Tensor) -> None:
    tokens, columns = logits.shape
    if columns == 0:
        return
    assert logits.stride(1) == 1 and targets.is_contiguous()
    size = _block(columns)
    _gradient_kernel[(tokens, triton.cdiv(columns, size))](
        logits, targets, log_sum.contiguous(), scale.contiguous(), columns, logits.stride(0), BLOCK=size, num_warps=NUM_WARPS
    )


FUSED = CrossEntropyKernels(_statistics, _gradient_)
