"""What training, evaluation and generation stand on: ranks, axes, kernels, this rank's stages and the executor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import nn

from megatron_llama.config import RunConfig
from megatron_llama.model.attention import kv_replicas
from megatron_llama.model.build import ModelContext
from megatron_llama.model.stage import Stage, build_chunks
from megatron_llama.pipeline_plan import stage_layers
from megatron_llama.program import agree
from parallel.errors import ConfigError
from parallel.groups import ProcessGroups, build_groups
from parallel.kernels.float8_kernels import float8_kernels, float8_missing
from parallel.kernels.providers import Workload
from parallel.kernels.table import Kernels, check_same_choice, resolve_kernels
from parallel.pipeline.executor import Executor
from parallel.pipeline.layout import Placement, split_layers
from parallel.pipeline.p2p import both_ways, open_lanes
from parallel.pipeline.schedules import SCHEDULES
from parallel.topology import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILED = ("rms_norm", "add_rms_norm", "rope", "swiglu")  # what train.compile compiles: all between linears and attention


@dataclass(frozen=True)
class Runtime:
    """One rank's part of the program, built once."""

    config: RunConfig
    device: torch.device
    groups: ProcessGroups
    kernels: Kernels
    placement: Placement
    layers: Sequence[range]
    chunks: Sequence[Stage]

    @property
    def has_loss(self) -> bool:
        """Whether this rank holds the last stage."""
        return any(chunk.is_last for chunk in self.chunks)

    def executor(
        self, sequence_length: int, micro_batch_size: int, chunks: Sequence[nn.Module] | None = None
    ) -> Executor:
        """An executor for activations of that size: [s, b, h], or [s/tp, b, h] under sequence parallelism.

        `chunks`: what it is to call, where that is not the stages themselves.
        """
        context = self.chunks[0].context
        local_sequence = sequence_length // (self.groups.tp.size if context.sequence_parallel else 1)
        shape = (local_sequence, micro_batch_size, self.config.model.hidden_size)
        return Executor(chunks or self.chunks, self.placement, self.groups, shape, context.dtype, self.device)


def topology_of(config: RunConfig, world_size: int) -> Topology:
    """The rank grid: dp follows from the world size where it is not given."""
    parallel = config.parallel
    dp = parallel.dp or world_size // (parallel.tp * parallel.pp * parallel.cp)
    return Topology(pp=parallel.pp, dp=dp, cp=parallel.cp, tp=parallel.tp)


def placement_of(config: RunConfig) -> Placement:
    """Where the stages lie: as the schedule has it; without a choice (`auto`, before it is settled) in turn."""
    parallel = config.parallel
    if parallel.schedule == "auto":
        return Placement(parallel.pp, parallel.chunks)
    return SCHEDULES[parallel.schedule].placement(parallel.pp, parallel.chunks)


def replica_groups(config: RunConfig, topology: Topology, placement: Placement) -> dict[str, list[tuple[int, ...]]]:
    """Axes that only some segments need: runs of tensor ranks that share a kv head, and the two ends of a tied embedding."""
    groups = {}
    replicas = kv_replicas(config.model.num_kv_heads, topology.tp)
    if replicas > 1:
        groups["kv"] = topology.subgroups("tp", replicas)
    first, last = placement.embedding_ranks
    if config.model.tie_embeddings and first != last:
        groups["embedding"] = [(ranks[first], ranks[last]) for ranks in topology.groups("pp")]
    return groups


def model_kernels(config: RunConfig, device: torch.device) -> tuple[Kernels, Kernels]:
    """The kernels of the model, and those of its blocks, whose linears may compute in float8. Raises ConfigError."""
    train, wanted = config.train, dict(vars(config.kernels))
    if device.type == "meta":
        from parallel.kernels.meta_kernels import meta_kernels  # which makes operators known to torch

        kernels = meta_kernels(DTYPES[train.dtype], config.parallel.tp)
        return kernels, kernels
    if train.compile:
        wanted |= {operation: "compiled" for operation in COMPILED if wanted[operation] == "auto"}
    kernels = resolve_kernels(wanted, Workload(device, DTYPES[train.dtype], config.parallel.tp))
    reason = float8_missing(device) if train.float8 != "none" else None
    if reason is not None:
        raise ConfigError(f"train.float8 = {train.float8} cannot run here: {reason}; set --train.float8 none")
    return kernels, float8_kernels(kernels, train.float8, train.compile)


def build_runtime(
    config: RunConfig, rank: int, world_size: int, device: torch.device, timeout: timedelta, fresh: bool = True
) -> Runtime:
    """Build this rank's groups and stages; all ranks call it together.

    `fresh`: give the weights their initial values (otherwise they are zero, about to be loaded).
    """
    parallel = config.parallel
    topology = topology_of(config, world_size)
    placement = placement_of(config)
    replicas, shard_group_size = replica_groups(config, topology, placement), config.zero.shard_group_size
    groups = build_groups(topology, rank, replicas, timeout, both_ways(placement), shard_group_size)
    open_lanes(placement, groups, device)
    layers = split_layers(config.model.num_layers, placement.num_stages, stage_layers(config, placement))
    kernels, block_kernels = agree(lambda: model_kernels(config, device), groups.world, device)
    check_same_choice(kernels, groups.world, device)
    context = ModelContext(
        model=config.model,
        groups=groups,
        kernels=kernels,
        block_kernels=block_kernels,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        tp_overlap=parallel.tp_overlap,
        recompute=parallel.recompute,
        recompute_layers=parallel.recompute_layers,
        offload_layers=parallel.offload_layers,
        dtype=DTYPES[config.train.dtype],
        device=device,
        seed=config.train.seed if fresh else None,
    )
    return Runtime(config, device, groups, block_kernels, placement, layers, build_chunks(context, placement, layers))
