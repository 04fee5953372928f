"""Our own checkpoints as one end of a conversion: read in whatever layout they are, written as one process would.

What is written is a checkpoints root with one step in it, so `checkpoint.load`, `checkpoint.weights_from` and `--checkpoint`
take the destination as it was given. It has no position in any data: a run that loads it begins at the first sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_llama.config import RunConfig, TrainConfig, to_dict
from megatron_llama.interop.stored_model import Options, StoredModel, StoredTensor
from megatron_llama.runtime import DTYPES
from megatron_llama.state import Position, stored_config
from parallel.checkpoint.files import tensor_bytes
from parallel.checkpoint.load import read_extra_file
from parallel.checkpoint.offline import META, StepReader, write_offline
from parallel.checkpoint.save import Groups
from parallel.checkpoint.steps import resolve_checkpoint
from parallel.shards import Box, TensorBox

GROUPS = ("weights", "optimizer")


def read(path: Path, options: Options) -> StoredModel:
    """The checkpoint that `path` means: a step directory, or the newest of a checkpoints root or a run directory.

    Moments are there where their files are; a copy without them serves as well. Raises CheckpointError.
    """
    directory = resolve_checkpoint(path, groups=("weights",))
    reader = StepReader(directory, groups=("weights",))
    manifest = reader.manifest
    config = stored_config(directory, manifest)
    groups: dict[str, dict[str, StoredTensor]] = {group: {} for group in GROUPS}
    for name, info in manifest.tensors.items():
        groups.setdefault(info.group, {})[name] = StoredTensor(info.shape, info.dtype, partial(reader.read, name))
    has_moments = all((directory / name).is_file() for name in manifest.files)
    return StoredModel(
        origin=str(directory),
        model=config.model,
        weights=groups["weights"],
        optimizer=groups["optimizer"] if has_moments else {},
        optimizer_steps=manifest.state.get("optimizer_steps", 0),
        sequence_length=config.train.sequence_length,
        files={name: read_extra_file(directory, name, manifest) for name in manifest.extra_files},
    )


def write(stored: StoredModel, directory: Path, options: Options) -> None:
    """Write step `options.step` under the checkpoints root `directory`, in files of about `options.max_shard_bytes`.

    Weights are stored in `options.dtype`, or as they are; moments in fp32. Memory: one tensor. Raises CheckpointError.
    """
    tensors = {**stored.weights, **stored.optimizer}
    items = [_item(name, tensor, options.dtype) for name, tensor in stored.weights.items()]
    moments = [_item(name, tensor, torch.float32) for name, tensor in stored.optimizer.items()]
    staging = torch.empty(0, dtype=torch.uint8)  # whole tensors in host memory need none

    def bytes_of(item: TensorBox) -> Iterator[memoryview]:
        return tensor_bytes(tensors[item.name].load(item.tensor.dtype).contiguous(), staging)

    parts: list[Groups] = [{"weights": part} for part in _cut(items, options.max_shard_bytes)]
    parts += [{"optimizer": part} for part in _cut(moments, options.max_shard_bytes)]
    write_offline(directory, options.step, parts, bytes_of, _state(stored, options), stored.files)


def _item(name: str, tensor: StoredTensor, dtype: torch.dtype | None) -> TensorBox:
    place = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=META)
    return TensorBox(name, tensor.shape, Box.whole(tensor.shape), place)


def _cut(items: Sequence[TensorBox], limit: int) -> Iterator[list[TensorBox]]:
    """Runs of items of at most `limit` bytes together, or of one item that has more."""
    part: list[TensorBox] = []
    for item in items:
        if part and sum(other.tensor.nbytes for other in part) + item.tensor.nbytes > limit:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def _state(stored: StoredModel, options: Options) -> dict[str, Any]:
    """The manifest's state: what a run of this model would have said before it has read any data."""
    dtype = options.dtype or stored.weights["tok_embeddings"].dtype
    names = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
    train = TrainConfig(dtype=names.get(dtype, "fp32"))
    if stored.sequence_length:
        train = dataclasses.replace(train, sequence_length=stored.sequence_length)
    return {
        "position": dataclasses.asdict(Position(step=options.step)),
        "optimizer_steps": stored.optimizer_steps,
        "loss_scale": None,
        "config": to_dict(RunConfig(model=stored.model, train=train)),
        "world_size": 1,
        "dataset": {},
    }
