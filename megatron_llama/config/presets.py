"""One row per published size: the architecture, and the published hyper-parameters of its pretraining.

Sources: LLaMA, "LLaMA: Open and Efficient Foundation Language Models", tables 2 and section 2.3; LLaMA-2, "Open
Foundation and Fine-Tuned Chat Models", section 2; LLaMA-3, "The Llama 3 Herd of Models", table 3, and the released
configurations. Where a paper is silent, the released configuration decides; where that is silent too, the row is.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from parallel.errors import ConfigError

BILLION = 10**9


@dataclass(frozen=True)
class Family:
    """What all sizes of one release share. `batch_tokens` and `sequence_length` are in tokens, 0 where not published."""

    vocab_size: int
    sequence_length: int
    norm_eps: float
    rope_theta: float = 10_000.0
    rope_scaling_factor: float = 1.0
    tie_embeddings: bool = False
    adam_eps: float = 1e-8
    batch_tokens: int = 0
    warmup_steps: int = 0


@dataclass(frozen=True)
class Preset:
    """One size. `num_kv_heads` 0 is as many as heads; `learning_rate` and `tokens` are 0 where not published."""

    name: str
    family: Family
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    learning_rate: float = 0.0
    tokens: int = 0


MILLION_4 = 4 * 2**20  # "4M tokens" as whole sequences: 2048 of 2048, 1024 of 4096
LLAMA_1 = Family(32_000, 2048, 1e-6, batch_tokens=MILLION_4, warmup_steps=2000)
LLAMA_1_65B = Family(32_000, 2048, 1e-5, batch_tokens=MILLION_4, warmup_steps=2000)  # released with another norm epsilon
LLAMA_2 = Family(32_000, 4096, 1e-5, adam_eps=1e-5, batch_tokens=MILLION_4, warmup_steps=2000)
LLAMA_3 = Family(128_256, 8192, 1e-5, rope_theta=500_000.0)
LLAMA_3_1 = Family(128_256, 8192, 1e-5, rope_theta=500_000.0, rope_scaling_factor=8.0)
LLAMA_3_2 = Family(128_256, 8192, 1e-5, rope_theta=500_000.0, rope_scaling_factor=32.0, tie_embeddings=True)
TINY = Family(4096, 256, 1e-5)
SMALL = Family(8192, 512, 1e-5)
MEDIUM = Family(32_000, 1024, 1e-5, tie_embeddings=True)

PRESETS = (
    #      name              family      layers hidden heads  kv    ffn  peak rate        tokens
    Preset("llama-7b",       LLAMA_1,        32,  4096,   32,  0, 11008, 3.0e-4, 1000 * BILLION),
    Preset("llama-13b",      LLAMA_1,        40,  5120,   40,  0, 13824, 3.0e-4, 1000 * BILLION),
    Preset("llama-33b",      LLAMA_1,        60,  6656,   52,  0, 17920, 1.5e-4, 1400 * BILLION),
    Preset("llama-65b",      LLAMA_1_65B,    80,  8192,   64,  0, 22016, 1.5e-4, 1400 * BILLION),
    Preset("llama-2-7b",     LLAMA_2,        32,  4096,   32,  0, 11008, 3.0e-4, 2000 * BILLION),
    Preset("llama-2-13b",    LLAMA_2,        40,  5120,   40,  0, 13824, 3.0e-4, 2000 * BILLION),
    Preset("llama-2-34b",    LLAMA_2,        48,  8192,   64,  8, 22016, 1.5e-4, 2000 * BILLION),
    Preset("llama-2-70b",    LLAMA_2,        80,  8192,   64,  8, 28672, 1.5e-4, 2000 * BILLION),
    Preset("llama-3-8b",     LLAMA_3,        32,  4096,   32,  8, 14336, 3.0e-4),
    Preset("llama-3-70b",    LLAMA_3,        80,  8192,   64,  8, 28672, 1.5e-4),
    Preset("llama-3.1-8b",   LLAMA_3_1,      32,  4096,   32,  8, 14336, 3.0e-4),
    Preset("llama-3.1-70b",  LLAMA_3_1,      80,  8192,   64,  8, 28672, 1.5e-4),
    Preset("llama-3.1-405b", LLAMA_3_1,     126, 16384,  128,  8, 53248, 8.0e-5),
    Preset("llama-3.2-1b",   LLAMA_3_2,      16,  2048,   32,  8,  8192),
    Preset("llama-3.2-3b",   LLAMA_3_2,      28,  3072,   24,  8,  8192),
    # for laptops and tests; not published by anyone
    Preset("llama-tiny",     TINY,            4,   128,    4,  2,   384, 2.0e-3),
    Preset("llama-20m",      SMALL,           8,   384,    8,  4,  1024, 1.0e-3),
    Preset("llama-100m",     MEDIUM,         12,   768,   12,  4,  2048, 6.0e-4),
)  # fmt: skip


def preset_names() -> list[str]:
    """Names of all presets, in the order of the table."""
    return [preset.name for preset in PRESETS]


def preset_layer(name: str, origin: str) -> dict[str, dict[str, Any]]:
    """Section -> field -> value of what preset `name` sets; unpublished values are left out, for the defaults to give.

    Raises ConfigError, naming `origin` and the closest known name, where there is no such preset.
    """
    found = [preset for preset in PRESETS if preset.name == name]
    if not found:
        closest = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{origin}: unknown model.preset {name!r}; the closest known one is {closest} (all: {', '.join(preset_names())})"
        )
    preset, family = found[0], found[0].family
    shape = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size")
    shared = ("vocab_size", "norm_eps", "rope_theta", "rope_scaling_factor", "tie_embeddings")
    optimizer = {"eps": family.adam_eps, "warmup_steps": family.warmup_steps, "learning_rate": preset.learning_rate}
    train = {
        "sequence_length": family.sequence_length,
        "global_batch_size": family.batch_tokens // family.sequence_length,
        "tokens": preset.tokens,
    }
    return {
        "model": {key: getattr(preset, key) for key in shape} | {key: getattr(family, key) for key in shared},
        "optimizer": {key: value for key, value in optimizer.items() if value},
        "train": {key: value for key, value in train.items() if value},
    }
