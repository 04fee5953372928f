"""What a cross entropy does to logits: one pass that measures them, and one that turns them into their gradient.

Nothing is sent here: `parallel.tensor.cross_entropy` puts the parts of the tensor ranks together. Targets are columns of
these logits; one that is outside belongs to another rank.

Legend: t tokens, c columns, the real ones of this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CPU_BLOCK_BYTES = 4 * 2**20  # of fp32 values made at once: they stay in a core's cache
GPU_BLOCK_BYTES = 64 * 2**20  # about the size of the L2 cache; fewer blocks are fewer launches


class CrossEntropyKernels(NamedTuple):
    """The two passes.

    `statistics(logits [t, c], targets [t]) -> [3, t]` fp32: each token's largest logit, the sum of exp(logit - largest), and
    its target's logit, which is 0 where that is another rank's. Without columns: -inf, 0 and 0.

    `gradient_(logits [t, c], targets [t], log_sum [t], scale [t])` overwrites logits by (softmax - onehot(target)) * scale,
    `log_sum` (fp32) being the logarithm of the sum of exponentials over all ranks' columns, `scale` (fp32) each token's weight
    in the loss.
    """

    statistics: Callable[[Tensor, Tensor], Tensor]
    gradient_: Callable[[Tensor, Tensor, Tensor, Tensor], None]


def no_columns(targets: Tensor) -> Tensor:  # [t] -> [3, t]
    """The statistics of a rank that has nothing but padding."""
    found = torch.zeros((3, len(targets)), dtype=torch.float32, device=targets.device)
    found[0] = float("-inf")
    return found


def locate(targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:  # [t] -> [t, 1] bool, [t, 1]
    """Which targets are columns here, and an index that is safe to look up for all of them."""
    here = (targets >= 0) & (targets < columns)
    return here[:, None], targets.clamp(0, columns - 1)[:, None]


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Runs of tokens whose fp32 values fit the cache."""
    tokens, columns = logits.shape
    size = max(1, (CPU_BLOCK_BYTES if logits.is_cpu else GPU_BLOCK_BYTES) // (4 * columns))
    return (slice(start, start + size) for start in range(0, tokens, size))


def _statistics(logits: Tensor, targets: Tensor) -> Tensor:  # [t, c], [t] -> [3, t]
    if logits.shape[1] == 0:
        return no_columns(targets)
    found = torch.empty((3, len(targets)), dtype=torch.float32, device=logits.device)
    for block in _blocks(logits):
        top = logits[block].amax(-1).float()
        found[0, block] = top
        torch.sum(torch.sub(logits[block], top[:, None]).exp_(), -1, out=found[1, block])  # fp32, as `top` is
    here, column = locate(targets, logits.shape[1])
    found[2] = logits.gather(1, column).masked_fill(~here, 0.0)[:, 0]
    return found


def _gradient_(logits: Tensor, targets: Tensor, log_sum: Tensor, scale: Tensor) -> None:
    if logits.shape[1] == 0:
        return
    here, column = locate(targets, logits.shape[1])
    minus_one = -here.float()
    for block in _blocks(logits):
        values = torch.sub(logits[block], log_sum[block, None]).exp_()  # fp32, as `log_sum` is
        values.scatter_add_(1, column[block], minus_one[block])
        torch.mul(values, scale[block, None], out=logits[block])


# Some tokens at a time: fp32 values never exist for all of them, and stay in a cache.
BLOCKED = CrossEntropyKernels(_statistics, _gradient_)
