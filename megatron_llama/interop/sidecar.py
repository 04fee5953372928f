"""`megatron_llama.json`, which our exporters lay beside formats that don't tell the architecture; checks of those that do.

{"model": {the fields of ModelConfig}, "sequence_length": tokens, "optimizer_steps": N}
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llama.config import ModelConfig, RunConfig, from_dict, validate_model
from megatron_llama.interop.stored_model import StoredModel
from parallel.errors import CheckpointError, ConfigError

FILE = "megatron_llama.json"
MAX_BYTES = 1 << 20
MAX_LAYERS = 1 << 16  # names are made for each: a hostile file must not ask for billions
MAX_SIZE = 1 << 40
NOT_STORED = ("preset", "init_std")  # fields of a run, not of an architecture


@dataclass(frozen=True)
class Sidecar:
    model: ModelConfig
    sequence_length: int = 0  # tokens; 0 where nobody knows
    optimizer_steps: int = 0


def write_sidecar(stored: StoredModel, directory: Path) -> None:
    """Write what `read_sidecar` reads."""
    model = {name: value for name, value in dataclasses.asdict(stored.model).items() if name not in NOT_STORED}
    content = {"model": model, "sequence_length": stored.sequence_length, "optimizer_steps": stored.optimizer_steps}
    (directory / FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_sidecar(directory: Path) -> Sidecar | None:
    """The sidecar in a directory, or None where there is none. Raises CheckpointError where it is not one."""
    path = directory / FILE
    if not path.is_file():
        return None
    values = read_json(path)
    if not values.keys() >= {"model"} or not isinstance(values["model"], dict):
        raise CheckpointError(f"{path} has no table `model`: it is not a file of ours; remove it and give --model")
    counts = {name: values.get(name, 0) for name in ("sequence_length", "optimizer_steps")}
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count <= MAX_SIZE:
            raise CheckpointError(f"{path}: {name} = {count!r} is not a count")
    return Sidecar(architecture(values["model"], path), **counts)


def architecture(values: dict[str, Any], origin: Path | str) -> ModelConfig:
    """The architecture with the fields `values` of ModelConfig. Raises CheckpointError where there can't be one."""
    try:
        model = from_dict({"model": values}, str(origin)).model
        validate_model(dataclasses.replace(RunConfig(), model=model))
    except ConfigError as error:
        raise CheckpointError(f"{origin}: the architecture in it can't be: {error}") from error
    sizes = {name: getattr(model, name) for name in ("hidden_size", "num_heads", "ffn_hidden_size", "vocab_size")}
    absurd = [f"{name} {size:,}" for name, size in sizes.items() if size > MAX_SIZE]
    if model.num_layers > MAX_LAYERS or absurd:
        raise CheckpointError(f"{origin}: no model has {absurd[0] if absurd else f'{model.num_layers:,} layers'}")
    return model


def check_agreement(model: ModelConfig, told: dict[str, Any], origin: Path | str) -> None:
    """Raises ConfigError naming the fields of a given architecture in which the file `origin` says something else."""
    given = {name: getattr(model, name) for name in told}
    different = [f"{name} is {told[name]}, not {given[name]}" for name in told if told[name] != given[name]]
    if different:
        raise ConfigError(f"{origin} is of another model than the given one: {'; '.join(different)}; change --model")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file. Raises CheckpointError naming the file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a file of its kind has less than {MAX_BYTES:,}")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no object, but {type(values).__name__}")
    return values
