"""Cross entropy of logits that are split over the vocabulary.

Legend: s sequence, b micro-batch, v vocabulary; /tp = split over tensor ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from parallel.collectives import all_reduce
from parallel.groups import Axis


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    """loss = log(sum exp(logits)) - logits[target], in fp32.

    forward: all-reduce(max) [s, b], then one all-reduce(sum) [2, s, b] of (sum of exponentials, target's logit)
    dgrad:   dlogits = (softmax - onehot(target)) * dloss; the softmax is made again from the saved logits, nothing is sent
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor, vocabulary: int, tp: Axis) -> Tensor:
        local_rows = logits.shape[-1]
        start = min(tp.rank * local_rows, vocabulary)
        real = min(local_rows, vocabulary - start)  # columns beyond are padding
        values = logits[..., :real].float()  # fp32: the loss and its softmax
        top = values.amax(-1) if real else values.new_full(targets.shape, float("-inf"))
        all_reduce(top, tp, dist.ReduceOp.MAX)
        local = targets - start
        outside = (local < 0) | (local >= real)
        local = local.masked_fill(outside, 0)
        target_logit = torch.zeros_like(top)
        if real:
            target_logit = values.gather(-1, local[..., None])[..., 0].masked_fill(outside, 0.0)
        sums = torch.stack([(values - top[..., None]).exp_().sum(-1), target_logit])
        all_reduce(sums, tp)
        log_sum = sums[0].log() + top
        ctx.save_for_backward(logits, log_sum, local, outside)
        ctx.real = real
        return log_sum - sums[1]

    @staticmethod
    def backward(ctx: FunctionCtx, dloss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, log_sum, local, outside = ctx.saved_tensors
        real = ctx.real
        if not real:
            return torch.zeros_like(logits), None, None, None
        softmax = (logits[..., :real].float() - log_sum[..., None]).exp_()
        softmax.scatter_add_(-1, local[..., None], -(~outside)[..., None].to(softmax.dtype))
        dlogits = softmax.mul_(dloss[..., None]).to(logits.dtype)
        padding = logits.shape[-1] - real
        return F.pad(dlogits, (0, padding)) if padding else dlogits, None, None, None


def vocabulary_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocabulary: int, tp: Axis) -> Tensor:
    """Loss of each token: logits [s, b, v/tp], targets [s, b] (ids below `vocabulary`) -> [s, b] fp32, equal on all ranks.

    Logits of padded vocabulary rows are ignored and get a zero gradient.
    """
    return _VocabularyParallelCrossEntropy.apply(logits, targets, vocabulary, tp)
