"""The configuration of a run, in one import.

`sections` has the fields, `file` reads and writes them, `rules` says which combinations can run, `presets` has published sizes.
"""

from megatron_llama.config.file import from_dict, help_text, load_config, to_dict, to_toml
from megatron_llama.config.rules import validate, validate_layout, validate_model, validate_training
from megatron_llama.config.sections import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    KernelConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    WatchConfig,
    ZeroConfig,
    checkpoint_directory,
    data_parallel_size,
    masks_documents,
    micro_batches_per_step,
    saves_in_background,
    tokens_per_step,
    total_steps,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "KernelConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "WatchConfig",
    "ZeroConfig",
    "checkpoint_directory",
    "data_parallel_size",
    "from_dict",
    "help_text",
    "load_config",
    "masks_documents",
    "micro_batches_per_step",
    "saves_in_background",
    "to_dict",
    "to_toml",
    "tokens_per_step",
    "total_steps",
    "validate",
    "validate_layout",
    "validate_model",
    "validate_training",
]
