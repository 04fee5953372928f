"""One pipeline stage: some blocks, with the embedding before the first and the norm, head and loss after the last.

Legend: s sequence, b micro-batch, h hidden, v vocabulary; /tp = split over tensor ranks.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from megatron_llama.data.loader import MicroBatch
from megatron_llama.model.block import Block, RMSNorm
from megatron_llama.model.build import ModelContext
from megatron_llama.model.rope import Places, inverse_frequencies, rope_tables
from parallel.pipeline.layout import Placement
from parallel.recompute import recompute
from parallel.shards import Replica
from parallel.tensor.cross_entropy import vocabulary_parallel_cross_entropy
from parallel.tensor.deferred import WeightGradientQueue
from parallel.tensor.embedding import VocabularyParallelEmbedding, vocabulary_shard
from parallel.tensor.linear import ColumnParallelLinear
from parallel.tensor.parameter import ShardedParameter

EMBEDDING, HEAD = "tok_embeddings", "output"


class Stage(nn.Module):
    """`stage(x, micro_batch)`: the stages in turn take tokens to the micro-batch's loss, or to logits without targets.

    x and y are [s/tp, b, h] between stages; the first takes None. The loss is the sum of token losses times
    `micro_batch.loss_mask`, which carries the division by the global number of targets.

    Its backward pass can be split: `weight_gradients` is where the linears leave theirs. `table` is the embedding's weight
    where another stage of this rank holds it, for a tied head.
    """

    def __init__(
        self, context: ModelContext, layers: range, is_first: bool, is_last: bool, table: ShardedParameter | None = None
    ) -> None:
        super().__init__()
        self.weight_gradients = WeightGradientQueue()
        self.context = context = replace(context, queue=self.weight_gradients)
        self.is_first, self.is_last = is_first, is_last
        model, tp = context.model, context.groups.tp
        if is_first:
            table = self._vocabulary_parameter(EMBEDDING, copy=0)
            queue = context.queue if is_last and model.tie_embeddings else None
            self.embedding = VocabularyParallelEmbedding(table, tp, context.sequence_parallel, queue)
        self.frequencies = inverse_frequencies(model).to(context.device)
        self.blocks = nn.ModuleDict({str(layer): Block(context, layer) for layer in layers})
        if is_last:
            self.norm = RMSNorm(context, "norm")
            if model.tie_embeddings and table is not None:
                weight = table
                weight.shard = replace(weight.shard, uses=2)
            else:
                weight = self._vocabulary_parameter(EMBEDDING if model.tie_embeddings else HEAD, copy=1)
            self.head = ColumnParallelLinear(weight, tp, context.sequence_parallel, context.kernels, context.queue)

    def _vocabulary_parameter(self, name: str, copy: int) -> ShardedParameter:
        """The embedding's or the head's weight [v/tp, h]. A tied one has a copy on the first and on the last stage."""
        model, axis, replica = self.context.model, self.context.groups.replicas.get("embedding"), None
        if model.tie_embeddings and axis is not None and axis.size > 1:
            replica = Replica("embedding", copy, axis.size, partial_gradient=True)
        return self.context.parameter(
            vocabulary_shard(name, model.vocab_size, model.hidden_size, self.context.groups.tp, replica)
        )

    def forward(self, x: Tensor | None, micro_batch: MicroBatch) -> Tensor:  # [s/tp, b, h] -> [s/tp, b, h] or loss []
        if self.is_first:
            x = self.embedding(micro_batch.tokens)
        assert x is not None
        places = Places(*rope_tables(self.frequencies, micro_batch.positions), micro_batch.documents)
        for block in self.blocks.values():
            keep_input_only = self.context.recompute == "full" and self.training
            x = recompute(block, x, places) if keep_input_only else block(x, places)
        return self._loss(x, micro_batch) if self.is_last else x

    def _loss(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:  # [s/tp, b, h] -> [], or logits [s, b, v/tp]
        logits = self.head(self.norm(x))
        if micro_batch.targets is None:
            return logits
        losses = vocabulary_parallel_cross_entropy(
            logits, micro_batch.targets, self.context.model.vocab_size, self.context.groups.tp
        )
        return (losses * micro_batch.loss_mask).sum()  # fp32


def build_chunks(context: ModelContext, placement: Placement, layers: list[range]) -> list[Stage]:
    """The stages of this rank, one per chunk. `layers` lists every global stage's layers."""
    rank, last = context.groups.place.pp, placement.num_stages - 1
    table, chunks = None, []
    for stage in (placement.stage(rank, chunk) for chunk in range(placement.chunks)):
        chunks.append(Stage(context, layers[stage], stage == 0, stage == last, table))
        if stage == 0:
            table = chunks[0].embedding.weight
    return chunks
