"""Vocabulary-parallel embedding: each tensor rank holds a run of the vocabulary's rows.

Legend: s sequence, b micro-batch, h hidden, v vocabulary; /tp = split over tensor ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from parallel.groups import Axis
from parallel.shards import Box, Replica, Segment, Shard
from parallel.tensor.deferred import WeightGradient, WeightGradientQueue
from parallel.tensor.mappings import reduce_from_tensor, scatter_sequence
from parallel.tensor.parameter import ShardedParameter

ROW_MULTIPLE = 8  # 16 bytes of bf16: what tensor cores want of a GEMM's dims


def vocabulary_shard(name: str, vocabulary: int, hidden: int, tp: Axis, replica: Replica | None = None) -> Shard:
    """The place of an embedding or head [v, h]: local rows are equal on all ranks, so the last ranks' may be padding.

    The number of stored rows is `vocabulary`, whatever tp is; a rank may hold none.
    """
    rows = -(-vocabulary // tp.size)
    rows = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
    start = min(tp.rank * rows, vocabulary)
    real = min(rows, vocabulary - start)
    segments = ()
    if real:
        box, local = Box((start, 0), (real, hidden)), Box((0, 0), (real, hidden))
        segments = (Segment(name, (vocabulary, hidden), box, local, replica),)
    return Shard((rows, hidden), segments)


def _add_rows(target: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:  # [v/tp, h], [s, b], [s, b, h] -> [v/tp, h]
    """target[tokens] += rows, in place, adding in a fixed order: `index_put_` sorts on GPUs, but adds atomically from several
    CPU threads, where `index_add_` is the one that runs in order."""
    if target.is_cuda:
        return target.index_put_((tokens,), rows, accumulate=True)
    return target.index_add_(0, tokens.flatten(), rows.flatten(0, -2))


class _LookupWeightGradient(WeightGradient):
    """wgrad of a lookup: dW[tokens] += dy, in the engine's main gradient and its dtype where there is one: no dense [v/tp, h]
    gradient is made then."""

    def __init__(self, weight: ShardedParameter, tokens: Tensor, dy: Tensor) -> None:
        self.weight, self.tokens, self.dy = weight, tokens, dy

    def compute(self) -> Tensor | None:
        if self.weight.sink is None:
            return _add_rows(torch.zeros_like(self.weight), self.tokens, self.dy)
        main_grad = self.weight.sink.main_grad
        _add_rows(main_grad, self.tokens, self.dy.to(main_grad.dtype))
        self.weight.sink.ready()
        return None


class _Lookup(torch.autograd.Function):
    """y = W[tokens].

    forward: y = W[tokens]          [s, b] -> [s, b, h]
    wgrad:   dW[tokens] += dy       [v/tp, h], left to `queue` while that collects
    """

    @staticmethod
    def forward(ctx: FunctionCtx, tokens: Tensor, weight: ShardedParameter, queue: WeightGradientQueue | None) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.queue = weight, queue
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[None, Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        gradient = _LookupWeightGradient(ctx.weight, tokens, dy)
        if ctx.queue is not None and ctx.queue.collecting:
            ctx.queue.put(gradient)
            return None, None, None
        return None, gradient.compute(), None


class VocabularyParallelEmbedding(nn.Module):
    """Rows of the table by token id: [s, b] -> [s, b, h], or [s/tp, b, h] under sequence parallelism.

    `queue`: where the weight gradient waits during the I of a split backward pass. It is meant for a table that is the
    stage's head too, whose two gradients must add up in the same order as in whole backward passes; None computes the
    gradient in I.
    """

    def __init__(
        self, weight: ShardedParameter, tp: Axis, sequence_parallel: bool, queue: WeightGradientQueue | None = None
    ) -> None:
        super().__init__()
        self.weight = weight  # [v/tp, h], its shard made by `vocabulary_shard`
        self.tp, self.sequence_parallel, self.queue = tp, sequence_parallel, queue

    def forward(self, tokens: Tensor) -> Tensor:  # [s, b] -> [s/tp, b, h]
        if self.tp.size == 1:
            return _Lookup.apply(tokens, self.weight, self.queue)
        local = tokens - self.tp.rank * self.weight.shape[0]
        outside = (local < 0) | (local >= self.weight.shape[0])
        y = _Lookup.apply(local.masked_fill(outside, 0), self.weight, self.queue).masked_fill(outside[..., None], 0.0)
        return scatter_sequence(y, self.tp) if self.sequence_parallel else reduce_from_tensor(y, self.tp)
