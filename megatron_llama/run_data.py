"""The training data of a run, for the training program and for who looks at it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_llama.config import RunConfig, load_config, masks_documents, total_steps
from megatron_llama.data.loader import Loader
from megatron_llama.data.training_data import TrainingData, open_training_data
from megatron_llama.state import Position, stored_config, stored_position
from parallel.checkpoint.manifest import read_manifest
from parallel.checkpoint.steps import resolve_checkpoint


def config_of_run(path: Path) -> RunConfig:
    """The configuration of the run that a .toml file, a run directory or a checkpoint stands for.

    Of a checkpoint it is the one that goes on from there. Raises ConfigError and CheckpointError.
    """
    stored = path / "config.toml"
    if not path.is_dir() or stored.is_file():
        return load_config(["--config", str(stored if path.is_dir() else path)])
    directory = resolve_checkpoint(path)
    config = stored_config(directory, read_manifest(directory))
    return replace(config, checkpoint=replace(config.checkpoint, load=str(directory), weights_from=""))


def end_sample(config: RunConfig, position: Position) -> int:
    """Where the run will have read to, going on from `position`."""
    return position.samples + max(0, total_steps(config) - position.step) * config.train.global_batch_size


def open_run_data(config: RunConfig) -> tuple[TrainingData, Position]:
    """What the run reads, and where it goes on. Raises DataError, ConfigError and CheckpointError."""
    position, stored = stored_position(config)
    length, vocab_size, end = config.train.sequence_length, config.model.vocab_size, end_sample(config, position)
    return open_training_data(config.data, length, vocab_size, end, position.samples, stored), position


def make_loader(config: RunConfig, data: TrainingData, dp_rank: int, dp_size: int) -> Loader:
    """What one data rank of the run reads. Raises ConfigError for a batch that the ranks don't divide."""
    train, mask = config.train, masks_documents(config.data)
    batch = train.micro_batch_size, train.global_batch_size
    return Loader(data.blend, train.sequence_length, *batch, dp_rank, dp_size, mask)
