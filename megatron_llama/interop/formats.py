"""The formats by name, and a conversion from one to another."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from megatron_llama.interop.stored_model import Options, StoredModel
from parallel.checkpoint.files import fsync_directory
from parallel.errors import CheckpointError, ConfigError

MODULES = {  # imported when they are asked for: some need packages that are optional
    "native": "native",
    "hf": "hugging_face",
    "meta": "meta",
    "megatron": "megatron_dist",
    "megatron-legacy": "megatron_legacy",
    "deepspeed-universal": "deepspeed_universal",
    "deepspeed-zero": "deepspeed_zero",
    "dcp": "dcp",
}


def format_named(name: str) -> ModuleType:
    """The module of a format. Raises ConfigError for a name that is none, or where its package is not installed."""
    if name not in MODULES:
        raise ConfigError(f"format {name!r} is not one of {', '.join(MODULES)}")
    try:
        return import_module(f"megatron_llama.interop.{MODULES[name]}")
    except ModuleNotFoundError as error:
        raise ConfigError(f"format {name} needs the package {error.name}: pip install {error.name}") from error


def open_stored(name: str, path: Path, options: Options) -> StoredModel:
    """The model at `path` in the format `name`, checked for names and shapes. Raises CheckpointError and ConfigError."""
    if not Path(path).exists():
        raise CheckpointError(f"{path} does not exist")
    return format_named(name).read(Path(path), options).check()


def convert(stored: StoredModel, name: str, destination: Path, options: Options) -> None:
    """Write `stored` in the format `name` as the directory `destination`, which appears when it is complete."""
    module = format_named(name)
    if not hasattr(module, "write"):
        raise ConfigError(f"format {name} is only read: choose another for --to")
    with new_directory(Path(destination)) as directory:
        module.write(stored, directory, options)


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A directory that becomes `destination` by one rename at the end, and is removed on an error.

    Raises CheckpointError where `destination` exists.
    """
    destination = Path(destination)
    if destination.exists():
        raise CheckpointError(f"{destination} exists already: give another destination, or move it away")
    temporary = destination.with_name(f"{destination.name}.tmp-{secrets.token_hex(6)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _flush(temporary)
        os.rename(temporary, destination)
        fsync_directory(destination.parent)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Files and directories reach the disk before the rename that makes them visible."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(Path(folder) / name, "rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(folder))
