"""Seconds of a training step, part by part.

Legend: h hidden, q heads x head dim, k kv heads x head dim, f ffn, v vocabulary, s sequence, t tokens of a micro-batch on a
rank; sizes are those of one rank under tp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache

from megatron_llama.plan import kernels, links
from megatron_llama.plan.bubble import bubble_seconds
from megatron_llama.plan.hardware import Hardware
from megatron_llama.plan.job import Job, Layout, Shape, Software
from megatron_llama.plan.shape import layer_parameters, vocabulary_parameters

BF16 = 2
MAIN_GRADIENT = 8  # bytes to add to an fp32 gradient
ADAM_BYTES = 30  # of memory traffic per parameter: gradient, master, two moments, read and written; weights written
OPTIMIZER_SECONDS = 2e-3  # the norm's collectives and the host's part of a step

# Elementwise traffic in units of fused kernels' (with two feed-forward matrices, with a gate), and kernels in units of theirs.
TRAFFIC = {"fused": (1.0, 1.0), "compiled": (1.1, 1.1), "partial": (1.2, 1.7), "eager": (1.2, 2.2)}
KERNELS = {"fused": 14, "compiled": 20, "partial": 28, "eager": 36}  # of a block's forward pass
TENSOR_KERNELS = 8  # of a block's collectives and what belongs to them
LOSS_BYTES = {"fused": 8, "compiled": 12, "partial": 14, "eager": 14}  # of memory traffic per logit
BACKWARD_KERNELS = 1.8  # of the forward pass's
KERNEL_GAP_SECONDS = 2e-6  # in which the GPU idles between two kernels
BACKWARD_TRAFFIC = 1.8  # of the forward pass's

# Shares of a block's linears, attention and elementwise work that run again in the backward pass.
RECOMPUTED = {
    "none": (0.0, 0.0, 0.0),
    "selective": (0.0, 1.0, 0.1),
    "linear_outputs": (0.0, 0.0, 0.7),
    "full": (1.0, 1.0, 1.0),
    "sac_op": (0.5, 0.0, 1.0),
    "sac_layer": (0.5, 0.5, 0.5),
    "minimal": (0.0, 0.0, 1.0),
}
EXPOSED_SENDS = 0.3  # of activations between stages where they run beside the computation
RING_SECONDS = 4e-7  # per rank of a ring, which has as many steps as ranks
BUCKET_BYTES = 1e8
CP_HIDDEN, CP_LEAST = 0.8, 0.1  # of attention's time hides the ring's; of the ring's time always shows


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest pipeline rank; they add up to the step.

    `recompute`: forward work of the backward pass. `tensor`, `context`, `pipeline`, `data`: communication that no computation
    hides. `bubble`: waiting for other pipeline ranks. `jitter`: what many nodes lose to one another.
    """

    linear: float
    attention: float
    elementwise: float
    recompute: float
    head: float
    tensor: float
    context: float
    pipeline: float
    data: float
    bubble: float
    optimizer: float
    jitter: float

    @property
    def total(self) -> float:
        return sum(getattr(self, item.name) for item in fields(self))

    @property
    def exposed_communication(self) -> float:
        return self.tensor + self.context + self.pipeline + self.data


@dataclass(frozen=True)
class Pass:
    """Seconds of one micro-batch in one block."""

    linear: float
    attention: float
    elementwise: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.elementwise


def step_time(job: Job) -> StepTime:
    """What a step takes and where it goes."""
    shape, layout = job.shape, job.layout
    tokens = local_tokens(shape, layout)
    forward, backward = block_passes(job, tokens)
    again = recomputed(layout, forward)
    tensor = tensor_seconds(job, tokens)
    context = context_seconds(job, tokens, forward.attention, backward.attention)
    sharded = gather_seconds(job, forward.total + backward.total + again + sum(tensor) + sum(context))
    block = forward.total + backward.total + again + sum(tensor) + sum(context) + sharded
    head = head_seconds(job, tokens)

    stages = [count * block for count in layout.rank_layers]
    stages[-1] += head
    slowest = max(range(len(stages)), key=stages.__getitem__)
    layers = layout.rank_layers[slowest]
    send = 0.0
    if layout.pp > 1:
        send = pipeline_seconds(job, tokens)
    backward_window = max(layout.rank_layers) * (backward.total + again + tensor[1] + context[1])
    forward_window = max(layout.rank_layers) * (forward.total + tensor[0] + context[0])
    micro_batches = layout.micro_batches
    parts = {
        "linear": micro_batches * layers * (forward.linear + backward.linear),
        "attention": micro_batches * layers * (forward.attention + backward.attention),
        "elementwise": micro_batches * layers * (forward.elementwise + backward.elementwise),
        "recompute": micro_batches * layers * again,
        "head": micro_batches * (stages[slowest] - layers * block),
        "tensor": micro_batches * layers * sum(tensor),
        "context": micro_batches * layers * sum(context),
        "pipeline": send * (micro_batches + layout.pp - 1),
        "data": micro_batches * layers * sharded + data_seconds(job, backward_window, forward_window),
        "bubble": bubble_seconds(layout, stages),
        "optimizer": optimizer_seconds(job),
    }
    nodes = max(1.0, job.cluster.gpus / 8)
    jitter = sum(parts.values()) * job.cluster.hardware.efficiency.jitter * math.log2(nodes)
    return StepTime(**parts, jitter=jitter)


def local_tokens(shape: Shape, layout: Layout) -> int:
    """Tokens of a micro-batch on one rank."""
    return max(1, round(layout.micro_batch_size * shape.sequence_length / layout.cp))


def block_passes(job: Job, tokens: int) -> tuple[Pass, Pass]:
    """One block's forward and backward pass over a micro-batch, communication left out."""
    layout = job.layout
    return _block_passes(
        job.shape, job.software, job.cluster.hardware, tokens, layout.tp, layout.cp, layout.sequence_parallel, layout.float8
    )


@lru_cache(maxsize=4096)
def _block_passes(
    shape: Shape, software: Software, hardware: Hardware, tokens: int, tp: int, cp: int, sequence_parallel: bool, float8: bool
) -> tuple[Pass, Pass]:
    h, d, f = shape.hidden_size, shape.head_dim, shape.ffn_hidden_size
    kv_heads = max(shape.num_kv_heads, tp)
    inner = 2 if shape.gated else 1
    linears = (((h + 2 * kv_heads * d) // tp, h), (h, h // tp), (inner * f // tp, h), (h, f // tp))
    forward = sum(kernels.product_seconds(hardware, tokens, n, k, float8) for n, k in linears)
    backward = sum(
        kernels.product_seconds(hardware, tokens, k, n, float8)
        + kernels.product_seconds(hardware, n, k, tokens, float8, output_bytes=MAIN_GRADIENT)
        for n, k in linears
    )
    queries = shape.sequence_length / cp
    attention = kernels.attention_seconds(
        hardware, software.attention, tokens / queries, queries, shape.sequence_length, shape.num_heads / tp, d
    )
    copies = 1 if sequence_parallel or tp == 1 else tp  # without sequence parallelism each rank norms the whole stream
    numbers = 10 * h * copies / tp + 2 * (h + 2 * shape.num_kv_heads * d) / tp + 3 * f / tp
    traffic = tokens * numbers * BF16 + (tokens * (3 * h + f / tp) * 1.5 if float8 else 0.0)
    passes = kernels.memory_seconds(hardware, traffic) * TRAFFIC[software.elementwise][shape.gated]
    count = KERNELS[software.elementwise] + (TENSOR_KERNELS if tp > 1 else 0)
    return (
        _launched(Pass(forward, attention[0], passes), count, hardware),
        _launched(Pass(backward, attention[1], BACKWARD_TRAFFIC * passes), BACKWARD_KERNELS * count, hardware),
    )


def _launched(work: Pass, count: float, hardware: Hardware) -> Pass:
    """The pass with what `count` kernels cost beyond their work: gaps between them, and the host where it is slower."""
    gaps = count * KERNEL_GAP_SECONDS
    host = max(0.0, count * hardware.efficiency.launch_seconds - work.total - gaps)
    return Pass(work.linear, work.attention, work.elementwise + gaps + host)


def recomputed(layout: Layout, forward: Pass) -> float:
    """Seconds of what one block's backward pass computes again."""
    linear, attention, elementwise = recompute_shares(layout.recompute)
    again = linear * forward.linear + attention * forward.attention + elementwise * forward.elementwise
    return again * layout.recomputed_layers


def recompute_shares(recompute: str) -> tuple[float, float, float]:
    """Shares of linears, attention and elementwise work; `sac:0.5` is half of everything."""
    if recompute.startswith("sac:"):
        share = float(recompute.removeprefix("sac:"))
        return share, share, share
    return RECOMPUTED[recompute]


def tensor_seconds(job: Job, tokens: int) -> tuple[float, float]:
    """Exposed tensor-parallel communication of one block, forward and backward.

    Two all-gathers and two reduce-scatters each way with sequence parallelism, which gathers its inputs once more for the
    weight gradients; without, two all-reduces, which take as long (Korthikanti et al. 2022, section 4.2.2).
    """
    layout, cluster = job.layout, job.cluster
    if layout.tp == 1:
        return 0.0, 0.0
    inside = min(layout.tp, cluster.gpus_per_node)
    one = links.shard_seconds(cluster, tokens * job.shape.hidden_size * layout.gathered_bytes, inside, layout.tp)
    one += cluster.hardware.efficiency.latency_seconds * (1 if layout.tp <= cluster.gpus_per_node else 2)
    again = 4 * layout.recomputed_layers if recompute_shares(layout.recompute)[0] > 0.9 else 0
    forward, backward = layout.tp_exposed
    return 4 * one * forward, (4 + again + layout.sequence_parallel) * one * backward


def context_seconds(job: Job, tokens: int, forward: float, backward: float) -> tuple[float, float]:
    """Exposed part of the ring of keys and values, whose gradients go round with them (Liu et al., "Ring Attention")."""
    layout, cluster, shape = job.layout, job.cluster, job.shape
    if layout.cp == 1:
        return 0.0, 0.0
    block = tokens * 2 * max(shape.num_kv_heads / layout.tp, 1) * shape.head_dim * BF16 * (layout.cp - 1)
    inside = max(1, min(layout.cp, cluster.gpus_per_node // layout.tp))
    ring = block / links.ring_bandwidth(cluster, inside, layout.cp)
    exposed = [
        max(turns * ring - CP_HIDDEN * hidden, CP_LEAST * turns * ring) for turns, hidden in ((1, forward), (2, backward))
    ]
    return exposed[0], exposed[1]


def head_seconds(job: Job, tokens: int) -> float:
    """Output head and loss of a micro-batch, forward and backward."""
    hardware, columns, h = job.cluster.hardware, job.shape.vocab_size / job.layout.tp, job.shape.hidden_size
    products = kernels.product_seconds(hardware, tokens, columns, h) + kernels.product_seconds(hardware, tokens, h, columns)
    products += kernels.product_seconds(hardware, columns, h, tokens, output_bytes=MAIN_GRADIENT)
    return products + kernels.memory_seconds(hardware, tokens * columns * LOSS_BYTES[job.software.elementwise])


def pipeline_seconds(job: Job, tokens: int) -> float:
    """Exposed sends of a micro-batch: activations on, gradients back, once per chunk."""
    layout, cluster = job.layout, job.cluster
    inside = layout.tp * layout.cp * layout.dp < cluster.gpus_per_node or layout.gpus <= cluster.gpus_per_node
    size = tokens * job.shape.hidden_size * layout.gathered_bytes / (layout.tp if layout.split_sends else 1)
    exposed = EXPOSED_SENDS if job.software.hides_pipeline else 1.0
    return 2 * links.send_seconds(cluster, size, inside) * layout.chunks * exposed


def gather_seconds(job: Job, computation: float) -> float:
    """Exposed traffic of one block's weights and gradients where ZeRO shards weights (stage 3) in each micro-batch.

    Gathered for the forward and for the backward pass, gradients reduced (Rajbhandari et al., "ZeRO", section 7.2.2).
    """
    layout, cluster = job.layout, job.cluster
    shard = min(layout.shard_size, layout.dp * layout.cp)
    if layout.zero_stage < 3 or shard == 1 or layout.pp > 1:
        return 0.0
    size = layer_parameters(job.shape) / layout.tp * (2 * layout.gathered_bytes + layout.gradient_bytes)
    seconds = links.shard_seconds(cluster, size, _data_ranks_in_node(job, shard), shard) + 3 * shard * RING_SECONDS
    return max(0.0, seconds - computation) + cluster.hardware.efficiency.contention * min(seconds, computation)


def _data_ranks_in_node(job: Job, ranks: int) -> int:
    layout = job.layout
    inside = max(1, min(layout.dp, job.cluster.gpus_per_node // max(1, layout.tp * layout.cp)))
    return min(inside * layout.cp, ranks)


def rank_parameters(job: Job) -> float:
    """Parameters of the rank that has the most of them: its layers, and one table of the vocabulary, or both."""
    layout, shape = job.layout, job.shape
    tables = 1 if layout.pp > 1 or shape.tied else 2
    return (layer_parameters(shape) * max(layout.rank_layers) + vocabulary_parameters(shape) * tables) / layout.tp


def data_seconds(job: Job, backward: float, forward: float) -> float:
    """Exposed data-parallel traffic at a step's end: gradients behind the last backward pass, weights behind the first forward.

    Chunks make the window longer: the gradients of a rank's last chunk are done while the others' last passes still run.
    """
    layout, cluster, efficiency = job.layout, job.cluster, job.cluster.hardware.efficiency
    ranks, size = layout.dp * layout.cp, rank_parameters(job)
    if ranks == 1:
        return 0.0
    shard = min(layout.shard_size, ranks)
    if layout.zero_stage == 3:
        return _replica_seconds(job, size, shard, backward)
    inside = _data_ranks_in_node(job, ranks)
    traffic = links.shard_seconds(cluster, size * (layout.gradient_bytes + layout.gathered_bytes), inside, ranks)
    traffic += 2 * ranks * RING_SECONDS * max(1.0, size * BF16 / BUCKET_BYTES)
    if layout.zero_stage and shard < ranks:
        traffic = 0.7 * links.shard_seconds(cluster, size * 2 * layout.gradient_bytes, inside, ranks)
    if layout.zero_stage == 2:  # gradients leave in every micro-batch, each time behind a backward pass
        reduced = links.shard_seconds(cluster, size * layout.gradient_bytes, inside, ranks)
        hidden = min(reduced, backward) if layout.dp_overlap else 0.0
        earlier = (layout.micro_batches - 1) * (reduced - hidden + efficiency.contention * hidden)
    else:
        earlier = 0.0
    window = (backward + 0.5 * forward) * (1 if layout.chunks == 1 else max(1.0, layout.pp / 2)) if layout.dp_overlap else 0.0
    hidden = min(traffic, window)
    start = 30e-6 * math.log2(ranks + 1) * (1 if layout.dp_overlap else max(layout.rank_layers))
    return earlier + traffic - hidden + efficiency.contention * hidden + start


def _replica_seconds(job: Job, size: float, shard: int, window: float) -> float:
    """Where weights are sharded: sums over replicas of the shards, and a pipeline stage's one gather and reduction."""
    layout, cluster = job.layout, job.cluster
    traffic = 0.0
    if layout.dp * layout.cp > shard:
        network = cluster.network_bytes_per_second * cluster.hardware.efficiency.network
        traffic += size * layout.gradient_bytes * 2 / shard / network
    if layout.pp > 1:
        each = size * (layout.gathered_bytes + layout.gradient_bytes)
        traffic += links.shard_seconds(cluster, each, _data_ranks_in_node(job, shard), shard)
    hidden = min(traffic, window)
    return traffic - hidden + cluster.hardware.efficiency.contention * hidden


def optimizer_seconds(job: Job) -> float:
    """The update of the rank's share: memory traffic alone."""
    layout = job.layout
    ranks = layout.dp * layout.cp
    shards = {0: 1, 1: min(layout.shard_size, ranks), 2: ranks, 3: min(layout.shard_size, ranks)}[layout.zero_stage]
    return kernels.memory_seconds(job.cluster.hardware, rank_parameters(job) / shards * ADAM_BYTES) + OPTIMIZER_SECONDS
