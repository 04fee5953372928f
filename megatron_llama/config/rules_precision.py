"""Which numbers of weights, masters and moments go together. Each rule raises ConfigError, as in `rules`."""

from __future__ import annotations

from megatron_llama.config.sections import RunConfig
from parallel.errors import ConfigError


def master_weights(config: RunConfig) -> None:
    """A remainder is what bf16 weights lack of fp32 ones."""
    if config.optimizer.master_weights == "remainder" and config.train.dtype != "bf16":
        raise ConfigError(
            "optimizer.master_weights = remainder keeps the bits that bf16 weights lack, and train.dtype = "
            f"{config.train.dtype}: set --optimizer.master_weights fp32, or --train.dtype bf16"
        )


def moment_dtype(config: RunConfig) -> None:
    """Only AdamW has moments."""
    optimizer = config.optimizer
    if optimizer.moment_dtype != "fp32" and optimizer.name != "adamw":
        raise ConfigError(
            f"optimizer.moment_dtype = {optimizer.moment_dtype} is for AdamW's moments, and optimizer.name = {optimizer.name} "
            "has none: set --optimizer.moment_dtype fp32"
        )


def loss_scale(config: RunConfig) -> None:
    """fp16: the next step's scale depends on whether this one was finite."""
    if config.train.dtype == "fp16" and config.parallel.post_validation:
        raise ConfigError(
            "parallel.post_validation = true begins a step before the last one is known to be finite, on which the loss scale "
            "of train.dtype = fp16 depends: set --parallel.post_validation false, or --train.dtype bf16"
        )


RULES = (master_weights, moment_dtype, loss_scale)
