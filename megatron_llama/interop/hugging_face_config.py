"""Hugging Face's `config.json` of a Llama, to and from our architecture.

transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`; transformers 5 `rope_parameters` and `dtype`. Both are
read; the former is written, which both read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from megatron_llama.config import ModelConfig, RunConfig, validate_model
from parallel.checkpoint.manifest import dtype_name
from parallel.errors import CheckpointError, ConfigError

ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"
MAX_LAYERS, MAX_SIZE = 10_000, 1 << 24
NORM_EPS, ROPE_THETA, INIT_STD = 1e-6, 10_000.0, 0.02  # LlamaConfig's, where a config.json is silent

# Fields that would change what the model computes, with the value at which they don't.
NEUTRAL = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "sliding_window": None,
    "auto_map": None,  # code of their own
}


def read_model(fields: Mapping[str, Any], origin: str) -> ModelConfig:
    """The architecture that a config.json tells. Raises CheckpointError for what it asks for and we don't have."""
    architectures = fields.get("architectures") or [ARCHITECTURE]
    if fields.get("model_type") != MODEL_TYPE or architectures != [ARCHITECTURE]:
        found = f"architectures {architectures!r}, model_type {fields.get('model_type')!r}"
        raise CheckpointError(f"{origin}: found {found}; only {ARCHITECTURE} ({MODEL_TYPE!r}) can be read")
    rope = _rope(fields, origin)
    for field, neutral in NEUTRAL.items():
        for place in (fields, rope):
            if place.get(field) not in (neutral, None):
                raise CheckpointError(f"{origin}: {field} = {place[field]!r} is not supported: it would have to be {neutral!r}")
    heads = _integer(fields, "num_attention_heads", origin)
    model = ModelConfig(
        num_layers=_integer(fields, "num_hidden_layers", origin, most=MAX_LAYERS),
        hidden_size=_integer(fields, "hidden_size", origin),
        num_heads=heads,
        num_kv_heads=_integer(fields, "num_key_value_heads", origin, default=heads),
        ffn_hidden_size=_integer(fields, "intermediate_size", origin),
        vocab_size=_integer(fields, "vocab_size", origin),
        norm_eps=_number(fields, "rms_norm_eps", origin, NORM_EPS),
        tie_embeddings=_boolean(fields, "tie_word_embeddings", origin),
        init_std=_number(fields, "initializer_range", origin, INIT_STD),
        **_rope_fields(rope, origin),
    )
    head_dim = _integer(fields, "head_dim", origin, default=model.head_dim)
    if head_dim != model.head_dim:
        sizes = f"hidden_size {model.hidden_size} / num_attention_heads {heads} = {model.head_dim}"
        raise CheckpointError(f"{origin}: head_dim = {head_dim} is not supported: it would have to be {sizes}")
    try:
        validate_model(RunConfig(model=model))
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    return model


def read_sequence_length(fields: Mapping[str, Any], origin: str) -> int:
    """The context in tokens, 0 where a config.json doesn't tell it. Raises CheckpointError."""
    return _integer(fields, "max_position_embeddings", origin, default=0)


def _rope(fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What is said about the rotary embedding, in transformers 5's form."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{origin}: the rotary parameters {given!r} are not an object")
    rope_type = given.get("rope_type", given.get("type", "default"))
    return {"rope_theta": fields.get("rope_theta", ROPE_THETA)} | given | {"rope_type": rope_type}


def _rope_fields(rope: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The same as fields of a ModelConfig."""
    found = {"rope_theta": _number(rope, "rope_theta", origin)}
    if rope["rope_type"] == "llama3":
        found |= {
            "rope_scaling_factor": _number(rope, "factor", origin),
            "rope_low_freq_factor": _number(rope, "low_freq_factor", origin),
            "rope_high_freq_factor": _number(rope, "high_freq_factor", origin),
            "rope_original_context": _integer(rope, "original_max_position_embeddings", origin),
        }
    elif rope["rope_type"] != "default":
        raise CheckpointError(f"{origin}: rope_type {rope['rope_type']!r} is not supported: only default and llama3 are")
    return found


def written_config(model: ModelConfig, sequence_length: int, dtype: torch.dtype, ids: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json. `ids`: of the tokens that begin and end a text, where they are known."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": ids.get("eos_token_id"),
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": _context(model, sequence_length),
        "mlp_bias": False,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": model.norm_eps,
        "rope_scaling": _rope_scaling(model),
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype_name(dtype),
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def _context(model: ModelConfig, sequence_length: int) -> int:
    """Tokens. A stretched model's is above its original one: transformers warns where it is not."""
    if model.rope_scaling_factor == 1.0:
        return sequence_length or 2048
    stretched = int(model.rope_original_context * model.rope_scaling_factor)
    return sequence_length if sequence_length > model.rope_original_context else stretched


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_scaling_factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": model.rope_scaling_factor,
        "low_freq_factor": model.rope_low_freq_factor,
        "high_freq_factor": model.rope_high_freq_factor,
        "original_max_position_embeddings": model.rope_original_context,
    }


def _integer(fields: Mapping[str, Any], name: str, origin: str, default: int | None = None, most: int = MAX_SIZE) -> int:
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(f"{origin}: {name} = {value!r} must be an integer from 1 to {most}")
    return value


def _number(fields: Mapping[str, Any], name: str, origin: str, default: float | None = None) -> float:
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise CheckpointError(f"{origin}: {name} = {value!r} must be a number, 0 or above")
    return float(value)


def _boolean(fields: Mapping[str, Any], name: str, origin: str) -> bool:
    value = fields.get(name, False)
    if type(value) is not bool:
        raise CheckpointError(f"{origin}: {name} = {value!r} must be true or false")
    return value
