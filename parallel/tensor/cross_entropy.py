"""Cross entropy of logits that are split over the vocabulary.

Legend: s sequence, b micro-batch, t tokens, v vocabulary; /tp = split over tensor ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from parallel.collectives import all_gather
from parallel.groups import Axis
from parallel.kernels.cross_entropy_kernels import BLOCKED, CrossEntropyKernels


def _local_columns(columns: int, vocabulary: int, tp: Axis) -> tuple[int, int]:
    """The token id of this rank's first column, and how many of its columns are no padding."""
    start = min(tp.rank * columns, vocabulary)
    return start, min(columns, vocabulary - start)


def token_losses(
    logits: Tensor, targets: Tensor, vocabulary: int, tp: Axis, kernels: CrossEntropyKernels
) -> tuple[Tensor, Tensor]:  # [t, v/tp], [t] -> [t], [t]
    """Each token's loss and the logarithm of its sum of exponentials, fp32, the same bits on all ranks.

    One all-gather: each rank's maximum, sum of exponentials below it, and target's logit, [3, t] fp32.
    """
    start, real = _local_columns(logits.shape[1], vocabulary, tp)
    statistics = kernels.statistics(logits[:, :real], targets - start)
    parts = all_gather(statistics, tp).view(tp.size, 3, -1)
    top = parts[:, 0].amax(0)
    log_sum = ((parts[:, 0] - top).exp_() * parts[:, 1]).sum(0).log_().add_(top)
    return log_sum - parts[:, 2].sum(0), log_sum


def logits_to_gradients(
    logits: Tensor, targets: Tensor, log_sum: Tensor, scale: Tensor, vocabulary: int, tp: Axis, kernels: CrossEntropyKernels
) -> None:  # [t, v/tp], [t], [t], [t]
    """Overwrite logits by the gradient of sum(scale * loss), which is 0 in padded columns. Nothing is sent."""
    start, real = _local_columns(logits.shape[1], vocabulary, tp)
    kernels.gradient_(logits[:, :real], targets - start, log_sum, scale)
    logits[:, real:].zero_()


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    """loss = log(sum exp(logits)) - logits[target], in fp32.

    forward: one all-gather of [3, s, b] statistics
    dgrad:   dlogits = (softmax - onehot(target)) * dloss, in place of the saved logits; nothing is sent
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, targets: Tensor, vocabulary: int, tp: Axis, kernels: CrossEntropyKernels
    ) -> Tensor:
        losses, log_sum = token_losses(logits.flatten(0, -2), targets.flatten(), vocabulary, tp, kernels)
        ctx.save_for_backward(logits, targets, log_sum)
        ctx.vocabulary, ctx.tp, ctx.kernels = vocabulary, tp, kernels
        return losses.view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum = ctx.saved_tensors
        dlogits = logits.detach()
        rows, columns = dlogits.flatten(0, -2), targets.flatten()
        logits_to_gradients(rows, columns, log_sum, dloss.flatten(), ctx.vocabulary, ctx.tp, ctx.kernels)
        return dlogits, None, None, None, None


def vocabulary_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, vocabulary: int, tp: Axis, kernels: CrossEntropyKernels = BLOCKED
) -> Tensor:
    """Loss of each token: logits [s, b, v/tp], targets [s, b] (ids below `vocabulary`) -> [s, b] fp32, equal on all ranks.

    Logits (contiguous) of padded vocabulary rows are ignored and get a zero gradient. The backward pass overwrites logits by
    their gradient, so nobody else may use them there; autograd raises an error where somebody else kept them.
    """
    assert logits.is_contiguous()
    return _VocabularyParallelCrossEntropy.apply(logits, targets, vocabulary, tp, kernels)


def triton_cross_entropy(logits: Tensor, targets: Tensor, vocabulary: int, tp: Axis) -> Tensor:
    """The same by our Triton kernels."""
    from parallel.kernels.triton_cross_entropy import FUSED  # needs the package triton

    return vocabulary_parallel_cross_entropy(logits, targets, vocabulary, tp, FUSED)
