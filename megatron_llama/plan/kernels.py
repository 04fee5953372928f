"""Seconds of a GPU's kernels: products, attention, passes over memory.

Legend: m, n, k sizes of a product; t tokens of a micro-batch on a rank.
"""

from __future__ import annotations

import math

from megatron_llama.plan.hardware import Hardware

TILE = (128, 256)  # rows and columns that one multiprocessor makes at a time
UNEVEN_WAVES = 0.80  # the least that is left of the speed when the last wave of tiles is not full: smaller tiles are chosen
SINGLE_WAVE = 0.25  # the same where one wave is not full
ALIGNMENT, MISALIGNED = 64, 0.80  # a size that is no multiple costs a fifth
HEAD_DIM = 128  # up to which attention kernels get faster
SMALL_HEADS = 0.80
SAMPLE_LENGTH = 600.0  # tokens of a sample at which an attention kernel has half of its speed
UNFUSED_SCORES = 0.55  # speed of batched score products in units of large ones
ODD_HEAD_DIM = 0.12  # the same where the head size is no multiple of 8, which tensor cores need


def product_seconds(hardware: Hardware, m: float, n: float, k: float, float8: bool = False, output_bytes: int = 2) -> float:
    """Of an m x n x k product: tensor cores, or memory if that takes longer.

    The share of the peak is what large products reach, times how full the last wave of tiles is (Osama et al., "Stream-K",
    section 2), times k / (k + k0): each tile's prologue and epilogue cost as much as k0 steps of its inner loop.
    """
    efficiency = hardware.efficiency
    waves = math.ceil(m / TILE[0]) * math.ceil(n / TILE[1]) / hardware.multiprocessors
    filled = max(waves / math.ceil(waves), UNEVEN_WAVES if waves > 1 else SINGLE_WAVE)
    aligned = 1.0 if n % ALIGNMENT == 0 and k % ALIGNMENT == 0 else MISALIGNED
    peak = hardware.float8_flops * efficiency.float8 if float8 and hardware.float8_flops else hardware.bf16_flops
    share = efficiency.product * filled * aligned * k / (k + efficiency.product_depth)
    operand_bytes = (m * k + k * n) * (1 if float8 else 2)
    return max(2.0 * m * n * k / (peak * share), memory_seconds(hardware, operand_bytes + m * n * output_bytes))


def memory_seconds(hardware: Hardware, size_bytes: float) -> float:
    """Of reading or writing that many bytes of the GPU's memory."""
    return size_bytes / (hardware.memory_bytes_per_second * hardware.efficiency.memory)


def attention_seconds(
    hardware: Hardware, kernel: str, samples: float, queries: float, keys: float, heads: float, head_dim: int
) -> tuple[float, float]:
    """Forward and backward seconds of causal attention of `samples` samples, `queries` of whose positions are here.

    Fused kernels leave the masked half out and have five products in the backward pass where the forward has two (Dao,
    "FlashAttention-2", section 3.1). Unfused attention computes all scores, and reads and writes them around each of mask,
    softmax and dropout (Korthikanti et al. 2022, figure 3).
    """
    scores = samples * heads * queries * keys
    flops = 4.0 * scores * head_dim
    if kernel == "unfused":
        speed = hardware.bf16_flops * hardware.efficiency.product * (UNFUSED_SCORES if head_dim % 8 == 0 else ODD_HEAD_DIM)
        return flops / speed + memory_seconds(hardware, 13 * scores), 2 * flops / speed + memory_seconds(hardware, 22 * scores)
    forward, backward = hardware.attention[kernel]
    long = keys / (keys + SAMPLE_LENGTH) * (1.0 if head_dim >= HEAD_DIM else SMALL_HEADS)
    speed = hardware.bf16_flops * hardware.efficiency.attention * long
    return 0.5 * flops / (speed * forward), 1.25 * flops / (speed * backward)
