"""Parameters and model FLOPs of a shape: those of `megatron_llama.flops`, for two feed-forward matrices too."""

from __future__ import annotations

from typing import Literal

from megatron_llama.config.sections import ModelConfig
from megatron_llama.flops import flops_per_token, layer_parameter_count
from megatron_llama.plan.job import Shape


def model_of(shape: Shape) -> ModelConfig:
    """The same sizes as a model of this project, which has a gate."""
    return ModelConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        ffn_hidden_size=shape.ffn_hidden_size,
        vocab_size=shape.vocab_size,
        tie_embeddings=shape.tied,
    )


def layer_parameters(shape: Shape) -> int:
    """Parameters of one block."""
    gate = 0 if shape.gated else shape.hidden_size * shape.ffn_hidden_size
    return layer_parameter_count(model_of(shape)) - gate


def vocabulary_parameters(shape: Shape) -> int:
    """Parameters of one table of the vocabulary."""
    return shape.vocab_size * shape.hidden_size


def parameters(shape: Shape) -> int:
    """Parameters of the whole model."""
    tables = 1 if shape.tied else 2
    return shape.num_layers * layer_parameters(shape) + tables * vocabulary_parameters(shape) + shape.hidden_size


def token_flops(shape: Shape, attention: Literal["causal", "full"]) -> float:
    """Model FLOPs of forward and backward for one token, recomputed work left out."""
    gate = 0 if shape.gated else 6 * shape.num_layers * shape.hidden_size * shape.ffn_hidden_size
    return flops_per_token(model_of(shape), shape.sequence_length, attention) - gate
