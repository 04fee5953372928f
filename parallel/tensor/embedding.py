"""Vocabulary-parallel embedding: each tensor rank holds a run of the vocabulary's rows.

Legend: s sequence, b micro-batch, h hidden, v vocabulary; /tp = split over tensor ranks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from parallel.groups import Axis
from parallel.shards import Box, Replica, Segment, Shard
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


class VocabularyParallelEmbedding(nn.Module):
    """Rows of the table by token id: [s, b] -> [s, b, h], or [s/tp, b, h] under sequence parallelism."""

    def __init__(self, weight: ShardedParameter, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = weight  # [v/tp, h], its shard made by `vocabulary_shard`
        self.tp, self.sequence_parallel = tp, sequence_parallel

    def forward(self, tokens: Tensor) -> Tensor:  # [s, b] -> [s/tp, b, h]
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.tp.rank * self.weight.shape[0]
        outside = (local < 0) | (local >= self.weight.shape[0])
        y = F.embedding(local.masked_fill(outside, 0), self.weight).masked_fill(outside[..., None], 0.0)
        return scatter_sequence(y, self.tp) if self.sequence_parallel else reduce_from_tensor(y, self.tp)
