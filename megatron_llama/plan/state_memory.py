"""Weights, gradients and optimizer state of a pipeline rank, and the buckets in which they lie (parallel/zero/buckets.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_llama.config import ModelConfig, RunConfig
from parallel.tensor.embedding import ROW_MULTIPLE
from parallel.zero.buckets import ALIGNMENT

FP32 = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
UPDATED = 5  # fp32 copies of a slice that an update makes where masters or moments are not kept in fp32: two moments, the
# master, and two of integers to round by


@dataclass(frozen=True)
class Parameter:
    """One local tensor. `use` is the linear whose backward pass completes its gradient, in block `block` of the stage (-1: the
    embedding; as many as there are blocks: the head)."""

    size: int
    use: str
    block: int
    decays: bool = True
    replicated: str = ""


@dataclass(frozen=True)
class BucketSize:
    """`size` elements with padding. `use` and `block`: those of the parameter that fills it. `tied`: it has a table that is
    embedding and head, so it fills from a pass's beginning to its end."""

    size: int
    use: str
    block: int
    replicated: str
    tied: bool


def table_rows(model: ModelConfig, tp: int) -> int:
    """Rows of a rank's part of a table of the vocabulary, those of padding included."""
    return _round_up(_round_up(model.vocab_size, tp) // tp, ROW_MULTIPLE)


def stage_parameters(model: ModelConfig, tp: int, layers: int, embeds: bool, head: bool, ends: int) -> tuple[Parameter, ...]:
    """A stage's parameters in the order of its modules. `ends`: ranks that hold a copy of a tied table, 1 where it is one.

    `head`: norm and head; of a tied table that the rank's embedding is already, the norm only.
    """
    hidden, head_dim = model.hidden_size, model.hidden_size // model.num_heads
    query, key = hidden // tp, max(model.num_kv_heads, tp) // tp * head_dim
    ffn, table = model.ffn_hidden_size // tp, table_rows(model, tp) * hidden
    norm = {"size": hidden, "decays": False, "replicated": "tp" if tp > 1 else ""}
    tied = "embedding" if model.tie_embeddings and ends > 1 else ""
    found = [Parameter(table, "embedding", -1, replicated=tied)] if embeds else []
    for block in range(layers):
        found += [
            Parameter(**norm, use="wqkv", block=block),
            Parameter((query + 2 * key) * hidden, "wqkv", block, replicated="kv" if tp > model.num_kv_heads else ""),
            Parameter(query * hidden, "wo", block),
            Parameter(**norm, use="wo", block=block),
            Parameter(2 * ffn * hidden, "w13", block),
            Parameter(ffn * hidden, "w2", block),
        ]
    if head:
        found.append(Parameter(**norm, use="norm", block=layers))
        if not (model.tie_embeddings and ends == 1):
            found.append(Parameter(table, "head", layers, replicated=tied))
    return tuple(found)


@lru_cache(maxsize=4096)
def stage_buckets(
    model: ModelConfig, tp: int, layers: int, embeds: bool, head: bool, ends: int, bucket_size: int, shards: int
) -> tuple[BucketSize, ...]:
    """The buckets of a stage's parameters, as `parallel.zero.buckets.make_buckets` lays them out; padded to `shards` parts."""
    parameters = stage_parameters(model, tp, layers, embeds, head, ends)
    classes: dict[tuple[str, bool], list[Parameter]] = {}
    for one in reversed(parameters):
        classes.setdefault((one.replicated, not one.decays), []).append(one)
    found = []
    for (replicated, _), members in sorted(classes.items()):
        for group in _groups(members, bucket_size if not replicated else sum(one.size for one in members) + 1):
            padded = sum(_round_up(one.size, ALIGNMENT) for one in group)
            tied = model.tie_embeddings and embeds and head and group[-1].use == "embedding"
            found.append(BucketSize(_round_up(padded, ALIGNMENT * shards), group[-1].use, group[-1].block, replicated, tied))
    return tuple(found)


def _groups(members: Sequence[Parameter], least: int) -> Iterator[list[Parameter]]:
    group: list[Parameter] = []
    for one in members:
        group.append(one)
        if sum(member.size for member in group) >= least:
            yield group
            group = []
    if group:
        yield group


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class State:
    """Bytes of a rank between steps, and `update`: those of the fp32 copies that an update makes meanwhile."""

    weights: float
    gradients: float
    optimizer: float
    update: float


def state_bytes(config: RunConfig, buckets: Sequence[BucketSize], shards: int, slice_elements: int) -> State:
    """What an engine keeps of a rank's buckets (docs/zero.md), the optimizer's part split over `shards` ranks.

    Of a parameter: its weight; its gradient in `zero.gradient_dtype`, of which stage 2 keeps this rank's fp32 shard only; an
    fp32 master, or what a bf16 weight lacks of it, but for fp32 weights; AdamW's moments. A step that is validated later keeps
    a copy of masters and moments.
    """
    zero, optimizer = config.zero, config.optimizer
    value, gradient = BYTES[config.train.dtype], BYTES[zero.gradient_dtype]
    elements = sum(bucket.size for bucket in buckets)
    sharded = elements / shards
    moment = 0 if optimizer.name != "adamw" else 2 * BYTES[optimizer.moment_dtype]
    master = 0 if value == FP32 and zero.engine == "native" else 2 if optimizer.master_weights == "remainder" else FP32
    kept = sharded * (master + moment)
    if config.parallel.post_validation:
        kept += sharded * (moment + (master if master == FP32 else value + master))
    rounded = (moment == 2 * 2 and optimizer.name == "adamw") or optimizer.master_weights == "remainder"
    return State(
        weights=elements * value / (shards if zero.stage == 3 else 1),
        gradients=_gradient_bytes(config, buckets, shards, gradient),
        optimizer=0.0 if zero.offload != "none" else kept,
        update=UPDATED * FP32 * min(slice_elements, max(bucket.size for bucket in buckets) / shards) if rounded else 0.0,
    )


def _gradient_bytes(config: RunConfig, buckets: Sequence[BucketSize], shards: int, gradient: int) -> float:
    elements = sum(bucket.size for bucket in buckets)
    if config.zero.engine == "deepspeed":
        return elements * gradient / (shards if config.zero.stage >= 2 else 1)
    if config.zero.stage < 2:
        return elements * (gradient + (FP32 if shards == 1 and gradient != FP32 else 0))
    whole = sum(bucket.size for bucket in buckets if bucket.replicated)
    return (elements - whole) / shards * FP32 + whole * (gradient + (FP32 if shards == 1 and gradient != FP32 else 0))
