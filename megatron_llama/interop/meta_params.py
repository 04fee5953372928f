"""Meta's params.json: the architecture of a LLaMA, with the feed-forward's width as a formula.

Source: llama-models, models/llama3/args.py and model.py; the files released with LLaMA 1 to 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llama.config import ModelConfig
from parallel.errors import CheckpointError, ConfigError

INTEGERS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of")
NUMBERS = ("ffn_dim_multiplier", "norm_eps", "rope_theta")
NEEDED = ("dim", "n_layers", "n_heads", "norm_eps")
OF_A_RUN = ("max_batch_size", "max_seq_len")  # limits of Meta's own inference
SCALING = {  # fixed in Meta's code: params.json only says use_scaled_rope
    "rope_scaling_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_context": 8192,
}
LLAMA_3_2_FACTOR = 32.0
LLAMA_3_THETA = 500_000.0
MULTIPLES = (256, 512, 1024, 2048, 4096, 128, 64, 32, 16, 8, 4, 2, 1)


def read_params(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What params.json (`values`, found at `path`) says, as fields of ModelConfig; no vocab_size where it is -1.

    Raises CheckpointError for values that are missing, of the wrong type, or of another architecture.
    """
    values = {key: value for key, value in values.items() if value is not None and key not in OF_A_RUN}
    unknown = sorted(values.keys() - {*INTEGERS, *NUMBERS, "use_scaled_rope"})
    if unknown:
        raise CheckpointError(f"{path}: {', '.join(unknown)}: not of a text model of LLaMA 1 to 3.2 in Meta's own format")
    missing = [key for key in NEEDED if key not in values]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    for keys, kinds, kind in (
        (INTEGERS, (int,), "an integer"),
        (NUMBERS, (int, float), "a number"),
        (("use_scaled_rope",), (bool,), "true or false"),
    ):
        for key in keys:
            if key in values and (type(values[key]) not in kinds or not abs(values[key]) < 1 << 40):
                raise CheckpointError(f"{path}: {key} = {values[key]!r} is not {kind} that a model can have")
    told = {
        "num_layers": values["n_layers"],
        "hidden_size": values["dim"],
        "num_heads": values["n_heads"],
        "num_kv_heads": values.get("n_kv_heads", values["n_heads"]),
        "ffn_hidden_size": feed_forward_size(values["dim"], values.get("multiple_of", 256), values.get("ffn_dim_multiplier")),
        "norm_eps": float(values["norm_eps"]),
        "rope_theta": float(values.get("rope_theta", 10_000.0)),
    }
    if values.get("vocab_size", -1) != -1:
        told["vocab_size"] = values["vocab_size"]
    return told | (SCALING if values.get("use_scaled_rope", False) else {"rope_scaling_factor": 1.0})


def write_params(model: ModelConfig) -> dict[str, Any]:
    """The inverse: params.json of a model. Raises ConfigError for rotary scaling that Meta's code does not have."""
    scaled = model.rope_scaling_factor != 1.0
    fixed = [name for name in SCALING if scaled and name != "rope_scaling_factor" and getattr(model, name) != SCALING[name]]
    if fixed or (scaled and model.rope_scaling_factor not in (SCALING["rope_scaling_factor"], LLAMA_3_2_FACTOR)):
        name = fixed[0] if fixed else "rope_scaling_factor"
        raise ConfigError(
            f"model.{name} = {getattr(model, name)}: Meta's params.json can only say that rotary frequencies are scaled as in "
            "LLaMA 3.1 or 3.2; choose another --to, such as hf"
        )
    multiple, multiplier = feed_forward_terms(model.hidden_size, model.ffn_hidden_size)
    params = {
        "dim": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_heads,
        "vocab_size": model.vocab_size,
        "multiple_of": multiple,
        "norm_eps": model.norm_eps,
    }
    params |= {"ffn_dim_multiplier": multiplier} if multiplier is not None else {}
    params |= {"n_kv_heads": model.num_kv_heads} if model.num_kv_heads != model.num_heads else {}
    params |= {"rope_theta": model.rope_theta} if model.rope_theta != 10_000.0 else {}
    return params | ({"use_scaled_rope": True} if scaled else {})


def feed_forward_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's formula: two thirds of 4 dim, times the multiplier, rounded up to a multiple; 0 where there is none."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return -(-size // multiple_of) * multiple_of if multiple_of > 0 else 0


def feed_forward_terms(dim: int, ffn_hidden_size: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` (None: not needed) for which the formula gives `ffn_hidden_size`."""
    for multiple in MULTIPLES:
        if feed_forward_size(dim, multiple, None) == ffn_hidden_size:
            return multiple, None
    multiple = math.gcd(ffn_hidden_size, max(MULTIPLES))
    wanted = ffn_hidden_size / int(2 * (4 * dim) / 3)
    for scale in (10**digits for digits in range(1, 16)):  # the shortest decimal that rounds up to it
        for units in (math.floor(wanted * scale), math.ceil(wanted * scale), math.ceil(wanted * scale) + 1):
            multiplier = units / scale
            if feed_forward_size(dim, multiple, multiplier) == ffn_hidden_size:
                return multiple, multiplier
    raise AssertionError(f"no multiplier gives {ffn_hidden_size} from {dim}")
