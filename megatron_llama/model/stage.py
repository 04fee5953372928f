"""One pipeline stage: some blocks, with the embedding before the first and the norm, head and loss after the last.

Legend: s sequence, b micro-batch, h hidden, v vocabulary; /tp = split over tensor ranks.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from megatron_llama.data.loader import MicroBatch
from megatron_llama.model.activations import Activations
from megatron_llama.model.block import Block, RMSNorm
from megatron_llama.model.build import ModelContext
from megatron_llama.model.rope import Places, inverse_frequencies, rope_tables
from parallel.pipeline.layout import Placement
from parallel.shards import Replica
from parallel.tensor.deferred import WeightGradientQueue
from parallel.tensor.embedding import VocabularyParallelEmbedding, vocabulary_shard
from parallel.tensor.head_loss import VocabularyParallelHead
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
        self.activations = Activations(context)
        block_context = replace(context, kernels=self.activations.kernels(context.block_kernels or context.kernels))
        self.blocks = nn.ModuleDict({str(layer): Block(block_context, layer) for layer in layers})
        if is_last:
            self.norm = RMSNorm(context, "norm")
            if model.tie_embeddings and table is not None:
                weight = table
                weight.shard = replace(weight.shard, uses=2)
            else:
                weight = self._vocabulary_parameter(EMBEDDING if model.tie_embeddings else HEAD, copy=1)
            self.head = VocabularyParallelHead(
                weight, model.vocab_size, tp, context.sequence_parallel, context.kernels, context.queue, context.tp_overlap
            )

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
        x = self.activations.run(self.blocks.values(), x, places)
        return self.head(self.norm(x), micro_batch.targets, micro_batch.loss_mask) if self.is_last else x


def build_chunks(context: ModelContext, placement: Placement, layers: list[range]) -> list[Stage]:
    """The stages of this rank, one per chunk. `layers` lists every global stage's layers."""
    rank, last = context.groups.place.pp, placement.num_stages - 1
    table, chunks = None, []
    for stage in (placement.stage(rank, chunk) for chunk in range(placement.chunks)):
        chunks.append(Stage(context, layers[stage], stage == 0, stage == last, table))
        if stage == 0:
            table = chunks[0].embedding.weight
    return chunks
