"""The arguments that Megatron-LM lays into its checkpoints (`args`, an argparse.Namespace), and the architecture they tell.

Source: Megatron-LM, megatron/training/arguments.py and checkpointing.py (what `--use-checkpoint-args` takes).
"""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_llama.config import ModelConfig
from megatron_llama.interop.megatron_layout import VOCABULARY_MULTIPLE, padded_vocabulary
from megatron_llama.interop.sidecar import architecture, check_agreement
from megatron_llama.interop.stored_model import StoredModel
from megatron_llama.interop.torch_files import Allowed, load_torch_bytes, load_torch_file
from parallel.errors import CheckpointError, ConfigError

# Arguments that would make it another model than a LLaMA, with the value of a LLaMA. Where one is absent, it is not known yet.
LLAMA = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "apply_layernorm_1p": False,
    "qk_layernorm": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "num_experts": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
}
MOST_PADDING = 128 * 128  # rows of a vocabulary; a given model with fewer would lose some in silence
ROPE_SCALING = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_context": 8192}  # fixed in Megatron
IGNORED_MODULES = ("megatron.", "numpy.", "pathlib.", "signal.", "types.SimpleNamespace")


class Ignored:
    """Stands for an object of a class that nothing here needs (an enum, a path, a random state); never that class itself."""

    def __new__(cls, *unused: object) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *unused: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_megatron_file(path: Path) -> dict[str, Any]:
    """The dict in a file of Megatron's. Its `args` is a Namespace; enums, paths and numpy's arrays in it come as `Ignored`.

    Raises CheckpointError naming the file, and the class where it holds anything else, which is never called.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    return _dict(load_torch_file(path, _allowed(path, str(path))), str(path))


def load_megatron_object(content: bytes, origin: str) -> dict[str, Any]:
    """As `load_megatron_file`, of an object inside a distributed checkpoint: a list of one dict."""
    found = load_torch_bytes(content, origin, _allowed(io.BytesIO(content), origin))
    return _dict(found[0] if isinstance(found, list) and len(found) == 1 else found, origin)


def _allowed(source: Path | io.BytesIO, origin: str) -> list[Allowed]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except Exception as error:  # whatever a damaged file does to the scan
        raise CheckpointError(f"{origin} cannot be read as a file of torch.save: {str(error)[:300]}") from error
    return [Namespace, *((Ignored, name) for name in names if name.startswith(IGNORED_MODULES))]


def _dict(content: object, origin: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin} holds no dict, but {type(content).__name__}")
    return content


def read_args(args: object, origin: str, given: ModelConfig | None) -> tuple[ModelConfig, int]:
    """The architecture and the sequence length (0 where it isn't told) that `args` of the file `origin` tells.

    Megatron keeps the size of the vocabulary with its padding only; then it is `given` that knows it. Raises CheckpointError
    where it is not a LLaMA, and ConfigError where `given` is needed or of another architecture.
    """
    if not isinstance(args, Namespace):
        if given is None:
            raise ConfigError(f"{origin} holds no arguments of Megatron: give --model PRESET or --config FILE")
        return given, 0
    for name, value in LLAMA.items():
        if getattr(args, name, value) != value:
            raise CheckpointError(f"{origin}: {name} is {getattr(args, name)!r}: a LLaMA has {value!r}")
    absent = [name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads") if name not in args]
    if absent:
        raise CheckpointError(f"{origin}: the arguments of Megatron in it have no {absent[0]}")
    told = _told(args)
    vocabulary = told["vocab_size"] or (given.vocab_size if given else 0)
    if not vocabulary:
        padded = getattr(args, "padded_vocab_size", None)
        text = f"{origin} tells the size of the vocabulary with its padding only, {padded}"
        raise ConfigError(f"{text}: give --model PRESET or --config FILE")
    padded = getattr(args, "padded_vocab_size", None)
    if type(padded) is int and not vocabulary <= padded < vocabulary + MOST_PADDING:
        raise ConfigError(f"{origin}: its vocabulary with padding has {padded} rows, and model.vocab_size is {vocabulary}")
    model = architecture(told | {"vocab_size": vocabulary}, origin)
    if getattr(args, "kv_channels", None) not in (None, model.head_dim):
        raise CheckpointError(f"{origin}: kv_channels is {args.kv_channels}: a LLaMA of this width has {model.head_dim}")
    if given is not None:
        check_agreement(given, told | {"vocab_size": vocabulary}, origin)
        model = given
    length = getattr(args, "seq_length", None)
    return model, length if type(length) is int and length > 0 else 0


def _told(args: Namespace) -> dict[str, Any]:
    """Fields of ModelConfig; vocab_size is 0 where it isn't told."""
    grouped = getattr(args, "group_query_attention", False)
    scaled = getattr(args, "use_rope_scaling", False)
    return {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_heads": args.num_attention_heads,
        "num_kv_heads": getattr(args, "num_query_groups", 1) if grouped else args.num_attention_heads,
        "vocab_size": getattr(args, "vocab_size", None) or 0,
        "rope_theta": getattr(args, "rotary_base", 10_000),
        "rope_scaling_factor": getattr(args, "rope_scaling_factor", 8.0) if scaled else 1.0,
        "norm_eps": getattr(args, "norm_epsilon", None) or getattr(args, "layernorm_epsilon", 1e-5),
        "tie_embeddings": not getattr(args, "untie_embeddings_and_output_weights", False),
    }


def written_args(stored: StoredModel, tp: int = 1, pp: int = 1) -> Namespace:
    """The arguments that say the architecture of `stored` to Megatron. Raises ConfigError where they can't."""
    model = stored.model
    fixed = {name: value for name, value in ROPE_SCALING.items() if getattr(model, name) != value}
    if model.rope_scaling_factor != 1.0 and fixed:
        name, value = next(iter(fixed.items()))
        raise ConfigError(f"{stored.origin}: {name} is {getattr(model, name)}: Megatron knows only {value}")
    return Namespace(
        **LLAMA,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        group_query_attention=model.num_kv_heads != model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        vocab_size=model.vocab_size,
        padded_vocab_size=padded_vocabulary(model.vocab_size, tp),
        make_vocab_size_divisible_by=VOCABULARY_MULTIPLE,
        seq_length=stored.sequence_length or None,
        max_position_embeddings=stored.sequence_length or None,
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=int(model.rope_theta) if model.rope_theta.is_integer() else model.rope_theta,
        use_rope_scaling=model.rope_scaling_factor != 1.0,
        rope_scaling_factor=model.rope_scaling_factor,
        norm_epsilon=model.norm_eps,
        layernorm_epsilon=model.norm_eps,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        init_method_std=model.init_std,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        no_save_optim=True,
        no_save_rng=True,
    )
