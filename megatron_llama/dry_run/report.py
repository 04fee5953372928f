"""The figures of a dry run as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_llama.config import RunConfig, tokens_per_step
from megatron_llama.dry_run.allocations import COMPONENTS
from megatron_llama.dry_run.measure import Figures
from megatron_llama.dry_run.traffic import NETWORK, NODE
from megatron_llama.flops import TERA, model_flops, parameter_count
from megatron_llama.pipeline_plan import memory_settings
from megatron_llama.plan.memory import gib
from parallel.topology import Topology


def report_lines(
    config: RunConfig, topology: Topology, ranks: Sequence[Figures], gpus_per_node: int, notes: Sequence[str]
) -> Iterator[str]:
    """A table of the ranks, and the fullest one in detail."""
    fullest = max(ranks, key=lambda one: one.peak_bytes)
    model, train = config.model, config.train
    yield f"dry run   {topology}, {gpus_per_node} per node; one step on meta tensors, as every later one"
    yield f"model     {model.preset or 'custom'}: {parameter_count(model):,} parameters, {train.dtype}"
    yield (
        f"schedule  {config.parallel.schedule}, {fullest.micro_batches} micro-batches of {train.micro_batch_size} x "
        f"{train.sequence_length} tokens; {memory_settings(config.parallel)}"
    )
    yield from (f"note      {note}" for note in notes)
    yield ""
    components = "".join(f"{name:>12}" for name in COMPONENTS)
    yield f"{'':<42}memory at its peak, GiB{'':<58}sent in a step, GB"
    yield f"{'rank':>6}{'pp':>4}  {'layers':<15}{'parameters':>14}{components}{'all':>8}{'node':>10}{'network':>9}{'TFLOP':>9}"
    yield from map(_row, ranks)
    yield ""
    yield from _detail(fullest, len(ranks) > 1)
    yield from _flop_lines(config, topology, ranks)


def _row(one: Figures) -> str:
    layers = ", ".join(f"{layers.start}-{layers.stop - 1}" for layers in one.layers)
    memory = "".join(f"{gib(one.peak[name]):>12.2f}" for name in COMPONENTS)
    return (
        f"{one.rank:>6}{one.place.pp:>4}  {layers:<15}{one.parameters:>14,.0f}{memory}{gib(one.peak_bytes):>8.2f}"
        f"{_sent(one, NODE) / 1e9:>10.2f}{_sent(one, NETWORK) / 1e9:>9.2f}{one.total_flops / TERA:>9,.0f}"
    )


def _sent(one: Figures, link: str) -> int:
    return sum(row.sent_bytes for row in one.traffic if row.link == link)


def _detail(one: Figures, several: bool) -> Iterator[str]:
    yield f"rank {one.rank}{', the fullest' if several else ''}: {one.peak_bytes:,} bytes at the peak:"
    yield "  " + ", ".join(f"{name} {size:,}" for name, size in one.peak.items())
    yield f"{sum(one.held.values()):,} bytes between steps; what CUDA, NCCL and the allocator take besides is in no figure"
    yield ""
    yield f"{'message':<16}{'axis':<11}{'ranks':>6}  {'link':<9}{'calls':>8}{'bytes sent':>20}"
    for row in one.traffic:
        yield f"{row.kind:<16}{row.axis:<11}{row.size:>6}  {row.link:<9}{row.calls:>8,}{row.sent_bytes:>20,}"
    yield ""


def _flop_lines(config: RunConfig, topology: Topology, ranks: Sequence[Figures]) -> Iterator[str]:
    """What the GPUs compute against what the model needs; `ranks` of all pipeline stages stand for all ranks."""
    flops = step_model_flops(config)
    if len(ranks) == topology.pp:
        computed = sum(one.total_flops for one in ranks) * topology.world_size // topology.pp
        yield f"FLOPs of a step, all ranks: {computed:.4e}, {computed / flops:.3f} x the model's {flops:.4e} (causal attention)"
    else:
        (one,) = ranks
        share = flops // topology.world_size
        yield f"FLOPs of this rank's step: {one.total_flops:.4e}; the model's (causal attention), per GPU: {share:.4e}"


def step_model_flops(config: RunConfig) -> int:
    """Model FLOPs of one step of samples that are one document each (`megatron_llama.flops`)."""
    tokens = tokens_per_step(config)
    return model_flops(config.model, tokens, tokens * config.train.sequence_length)


def figures_json(
    config: RunConfig, topology: Topology, ranks: Sequence[Figures], gpus_per_node: int, notes: Sequence[str]
) -> dict[str, Any]:
    """All figures by name, JSON-able."""
    return {
        "world_size": topology.world_size,
        "gpus_per_node": gpus_per_node,
        "notes": list(notes),
        "parameters": parameter_count(config.model),
        "model_flops": step_model_flops(config),
        "fullest_rank": max(ranks, key=lambda one: one.peak_bytes).rank,
        "ranks": [_rank_json(one) for one in ranks],
    }


def _rank_json(one: Figures) -> dict[str, Any]:
    return {
        "rank": one.rank,
        **asdict(one.place),
        "layers": [[layers.start, layers.stop] for layers in one.layers],
        "micro_batches": one.micro_batches,
        "parameters": one.parameters,
        "peak_bytes": {**one.peak, "total": one.peak_bytes},
        "held_bytes": {**one.held, "total": sum(one.held.values())},
        "traffic": [asdict(row) for row in one.traffic],
        "flops": {**one.flops, "total": one.total_flops},
    }
