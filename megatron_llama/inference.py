"""Opening a checkpoint for evaluation or generation, in any layout."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from megatron_llama.config import RunConfig, load_config, validate_layout, validate_model
from megatron_llama.program import agree
from megatron_llama.runtime import Runtime, build_runtime
from megatron_llama.state import load_weights, stored_config
from parallel import launch as launching
from parallel.checkpoint.manifest import read_manifest
from parallel.checkpoint.steps import resolve_checkpoint
from parallel.launch import Launch


def open_checkpoint(checkpoint: str, overrides: list[str], launch: Launch) -> tuple[Runtime, Path]:
    """The model of a checkpoint with its weights, split over this launch's ranks; all ranks call it together.

    The layout is the checkpoint's where it fits the number of ranks, else one process per data rank; `overrides` are
    `--section.field value` flags. Raises CheckpointError and ConfigError.
    """
    directory = resolve_checkpoint(Path(checkpoint), groups=("weights",))
    manifest = read_manifest(directory, groups=("weights",))
    stored = stored_config(directory, manifest)
    config = load_config(overrides, base=_fit(stored, launch.world_size))
    validate_model(config)
    validate_layout(config, launch.world_size)
    device = launching.choose_device(launch, config.train.device)
    launching.start(launch, device)
    runtime = build_runtime(config, launch.rank, launch.world_size, device, timedelta(minutes=10), fresh=False)

    def load() -> bool:
        load_weights(directory, runtime, manifest)
        return True

    agree(load, runtime.groups.world, device)
    return runtime, directory


def _fit(config: RunConfig, world_size: int) -> RunConfig:
    """The stored layout with dp following from the ranks at hand; no model parallelism where it does not fit them.

    What makes training faster in fixed shapes and on some GPUs only is left off, and there is no optimizer to shard.
    """
    parallel = replace(config.parallel, dp=0)
    if world_size % (parallel.tp * parallel.pp * parallel.cp):
        parallel = replace(parallel, tp=1, pp=1, cp=1, chunks=1, schedule="1f1b", layers_per_stage="auto")
    train = replace(config.train, float8="none", compile=False, cuda_graphs=False)
    zero = replace(config.zero, shard_group_size=0)
    return replace(config, parallel=parallel, train=train, zero=zero)
