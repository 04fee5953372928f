"""A configuration of this program in the planner's terms, and what is predicted of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_llama import pipeline_plan
from megatron_llama.config import ModelConfig, RunConfig, data_parallel_size, micro_batches_per_step
from megatron_llama.plan.bubble import held_micro_batches
from megatron_llama.plan.hardware import Cluster, Hardware
from megatron_llama.plan.job import Job, Layout, Shape, Software
from megatron_llama.plan.memory import FP32, Memory, largest, with_framework
from megatron_llama.plan.shape import layer_parameters, token_flops, vocabulary_parameters
from megatron_llama.plan.step_time import StepTime, step_time
from parallel.pipeline.layout import Placement, balance_layers
from parallel.pipeline.schedules import SCHEDULES
from parallel.tensor.head_loss import chunk_tokens

TP_EXPOSED = {"none": (1.0, 1.0), "backward": (1.0, 0.5), "chunks": (0.35, 0.35), "async": (0.35, 0.35)}
FUSED_ATTENTION = "flash2"


@dataclass(frozen=True)
class Prediction:
    """What a run of a configuration is predicted to take: one step's time and where it goes, bytes of each pipeline rank.

    `calibration`: measured over predicted step time of an earlier run on the same cluster, 1 without one.
    """

    job: Job
    time: StepTime
    memory: Sequence[Memory]
    calibration: float = 1.0

    @property
    def step_seconds(self) -> float:
        return self.time.total * self.calibration

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.job.layout.samples * self.job.shape.sequence_length / self.step_seconds / self.job.cluster.gpus

    @property
    def bubble(self) -> float:
        """Share of the step that ranks wait for one another."""
        return self.time.bubble / self.time.total

    @property
    def exposed_communication(self) -> float:
        """Share of the step in which communication is all that happens."""
        return self.time.exposed_communication / self.time.total

    @cached_property
    def largest(self) -> Memory:
        return largest(self.memory)

    @property
    def fill(self) -> float:
        """Share of the GPU's memory that the fullest rank takes."""
        return self.largest.total / self.job.cluster.hardware.memory_bytes

    def mfu(self, attention: str) -> float:
        """Model FLOPs per second over the dense peak; attention "causal" or "full" (megatron_llama/flops.py)."""
        flops = token_flops(self.job.shape, attention)
        return self.tokens_per_second_per_gpu * flops / self.job.cluster.hardware.bf16_flops


def predict(config: RunConfig, world_size: int, hardware: Hardware, calibration: float = 1.0) -> Prediction:
    """Step time and memory of a configuration that `validate` accepts, on `world_size` GPUs of one kind."""
    job = job_of(config, world_size, hardware)
    return Prediction(job, step_time(job), rank_memory(config, job), calibration)


def job_of(config: RunConfig, world_size: int, hardware: Hardware) -> Job:
    """The configuration in the planner's terms."""
    parallel, zero, train = config.parallel, config.zero, config.train
    dp = data_parallel_size(config, world_size)
    stages = stage_layers(config)
    placement = SCHEDULES[parallel.schedule].placement(parallel.pp, parallel.chunks)
    layers = [0] * parallel.pp
    for stage, count in enumerate(stages):
        layers[placement.rank(stage)] += count
    layout = Layout(
        tp=parallel.tp,
        pp=parallel.pp,
        dp=dp,
        cp=parallel.cp,
        chunks=parallel.chunks,
        schedule=parallel.schedule,
        rank_layers=tuple(layers),
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        zero_stage=zero.stage,
        shard_size=zero.shard_group_size or dp * parallel.cp,
        micro_batch_size=train.micro_batch_size,
        micro_batches=micro_batches_per_step(config, world_size),
        recompute=parallel.recompute,
        recomputed_layers=_recomputed_share(config, layers),
        tp_exposed=TP_EXPOSED[parallel.tp_overlap],
        split_sends=parallel.sequence_parallel,
        dp_overlap=zero.overlap and not (zero.engine == "deepspeed" and zero.stage == 1),
        float8=train.float8 != "none",
        gradient_bytes=2 if zero.reduce_dtype == "bf16" else 4,
        gathered_bytes=_value_bytes(config),
    )
    software = Software("compiled" if train.compile else "partial", hides_pipeline=True, attention=FUSED_ATTENTION)
    return Job(shape_of(config.model, train.sequence_length), layout, Cluster.of(hardware, world_size), software)


@lru_cache
def shape_of(model: ModelConfig, sequence_length: int) -> Shape:
    """The model's sizes."""
    return Shape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        vocab_size=model.vocab_size,
        sequence_length=sequence_length,
        tied=model.tie_embeddings,
    )


def stage_layers(config: RunConfig) -> Sequence[int]:
    """The layers of each global stage, as the program will split them."""
    parallel = config.parallel
    if parallel.layers_per_stage != "auto":
        return parallel.layers_per_stage
    kind = SCHEDULES[parallel.schedule].placement_kind
    return _balanced(config.model, config.train.sequence_length, parallel.pp, parallel.chunks, kind)


@lru_cache(maxsize=1024)
def _balanced(model: ModelConfig, sequence_length: int, pp: int, chunks: int, kind: str) -> Sequence[int]:
    layer = pipeline_plan.layer_work(model, sequence_length).forward
    head = pipeline_plan.head_work(model).forward
    return balance_layers(model.num_layers, Placement(pp, chunks, kind), head=head / layer)


def _recomputed_share(config: RunConfig, layers: Sequence[int]) -> float:
    """Of the layers of the fullest rank, those that `parallel.recompute` applies to."""
    parallel = config.parallel
    if parallel.recompute != "full" or not parallel.recompute_layers:
        return 1.0
    return min(1.0, parallel.recompute_layers * parallel.chunks / max(layers))


def _value_bytes(config: RunConfig) -> int:
    return pipeline_plan.VALUE_BYTES[config.train.dtype]


def rank_memory(config: RunConfig, job: Job) -> list[Memory]:
    """Bytes of each pipeline rank: what the engines keep (docs/zero.md) and what blocks keep (docs/memory.md)."""
    layout = job.layout
    placement = SCHEDULES[layout.schedule].placement(layout.pp, layout.chunks)
    stages = stage_layers(config)
    held = held_micro_batches(layout.schedule, layout.pp, layout.chunks, layout.micro_batches)
    kept_by = {count: pipeline_plan.stage_activations(config, count) for count in set(stages)}
    memories = []
    for rank in range(layout.pp):
        own = [placement.stage(rank, chunk) for chunk in range(layout.chunks)]
        kept = sum(kept_by[stages[stage]] for stage in own)
        first, last = 0 in own, placement.num_stages - 1 in own
        memories.append(_one_rank(config, job, layout.rank_layers[rank], kept * held[rank], first, last))
    return memories


def _one_rank(config: RunConfig, job: Job, layers: int, activations: float, first: bool, last: bool) -> Memory:
    shape, layout, zero = job.shape, job.layout, config.zero
    tables = first + (last and not (first and shape.tied))
    layer = layer_parameters(shape) / layout.tp
    parameters = layers * layer + tables * vocabulary_parameters(shape) / layout.tp
    value, gradient = _value_bytes(config), 2 if zero.gradient_dtype == "bf16" else FP32
    shards = layout.shard_size if zero.stage else 1
    weights_over, gradients_over = (shards if zero.stage >= stage else 1 for stage in (3, 2))
    bucket = min(zero.bucket_size, parameters)
    buffers = bucket * (gradient if layout.dp > 1 else 0)
    if zero.stage == 2:
        buffers += 2 * bucket * FP32
    if zero.stage == 3:
        buffers += 2 * layer * value
    optimizer = 0.0 if zero.offload != "none" else parameters * _optimizer_bytes(config) / shards
    return with_framework(
        parameters * value / weights_over,
        parameters * gradient / gradients_over,
        optimizer,
        activations,
        _workspace(config, job, last),
        buffers,
    )


def _optimizer_bytes(config: RunConfig) -> int:
    """Of one parameter: master weight where the weights are not fp32 themselves, and AdamW's moments."""
    optimizer = config.optimizer
    moments = 0 if optimizer.name != "adamw" else 2 * (2 if optimizer.moment_dtype == "bf16" else FP32)
    if config.train.dtype == "fp32" and config.zero.engine == "native":
        return moments
    return moments + (2 if optimizer.master_weights == "remainder" else FP32)


def _workspace(config: RunConfig, job: Job, last: bool) -> float:
    """The most of: a block whose activations are made again, gradients on their way through a block, the head's own."""
    shape, layout, value = job.shape, job.layout, _value_bytes(config)
    tokens = config.train.micro_batch_size * config.train.sequence_length
    again = pipeline_plan.layer_activations(config, "none")[0] if config.parallel.recompute == "full" else 0.0
    weights = value * 3 * shape.hidden_size * shape.ffn_hidden_size / layout.tp
    block = again + weights + 3 * value * tokens * shape.ffn_hidden_size / layout.tp
    if not last:
        return block
    columns = -(-shape.vocab_size // layout.tp)
    chunk = chunk_tokens(tokens, columns * value)
    head = chunk * columns * (value + 2 * FP32)
    if chunk < tokens:
        head += columns * shape.hidden_size * FP32 + tokens * shape.hidden_size * value
    return max(block, head)
