"""The output head and its loss. Where logits would be large they are made, measured and turned into gradients in chunks of
tokens, and never exist whole.

A chunk's gradients are made right after its logits, in the forward pass, so the products are three, as without chunks, and
nothing is recomputed: dx [s, b, h] and dW (fp32, [v/tp, h]) wait for the backward pass, which scales and adds them. Of a head
one dW may wait: a micro-batch whose forward pass finds one waiting (gpipe) leaves its gradients to the backward pass, where
the logits are made again. Both ways make the same bits.

Source: the idea of gradients in the forward pass, Hsu et al. 2024 (Liger Kernel), section 3.2.

Legend: s sequence, b micro-batch, t tokens, h hidden, v vocabulary; /tp = split over tensor ranks.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from parallel.collectives import all_gather, start_all_reduce, start_reduce_scatter
from parallel.groups import Axis
from parallel.kernels.table import Kernels
from parallel.tensor.cross_entropy import logits_to_gradients, token_losses
from parallel.tensor.deferred import WeightGradient, WeightGradientQueue
from parallel.tensor.linear import ColumnParallelLinear
from parallel.tensor.parameter import ShardedParameter

# Logits of one chunk. Each chunk reads and writes all of dW, which on a GPU takes as long as its product where it has a few
# hundred tokens: this is 1000 tokens of LLaMA 3's vocabulary in bf16. On CPUs smaller chunks are no slower.
CHUNK_BYTES = 256 * 2**20


class VocabularyParallelHead(ColumnParallelLinear):
    """x W^T, or the sum of the tokens' losses times `token_weights`: x [s, b, h] ([s/tp, b, h] under sequence parallelism).

    `queue` and `overlap` as in `ColumnParallelLinear`. In chunks the weight gradient does not wait in the queue, but is added
    in I: nothing else is left of it to do. A table that is the embedding too waits all the same, so that its two gradients
    keep their order.
    """

    def __init__(
        self,
        weight: ShardedParameter,  # [v/tp, h], its shard made by `vocabulary_shard`
        vocabulary: int,
        tp: Axis,
        sequence_parallel: bool,
        kernels: Kernels,
        queue: WeightGradientQueue | None = None,
        overlap: str = "backward",
    ) -> None:
        super().__init__(weight, tp, sequence_parallel, kernels, queue, overlap)
        self.vocabulary, self.tp, self.sequence_parallel = vocabulary, tp, sequence_parallel
        self.waiting: weakref.ref[Tensor] | None = None  # the dW between forward and backward pass

    def forward(self, x: Tensor, targets: Tensor | None = None, token_weights: Tensor | None = None) -> Tensor:
        """Logits [s, b, v/tp]; with `targets` and `token_weights` [s, b] the weighted loss [], fp32, equal on all ranks."""
        if targets is None:
            return super().forward(x)
        assert token_weights is not None
        if chunk_tokens(targets.numel(), _logit_bytes(self.weight)) == targets.numel():
            losses = self.kernels.cross_entropy(super().forward(x), targets, self.vocabulary, self.tp)
            return (losses * token_weights).sum()
        if torch.is_grad_enabled():
            return _ChunkedLoss.apply(x, self.weight, self, targets, token_weights)
        return _loss(self, self.gathered(x), targets, token_weights, gradients=None)

    def gathered(self, x: Tensor) -> Tensor:  # [s/tp, b, h] -> [s, b, h]
        return all_gather(x, self.tp) if self.sequence_parallel else x


def chunk_tokens(tokens: int, logit_bytes: int) -> int:
    """Tokens of one chunk: all, or equal parts whose logits, of `logit_bytes` per token, stay below CHUNK_BYTES."""
    most = max(1, CHUNK_BYTES // logit_bytes)
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def _logit_bytes(weight: Tensor) -> int:
    return weight.shape[0] * weight.element_size()


def _loss(
    head: VocabularyParallelHead, x: Tensor, targets: Tensor, token_weights: Tensor, gradients: tuple[Tensor, Tensor] | None
) -> Tensor:  # [s, b, h], [s, b] twice -> []
    """The weighted loss. `gradients` dx [s, b, h] and dW [v/tp, h] (fp32) are filled where they are given; dx is this rank's
    part of a sum."""
    kernels, weight, tp = head.kernels, head.weight, head.tp
    rows, targets, scale = x.flatten(0, -2), targets.flatten(), token_weights.flatten()
    losses = torch.empty_like(scale, dtype=torch.float32)
    size = chunk_tokens(len(rows), _logit_bytes(weight))
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        logits = kernels.fprop(rows[chunk], weight)
        losses[chunk], log_sum = token_losses(logits, targets[chunk], head.vocabulary, tp, kernels.head_loss)
        if gradients is not None:
            dx, dw = gradients
            logits_to_gradients(logits, targets[chunk], log_sum, scale[chunk], head.vocabulary, tp, kernels.head_loss)
            kernels.dgrad(logits, weight, out=dx.flatten(0, -2)[chunk])
            kernels.wgrad(dw, rows[chunk], logits)
    return (losses * scale).sum()


def _new_gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dx, to be filled, and dW, to be added to."""
    return x.new_empty(x.shape), torch.zeros_like(weight, dtype=torch.float32)


def _gradients_again(
    head: VocabularyParallelHead, x: Tensor, targets: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor]:  # [s/tp, b, h], [s, b] twice -> [s, b, h], [v/tp, h]
    """dx and dW of a micro-batch whose forward pass did not make them."""
    full = head.gathered(x)
    gradients = _new_gradients(full, head.weight)
    _loss(head, full, targets, token_weights, gradients)
    return gradients


class _HeadWeightGradient(WeightGradient):
    """dW [v/tp, h] fp32, made already, times the loss's gradient."""

    def __init__(self, weight: ShardedParameter, dw: Tensor, dloss: Tensor) -> None:
        self.weight, self.dw, self.dloss = weight, dw, dloss

    def compute(self) -> Tensor | None:
        if self.weight.sink is None:
            return (self.dw * self.dloss).to(self.weight.dtype)
        self.weight.sink.main_grad.addcmul_(self.dw, self.dloss)
        self.weight.sink.ready()
        return None


class _ChunkedLoss(torch.autograd.Function):
    """loss = sum over tokens of token_weight * (log(sum exp(x W^T)) - (x W^T)[target]), in chunks of tokens.

    forward: all-gather of x under sequence parallelism; per chunk one of the cross entropy's statistics [3, t]
    dgrad:   dx = reduce-scatter(dlogits W) * dloss     (all-reduce without sequence parallelism), behind wgrad
    wgrad:   dW += dlogits^T x * dloss                  [v/tp, h]; dlogits were made in the forward pass, or here
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: ShardedParameter,
        head: VocabularyParallelHead,
        targets: Tensor,
        token_weights: Tensor,
    ) -> Tensor:
        full, ctx.head, ctx.gradients = head.gathered(x), head, None
        if head.waiting is None or head.waiting() is None:
            ctx.gradients = _new_gradients(full, weight)
            head.waiting = weakref.ref(ctx.gradients[1])
        else:
            ctx.save_for_backward(x, targets, token_weights)
        return _loss(head, full, targets, token_weights, ctx.gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        head, tp = ctx.head, ctx.head.tp
        (dx, dw), ctx.gradients = ctx.gradients or _gradients_again(head, *ctx.saved_tensors), None
        dx.mul_(dloss)
        if head.sequence_parallel:
            dx, reduction = start_reduce_scatter(dx, tp)
        else:
            reduction = start_all_reduce(dx, tp)
        gradient = _HeadWeightGradient(head.weight, dw, dloss)
        if head.queue is not None and head.queue.collecting and head.weight.shard.uses > 1:
            head.queue.put(gradient)
            dw = None
        else:
            dw = gradient.compute()
        reduction.wait()
        return dx, dw, None, None, None
