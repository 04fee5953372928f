"""What an optimizer does to flat fp32 tensors: AdamW, plain SGD and the L2 norm, each as torch does it.

The updates take lists of flat tensors of equal length, one per shard, and change weights and moments in place. Gradients are
divided by `grad_scale`, and nothing changes where `found_inf` is 1: both are device scalars, so that the host need not know
them. Gradients may be changed too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

ROW = 1 << 14  # elements whose squares torch may add up one after the other in fp32

Tensors = Sequence[Tensor]


def adamw(
    masters: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    step: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    found_inf: Tensor,
) -> None:
    """AdamW with decoupled weight decay, one kernel for all tensors. `step` (fp32 scalar): this update's number, from 1.

    Source: Loshchilov and Hutter 2019, algorithm 2, with a constant schedule multiplier.
    """
    torch._fused_adamw_(
        masters,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [step] * len(masters),
        lr=learning_rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def adamw_reference(
    masters: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    step: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    found_inf: Tensor,
) -> None:
    """The same in plain torch, formula by formula."""
    applied = found_inf == 0
    mean_correction, square_correction = 1 - beta1**step, 1 - beta2**step
    for master, grad, exp_avg, exp_avg_sq in zip(masters, grads, exp_avgs, exp_avg_sqs, strict=True):
        gradient = grad / grad_scale
        mean = beta1 * exp_avg + (1 - beta1) * gradient
        square = beta2 * exp_avg_sq + (1 - beta2) * gradient.square()
        direction = (mean / mean_correction) / ((square / square_correction).sqrt() + eps)
        updated = master * (1 - learning_rate * weight_decay) - learning_rate * direction
        for old, new in ((master, updated), (exp_avg, mean), (exp_avg_sq, square)):
            old.copy_(torch.where(applied, new, old))


def sgd(masters: Tensors, grads: Tensors, *, learning_rate: float, grad_scale: Tensor, found_inf: Tensor) -> None:
    """Gradient descent without momentum or weight decay."""
    torch._fused_sgd_(
        masters,
        grads,
        [],
        lr=learning_rate,
        weight_decay=0.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def l2_norm(tensors: Tensors) -> Tensor:
    """The norm of all elements of one or more flat fp32 tensors together (fp64 scalar)."""
    return get_total_norm([part for tensor in tensors for part in _row_norms(tensor)]).double()


def l2_norm_reference(tensors: Tensors) -> Tensor:
    """The same with squares and sums in fp64."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()


def _row_norms(tensor: Tensor) -> tuple[Tensor, ...]:  # flat
    """Tensors that together have the tensor's norm: the norms of its rows of ROW elements, and what is left over.

    On CPUs torch's norm of a whole tensor keeps a few fp32 sums: 4e-4 too small for 10 million elements, 2e-2 for 160.
    """
    rows = tensor.numel() // ROW
    if rows < 2:
        return (tensor,)
    whole, rest = tensor.split([rows * ROW, tensor.numel() - rows * ROW])
    return torch.linalg.vector_norm(whole.view(rows, ROW), dim=1), rest
