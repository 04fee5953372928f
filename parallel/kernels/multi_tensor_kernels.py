"""AdamW and the L2 norm by multi-tensor kernels, whose interface Apex's `amp_C` and Transformer Engine's extension share.

All arguments are positional. The "capturable" AdamW takes learning rate, step and scale from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from parallel.kernels.transformer_engine_kernels import extension as transformer_engine

CHUNK = 2048 * 32  # elements that one thread block works on: what both libraries use
DECOUPLED_DECAY, BIAS_CORRECTION = 1, 1

Tensors = Sequence[Tensor]


def amp_c() -> ModuleType:
    """Apex's compiled module."""
    import amp_C

    return amp_C


def _adamw(
    extension: Callable[[], ModuleType],
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
    """AdamW on all tensors at once. Does nothing where `found_inf` is 1; leaves the divided gradients in `grads`."""
    lists = [[t for t in tensors if t.numel()] for tensors in (grads, masters, exp_avgs, exp_avg_sqs)]
    if not lists[0]:
        return
    extension().multi_tensor_adam_capturable(
        CHUNK,
        found_inf.to(torch.int32).view(1),
        lists,
        step.new_full((1,), learning_rate, dtype=torch.float32),
        beta1,
        beta2,
        eps,
        step.to(torch.int32).view(1),
        DECOUPLED_DECAY,
        BIAS_CORRECTION,
        weight_decay,
        grad_scale.float().reciprocal().view(1),
    )


def _l2_norm(extension: Callable[[], ModuleType], tensors: Tensors) -> Tensor:
    """The norm of all elements together (fp64 scalar), its sums in fp32 by block."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    overflow, of_each_tensor = torch.zeros(1, dtype=torch.int32, device=filled[0].device), False
    norm, _ = extension().multi_tensor_l2norm(CHUNK, overflow, [filled], of_each_tensor)
    return norm.double().squeeze()


def apex_adamw(*tensors: Tensors | Tensor, **settings: float | Tensor) -> None:
    """`multi_tensor_adam_capturable` of `amp_C`; arguments as `optimizer_kernels.adamw`."""
    _adamw(amp_c, *tensors, **settings)


def transformer_engine_adamw(*tensors: Tensors | Tensor, **settings: float | Tensor) -> None:
    """The same of `transformer_engine_torch`."""
    _adamw(transformer_engine, *tensors, **settings)


def apex_l2_norm(tensors: Tensors) -> Tensor:
    """`multi_tensor_l2norm` of `amp_C`."""
    return _l2_norm(amp_c, tensors)


def transformer_engine_l2_norm(tensors: Tensors) -> Tensor:
    """The same of `transformer_engine_torch`."""
    return _l2_norm(transformer_engine, tensors)
