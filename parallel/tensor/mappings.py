"""Conjugate pairs of communication in autograd: what one does forward, its partner does backward.

| mapping            | forward                     | backward                    | conjugate          |
|--------------------|-----------------------------|-----------------------------|--------------------|
| copy_to_tensor     | identity                    | all-reduce                  | reduce_from_tensor |
| reduce_from_tensor | all-reduce                  | identity                    | copy_to_tensor     |
| gather_sequence    | all-gather along s          | reduce-scatter along s      | scatter_sequence   |
| scatter_sequence   | reduce-scatter along s      | all-gather along s          | gather_sequence    |

Source: Megatron-LM, Shoeybi et al. 2019, figure 3 (f and g); Korthikanti et al. 2022, figure 5 (g and its conjugate).

Legend: s sequence, b micro-batch, h hidden; /tp = split over tensor ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from parallel.collectives import all_gather, all_reduce, reduce_scatter
from parallel.groups import Axis


class _CopyToTensor(torch.autograd.Function):
    """forward: y = x. dgrad: dx = all-reduce(dy). [s, b, h] -> [s, b, h]"""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        return all_reduce(dy.clone(memory_format=torch.contiguous_format), ctx.tp), None


class _ReduceFromTensor(torch.autograd.Function):
    """forward: y = all-reduce(x). dgrad: dx = dy. [s, b, h] -> [s, b, h]"""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, tp: Axis) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), tp)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _GatherSequence(torch.autograd.Function):
    """forward: y = all-gather(x). dgrad: dx = reduce-scatter(dy). [s/tp, b, h] -> [s, b, h]"""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return all_gather(x, tp)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(dy, ctx.tp), None


class _ScatterSequence(torch.autograd.Function):
    """forward: y = reduce-scatter(x). dgrad: dx = all-gather(dy). [s, b, h] -> [s/tp, b, h]"""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return reduce_scatter(x, tp)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        return all_gather(dy, ctx.tp), None


def copy_to_tensor(x: Tensor, tp: Axis) -> Tensor:  # [s, b, h] -> [s, b, h]
    """Enter a tensor-parallel region: the same x on each rank, its gradients summed."""
    return x if tp.size == 1 else _CopyToTensor.apply(x, tp)


def reduce_from_tensor(x: Tensor, tp: Axis) -> Tensor:  # [s, b, h] -> [s, b, h]
    """Leave a tensor-parallel region: partial sums of each rank, added up."""
    return x if tp.size == 1 else _ReduceFromTensor.apply(x, tp)


def gather_sequence(x: Tensor, tp: Axis) -> Tensor:  # [s/tp, b, h] -> [s, b, h]
    """Enter a tensor-parallel region from a sequence-parallel one."""
    return x if tp.size == 1 else _GatherSequence.apply(x, tp)


def scatter_sequence(x: Tensor, tp: Axis) -> Tensor:  # [s, b, h] -> [s/tp, b, h]
    """Leave a tensor-parallel region into a sequence-parallel one: partial sums added up, each rank keeps its tokens."""
    return x if tp.size == 1 else _ScatterSequence.apply(x, tp)
