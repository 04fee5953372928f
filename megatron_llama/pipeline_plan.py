"""Planning a pipeline from a model's sizes: layers per stage, what stages cost, and `parallel.schedule = auto`.

Times follow from floating-point operations at one assumed speed, so they compare schedules rather than predict seconds.
Memory follows from what the layers keep for their backward pass.

Legend: s sequence, b micro-batch, h hidden, q heads x head dim, k kv heads x head dim, f ffn, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_llama.config import ModelConfig, ParallelConfig, RunConfig, data_parallel_size, micro_batches_per_step
from megatron_llama.flops import layer_parameter_count
from parallel.pipeline.choice import candidates, choose_schedule, require_fit
from parallel.pipeline.costs import Costs
from parallel.pipeline.layout import Placement, balance_layers
from parallel.pipeline.schedules import SCHEDULES
from parallel.tensor.head_loss import chunk_tokens

AUTO_CHUNKS = (1, 2, 4)
DEVICE_FLOPS = 150e12  # assumed: about half of an A100's bf16 peak
LINK_BYTES_PER_SECOND = 25e9  # assumed: 200 Gbit/s
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 2**30


@dataclass(frozen=True)
class Work:
    """FLOPs of one token in each kind of action."""

    forward: float
    input_backward: float
    weight_backward: float


def layer_work(model: ModelConfig, sequence_length: int) -> Work:
    """Of one block: a product with all weights in each action, and the attention scores, where a query sees s / 2 keys."""
    query = model.num_heads * model.head_dim
    linear, scores = 2.0 * (layer_parameter_count(model) - 2 * model.hidden_size), 2.0 * query * sequence_length
    return Work(linear + scores, linear + 2 * scores, linear)


def head_work(model: ModelConfig, chunked: bool = False) -> Work:
    """Of the output head. In chunks it makes all its gradients in the forward pass (parallel/tensor/head_loss.py)."""
    linear = 2.0 * model.hidden_size * model.vocab_size
    return Work(3 * linear, 0.0, 0.0) if chunked else Work(linear, linear, linear)


def _head_is_chunked(config: RunConfig) -> bool:
    tokens = config.train.micro_batch_size * config.train.sequence_length
    rows = -(-config.model.vocab_size // config.parallel.tp)
    return chunk_tokens(tokens, rows * VALUE_BYTES[config.train.dtype]) < tokens


def stage_layers(config: RunConfig, placement: Placement) -> Sequence[int]:
    """The number of layers of each global stage: those given, or balanced, the head counted in layers."""
    if config.parallel.layers_per_stage != "auto":
        return config.parallel.layers_per_stage
    layer = layer_work(config.model, config.train.sequence_length)
    return balance_layers(config.model.num_layers, placement, head=head_work(config.model).forward / layer.forward)


def layer_activations(config: RunConfig, recompute: str) -> tuple[float, float]:
    """Bytes that a block keeps for one micro-batch on one rank: from F to its backward pass, and from I to W.

    Kept until the backward pass: the inputs of norms and linears, q, k and v before and after the rotation, gate and up (see
    docs/memory.md for what recomputation leaves of them). Kept until W: what linears get, forward and backward.
    """
    model, parallel = config.model, config.parallel
    hidden = model.hidden_size / (parallel.tp if parallel.sequence_parallel else 1)
    query, key = (heads * model.head_dim / parallel.tp for heads in (model.num_heads, max(model.num_kv_heads, parallel.tp)))
    ffn = model.ffn_hidden_size / parallel.tp
    linears = 2 * hidden + (query + 2 * key) + query + 3 * ffn  # inputs of the four; qkv, gate and up
    softmax = model.num_heads / parallel.tp * VALUE_BYTES["fp32"] / VALUE_BYTES[config.train.dtype]  # its sums
    kept = {
        "none": linears + 2 * hidden + query + key + softmax,
        "selective": linears + 2 * hidden,
        "linear_outputs": linears - ffn + softmax,  # two inputs of norms instead of their outputs
        "full": hidden,
    }
    queued = linears + 2 * model.hidden_size  # output gradients where a row-parallel linear gathers them
    tokens = config.train.micro_batch_size * config.train.sequence_length
    unit = tokens * VALUE_BYTES[config.train.dtype]
    return kept[recompute] * unit, queued * unit


def fully_recomputed(parallel: ParallelConfig, num_layers: int) -> int:
    """How many of a stage's layers keep their input only."""
    if parallel.recompute != "full":
        return 0
    return min(num_layers, parallel.recompute_layers or num_layers)


def stage_activations(config: RunConfig, num_layers: int) -> float:
    """Bytes that a stage's layers keep on the device for one micro-batch on one rank, from F to its backward pass."""
    parallel = config.parallel
    full = fully_recomputed(parallel, num_layers)
    others = parallel.recompute if parallel.recompute != "full" else "none"
    modes = ["full"] * full + [others] * (num_layers - full)
    return sum(layer_activations(config, mode)[0] for mode in modes[parallel.offload_layers :])


def memory_settings(parallel: ParallelConfig) -> str:
    """What becomes of activations, in words."""
    layers = f" in the first {parallel.recompute_layers} layers of a stage" if parallel.recompute_layers else ""
    offloaded = f", the first {parallel.offload_layers} layers of a stage offloaded" if parallel.offload_layers else ""
    return f"recompute {parallel.recompute}{layers}{offloaded}"


def stage_costs(config: RunConfig, placement: Placement) -> Costs:
    """Seconds of the actions of each global stage, and GiB that they keep."""
    model, train, parallel = config.model, config.train, config.parallel
    layers = stage_layers(config, placement)
    layer, head = layer_work(model, train.sequence_length), head_work(model, _head_is_chunked(config))
    tokens = train.micro_batch_size * train.sequence_length
    second = DEVICE_FLOPS * parallel.tp / tokens  # in FLOPs of one token

    def seconds(of_layer: float, of_head: float) -> list[float]:
        costs = [count * of_layer / second for count in layers]
        costs[-1] += of_head / second
        return costs

    again = [fully_recomputed(parallel, count) * layer.forward / second for count in layers]
    if parallel.recompute == "selective":
        again = seconds(layer.forward - layer.weight_backward, 0.0)  # the scores: what is no product with a weight
    inputs = [i + more for i, more in zip(seconds(layer.input_backward, head.input_backward), again, strict=True)]
    weights = seconds(layer.weight_backward, head.weight_backward)
    _, queued = layer_activations(config, parallel.recompute)
    hidden = model.hidden_size / (parallel.tp if parallel.sequence_parallel else 1)
    return Costs(
        forward=seconds(layer.forward, head.forward),
        backward=[i + w for i, w in zip(inputs, weights, strict=True)],
        input_backward=inputs,
        weight_backward=weights,
        send=hidden * tokens * VALUE_BYTES[train.dtype] / LINK_BYTES_PER_SECOND,
        activation=[stage_activations(config, count) / GIB for count in layers],
        queued=[count * queued / GIB for count in layers],
    )


def settle_schedule(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with a named schedule that its sizes allow and that fits `parallel.activation_memory_gib`.

    Raises ConfigError, with the nearest choice that works, where there is none.
    """
    parallel = config.parallel
    micro_batches = micro_batches_per_step(config, world_size)
    if parallel.schedule != "auto":
        samples = config.train.micro_batch_size * data_parallel_size(config, world_size)
        SCHEDULES[parallel.schedule].validate(parallel.pp, parallel.chunks, micro_batches, samples)
        if not parallel.activation_memory_gib:
            return config
    found = candidates(parallel.pp, micro_batches, _chunk_counts(config), lambda placement: stage_costs(config, placement))
    memory = [parallel.activation_memory_gib or math.inf] * parallel.pp
    if parallel.schedule != "auto":
        wanted = [one for one in found if (one.kind.name, one.placement.chunks) == (parallel.schedule, parallel.chunks)]
        require_fit(wanted[0], found, memory, "GiB")
        return config
    chosen = choose_schedule(found, memory, "GiB")
    return replace(config, parallel=replace(parallel, schedule=chosen.kind.name, chunks=chosen.placement.chunks))


def _chunk_counts(config: RunConfig) -> list[int]:
    """The numbers of chunks to consider: few, where every stage gets a layer; the given one where the layers are given."""
    parallel = config.parallel
    if parallel.layers_per_stage != "auto" or parallel.pp == 1:
        return [parallel.chunks]
    counts = {*AUTO_CHUNKS, parallel.chunks}
    return [chunks for chunks in sorted(counts) if parallel.pp * chunks <= config.model.num_layers]
