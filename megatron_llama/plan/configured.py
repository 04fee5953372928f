"""A configuration of this program in the planner's terms, and what is predicted of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_llama import pipeline_plan
from megatron_llama.config import ModelConfig, RunConfig, data_parallel_size, micro_batches_per_step
from megatron_llama.plan.block_memory import GPU, MicroBatchMemory, Platform, micro_batch_bytes
from megatron_llama.plan.hardware import Cluster, Hardware
from megatron_llama.plan.job import Job, Layout, Shape, Software
from megatron_llama.plan.memory import Memory, largest, with_framework
from megatron_llama.plan.peak import RankPeak, StagePart
from megatron_llama.plan.reductions import reduction
from megatron_llama.plan.shape import token_flops
from megatron_llama.plan.situations import situations
from megatron_llama.plan.state_memory import BYTES, stage_buckets, stage_parameters, state_bytes
from megatron_llama.plan.step_time import StepTime, step_time
from parallel.pipeline.layout import Placement, balance_layers
from parallel.pipeline.schedules import SCHEDULES

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


def rank_memory(config: RunConfig, job: Job, platform: Platform = GPU) -> list[Memory]:
    """Bytes of each pipeline rank at its peak: what the engine keeps (`state_memory`), and what comes and goes (`peak`)."""
    layout = job.layout
    placement = SCHEDULES[layout.schedule].placement(layout.pp, layout.chunks)
    data, shards = layout.dp * layout.cp, layout.shard_size if config.zero.stage else 1
    memory, sums = MicroBatchMemory(config, platform), reduction(config, shards, data // shards, platform)
    of_ranks = situations(layout.schedule, layout.pp, layout.chunks, layout.micro_batches, every=platform.exchanges)
    batch = layout.micro_batches * micro_batch_bytes(config)
    stages, known = stage_layers(config), {}  # ranks with equal stages that hold as much are alike
    memories = []
    for rank in range(layout.pp):
        own = [placement.stage(rank, chunk) for chunk in range(layout.chunks)]
        key = tuple((stages[stage], stage == 0, stage == placement.num_stages - 1) for stage in own), of_ranks[rank]
        if key not in known:
            parts = _parts(config, placement, own, stages, data)
            buckets = [bucket for part in parts for bucket in part.buckets]
            state = state_bytes(config, buckets, shards, platform.slice_elements)
            peak = RankPeak(memory, parts, sums, state.update, batch).find(of_ranks[rank])
            buffers = peak.buffers + _deepspeed_buffers(config, parts)
            kept = state.weights, state.gradients, state.optimizer
            known[key] = with_framework(*kept, peak.activations, peak.workspace, buffers)
        memories.append(known[key])
    return memories


def _parts(config: RunConfig, placement: Placement, own: Sequence[int], stages: Sequence[int], data: int) -> list[StagePart]:
    """A rank's `own` stages with their buckets."""
    ends, last = len(set(placement.embedding_ranks)), placement.num_stages - 1
    parts = []
    for stage in own:
        layers = stages[stage]
        parameters = config.model, config.parallel.tp, layers, stage == 0, stage == last, ends
        parts.append(StagePart(layers, stage == last, stage_buckets(*parameters, config.zero.bucket_size, data)))
    return parts


def _deepspeed_buffers(config: RunConfig, parts: Sequence[StagePart]) -> float:
    """DeepSpeed's bucket of gradients to reduce; in stage 3 the gathered weights of two blocks, the one in use and the next."""
    zero = config.zero
    if zero.engine != "deepspeed":
        return 0.0
    parameters = sum(bucket.size for part in parts for bucket in part.buckets)
    gathered = 0
    if zero.stage == 3:
        layers = min(2, max(part.layers for part in parts))
        block = stage_parameters(config.model, config.parallel.tp, layers, embeds=False, head=False, ends=1)
        gathered = sum(one.size for one in block)
    return min(zero.bucket_size, parameters) * BYTES[zero.gradient_dtype] + gathered * _value_bytes(config)
