"""Bytes that a step needs on each pipeline rank, component by component.

Legend: h hidden, q heads x head dim, k kv heads x head dim, f ffn, v vocabulary; per token, per rank of tp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llama.plan.bubble import held_micro_batches
from megatron_llama.plan.hardware import GIB
from megatron_llama.plan.job import Job
from megatron_llama.plan.shape import layer_parameters, vocabulary_parameters
from megatron_llama.plan.step_time import local_tokens

BF16, FP32, MASTER_AND_MOMENTS = 2, 4, 12
FRAGMENTED, FRAMEWORK_BYTES = 0.08, 3e9  # of what is allocated; CUDA's context, NCCL's buffers, kernels' workspaces
KEPT_EAGERLY = 1.5  # of what fused kernels keep
LOGIT_BYTES = {"fused": 2, "compiled": 12, "partial": 12, "eager": 14}  # logits, their softmax in fp32 and their gradient


@dataclass(frozen=True)
class Memory:
    """Bytes of one pipeline rank. `workspace`: logits, or gradients on their way through a block, whichever is more.

    `buffers`: of communication, and weights gathered. `framework`: what is never allocated by name, and fragmentation.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    buffers: float
    framework: float

    @property
    def allocated(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace + self.buffers

    @property
    def total(self) -> float:
        return self.allocated + self.framework


def with_framework(
    weights: float, gradients: float, optimizer: float, activations: float, workspace: float, buffers: float
) -> Memory:
    """The memory with what the framework takes besides."""
    allocated = weights + gradients + optimizer + activations + workspace + buffers
    return Memory(weights, gradients, optimizer, activations, workspace, buffers, allocated * FRAGMENTED + FRAMEWORK_BYTES)


def rank_memory(job: Job) -> list[Memory]:
    """Of each pipeline rank of a published run: 16-bit weights, fp32 gradients, master weights and moments."""
    layout = job.layout
    held = held_micro_batches(layout.schedule, layout.pp, layout.chunks, layout.micro_batches)
    return [_one_rank(job, rank, held[rank]) for rank in range(layout.pp)]


def largest(memories: Sequence[Memory]) -> Memory:
    """That of the fullest rank."""
    return max(memories, key=lambda memory: memory.total)


def _one_rank(job: Job, rank: int, held: float) -> Memory:
    shape, layout = job.shape, job.layout
    layers, last = layout.rank_layers[rank], rank == layout.pp - 1
    tables = (rank == 0) + (last and not (shape.tied and layout.pp == 1))
    layer, table = layer_parameters(shape) / layout.tp, vocabulary_parameters(shape) / layout.tp
    parameters = layers * layer + tables * table
    shards = min(layout.shard_size, layout.dp * layout.cp) if layout.zero_stage else 1
    over = {0: (1, 1, 1), 1: (1, 1, shards), 2: (1, shards, shards), 3: (shards, shards, shards)}[layout.zero_stage]
    gathered = 0.0
    if layout.zero_stage == 3:  # two layers under way, or the whole stage, as a pipeline would gather it for each micro-batch
        gathered = (BF16 + FP32) * (parameters if layout.pp > 1 else 2 * layer)
    tokens = local_tokens(shape, layout)
    kept = tokens * kept_bytes(job) * layers * held
    again = tokens * kept_bytes(job, "none") if layout.recompute == "full" else 0.0
    return with_framework(
        parameters * BF16 / over[0],
        parameters * FP32 / over[1],
        parameters * MASTER_AND_MOMENTS / over[2],
        kept + again,
        max(tokens * shape.vocab_size / layout.tp * LOGIT_BYTES[job.software.elementwise] * last, backward_bytes(job, last)),
        gathered,
    )


def kept_bytes(job: Job, recompute: str | None = None) -> float:
    """What a block keeps of one token for its backward pass.

    Flash attention: inputs and outputs of norms and the residual stream (6 h), q, k, v, attention's output and its copy
    (2 q + 2 k), gate, up and their product (3 f), in 16 bits. Unfused attention: Korthikanti et al. 2022, equations 2 and 4.
    """
    shape, layout, recompute = job.shape, job.layout, recompute or job.layout.recompute
    tp, h = layout.tp, shape.hidden_size
    split = tp if layout.sequence_parallel else 1
    if recompute == "full":
        return BF16 * h / split
    key = max(shape.num_kv_heads, tp) * shape.head_dim
    ffn = (3 if shape.gated else 2) * shape.ffn_hidden_size
    stream = (6 if shape.gated else 5) * h
    kept = BF16 * (stream / split + (2 * h + 2 * key + ffn) / tp)
    if job.software.attention == "unfused" and recompute == "none":
        kept += 5 * shape.num_heads * shape.sequence_length / tp
    if recompute.startswith("sac"):
        kept /= 2
    return kept * (KEPT_EAGERLY if job.software.elementwise in ("partial", "eager") else 1.0)


def backward_bytes(job: Job, last: bool) -> float:
    """At a backward pass's peak: gradients of gate, up and product, and 16-bit weight gradients not yet added up."""
    shape, tp = job.shape, job.layout.tp
    gradients = 3 * local_tokens(shape, job.layout) * shape.ffn_hidden_size
    weights = 3 * shape.hidden_size * shape.ffn_hidden_size + (vocabulary_parameters(shape) if last else 0)
    return BF16 * (gradients + weights) / tp


def gib(size_bytes: float) -> float:
    return size_bytes / GIB
