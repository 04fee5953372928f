"""Rotary position tables, with LLaMA-3's frequency scaling.

Pairs are in half-split order: dim j turns with dim j + d/2 (Hugging Face's order; Meta's weights are a permutation of it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llama.config import ModelConfig
from parallel.kernels.documents import Documents


@dataclass(frozen=True)
class Places:
    """Where a micro-batch's tokens stand: the rotary tables of their positions, and their documents (None: one per sample)."""

    cos: Tensor  # [s, b or 1, d/2] fp32
    sin: Tensor
    documents: Documents | None


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Radians per position of each pair, fp32 [d/2].

    Source: Su et al. 2021, section 3.2.2; the scaling that LLaMA 3.1 applies where `rope_scaling_factor` is above 1: long waves
    are slowed by the factor, short ones kept, those between interpolated (Llama 3 model card and reference code).
    """
    head_dim = model.hidden_size // model.num_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / model.rope_theta**exponents
    if model.rope_scaling_factor == 1.0:
        return frequencies
    waves_in_context = model.rope_original_context * frequencies / (2.0 * math.pi)
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    kept = ((waves_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / model.rope_scaling_factor)


def rope_tables(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles: [d/2], [s, b or 1] -> fp32 [s, b or 1, d/2] twice."""
    angles = positions.float()[..., None] * frequencies
    return angles.cos(), angles.sin()
