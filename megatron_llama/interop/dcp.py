"""A LLaMA as torchtitan keeps it: a folder of PyTorch's distributed checkpoint, with torchtitan's names.

    torchtitan, below `layers.N.`                ours, below `layers.N.`
    attention.qkv_linear.wq.weight, .wk, .wv     attention.wq, .wk, .wv     until spring 2026: attention.wq.weight
    attention.wo.weight                          attention.wo
    feed_forward.w1.weight, .w2, .w3             feed_forward.w1, .w2, .w3
    attention_norm.weight, ffn_norm.weight       attention_norm, ffn_norm

    tok_embeddings.weight, norm.weight           tok_embeddings, norm
    lm_head.weight                               output                     until spring 2026: output.weight
    optimizer.state.NAME.exp_avg, .exp_avg_sq, .step    the moments and the steps of AdamW

Rows of wq and wk are in interleaved RoPE order. A tied head is stored too. Today's names are written, both are read.

Source: torchtitan, torchtitan/models/llama3/state_dict_adapter.py, components/optimizer/utils.py (2026-08).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop.dcp_files import Chunk, DcpFolder, DcpTensor, write_dcp
from megatron_llama.interop.rope_order import to_half_split, to_interleaved
from megatron_llama.interop.sidecar import NOT_STORED, check_agreement, read_sidecar, write_sidecar
from megatron_llama.interop.stored_model import MOMENTS, Options, StoredModel, StoredTensor, logical_shapes
from parallel.errors import CheckpointError, ConfigError
from parallel.shards import Box

TODAY = {"attention.wq": "attention.qkv_linear.wq", "attention.wk": "attention.qkv_linear.wk"}
TODAY |= {"attention.wv": "attention.qkv_linear.wv", "output": "lm_head"}
BEFORE = {theirs: ours for ours, theirs in TODAY.items()}
TOKENIZER = "tokenizer.model"
OPTIMIZER = "optimizer.state."
OTHER_STATE = ("optimizer.", "lr_scheduler", "dataloader", "train_state", "freqs_cis", "rope.")  # of a run, and a buffer


def torchtitan_name(name: str) -> str:
    """`layers.0.attention.wq` -> `layers.0.attention.qkv_linear.wq.weight`."""
    found = re.fullmatch(r"(layers\.\d+\.)?(.+)", name)
    return f"{found[1] or ''}{TODAY.get(found[2], found[2])}.weight"


def our_name(key: str) -> str:
    """The inverse, of older names too; a key that is no weight's comes back as it is."""
    found = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", key.removeprefix("model."))
    return f"{found[1] or ''}{BEFORE.get(found[2], found[2])}" if found else key


def read(path: Path, options: Options) -> StoredModel:
    """The model in the folder `path`, with the optimizer's moments where all of them are there.

    Raises CheckpointError, and ConfigError where the architecture is not given and no file beside it tells it.
    """
    folder = DcpFolder(path)
    sidecar = read_sidecar(path)
    model = options.model or (sidecar and sidecar.model)
    if model is None:
        raise ConfigError(f"{path} does not tell the architecture: give --model PRESET or --config FILE")
    if sidecar and options.model:
        told = {name: value for name, value in asdict(sidecar.model).items() if name not in NOT_STORED}
        check_agreement(model, told, path)
    keys: dict[str, str] = {}
    for key in folder.tensors:
        if not key.startswith(OTHER_STATE):
            name = our_name(key)
            if name in keys:
                raise CheckpointError(f"{path} has {name} twice, as {keys[name]} and {key}")
            keys[name] = key
    weights = {name: _stored(folder.tensor(key), name, model) for name, key in keys.items()}
    if model.tie_embeddings and "output" in weights:
        _check_tied(path, weights.pop("output"), weights.get("tok_embeddings"))
    optimizer, steps = _read_optimizer(folder, keys, model)
    return StoredModel(
        origin=str(path),
        model=model,
        weights=weights,
        optimizer=optimizer,
        optimizer_steps=steps,
        sequence_length=sidecar.sequence_length if sidecar else 0,
        files={TOKENIZER: (path / TOKENIZER).read_bytes()} if (path / TOKENIZER).is_file() else {},
    )


def write(stored: StoredModel, directory: Path, options: Options) -> None:
    """Fill `directory`; a tensor or two are in memory at a time. Raises CheckpointError and OSError."""
    chunks = []
    for name in logical_shapes(stored.model):
        dtype = options.dtype or stored.weights[name].dtype
        chunks.append(_chunk(torchtitan_name(name), stored.weights[name], name, stored.model, dtype))
        for kind in MOMENTS if stored.optimizer else ():
            key = f"{OPTIMIZER}{torchtitan_name(name)}.{kind}"
            chunks.append(_chunk(key, stored.optimizer[f"{kind}/{name}"], name, stored.model, torch.float32))
        if stored.optimizer:
            chunks.append(_steps(f"{OPTIMIZER}{torchtitan_name(name)}.step", stored.optimizer_steps))
    if stored.model.tie_embeddings:
        table = stored.weights["tok_embeddings"]
        chunks.append(_chunk(torchtitan_name("output"), table, "output", stored.model, options.dtype or table.dtype))
    write_dcp(directory, chunks)
    write_sidecar(stored, directory)
    if TOKENIZER in stored.files:
        (directory / TOKENIZER).write_bytes(stored.files[TOKENIZER])


def _read_optimizer(folder: DcpFolder, keys: dict[str, str], model: ModelConfig) -> tuple[dict[str, StoredTensor], int]:
    """The moments of every weight and the steps; nothing where one is missing."""
    state = {name: f"{OPTIMIZER}{keys.get(name, '')}." for name in logical_shapes(model)}
    needed = [f"{prefix}{kind}" for prefix in state.values() for kind in (*MOMENTS, "step")]
    if not set(needed) <= set(folder.tensors):
        return {}, 0
    moments = {
        f"{kind}/{name}": _stored(folder.tensor(f"{prefix}{kind}"), name, model, torch.float32)
        for name, prefix in state.items()
        for kind in MOMENTS
    }
    steps = {_count(folder, f"{prefix}step") for prefix in state.values()}
    if len(steps) != 1:
        raise CheckpointError(f"{folder.path}: the optimizer made {min(steps)} steps on some weights, {max(steps)} on others")
    return moments, steps.pop()


def _count(folder: DcpFolder, key: str) -> int:
    tensor = folder.tensor(key)
    if tensor.shape not in ((), (1,)) or not 0 <= (count := tensor.read().item()) < 1 << 40:
        raise CheckpointError(f"{folder.path}: {key} is not a number of steps")
    return int(count)


def _stored(tensor: DcpTensor, name: str, model: ModelConfig, dtype: torch.dtype | None = None) -> StoredTensor:
    reorder = _reordering(to_half_split, name, model)
    dtype = dtype or tensor.dtype
    return StoredTensor(tensor.shape, dtype, lambda: reorder(tensor.read()).to(dtype))


def _chunk(key: str, tensor: StoredTensor, name: str, model: ModelConfig, dtype: torch.dtype) -> Chunk:
    reorder = _reordering(to_interleaved, name, model)
    return Chunk(key, tensor.shape, Box.whole(tensor.shape), dtype, lambda: reorder(tensor.load(dtype)).contiguous())


def _steps(key: str, steps: int) -> Chunk:
    return Chunk(key, (), Box((), ()), torch.float32, lambda: torch.tensor(float(steps)))


def _reordering(order: Callable[[Tensor, int], Tensor], name: str, model: ModelConfig) -> Callable[[Tensor], Tensor]:
    """`order` for the weights whose rows are turned, of the heads they have; nothing for others."""
    heads = {"wq": model.num_heads, "wk": model.num_kv_heads}.get(name.rpartition(".")[2])
    return (lambda tensor: order(tensor, heads)) if heads else (lambda tensor: tensor)


def _check_tied(path: Path, head: StoredTensor, table: StoredTensor | None) -> None:
    if table is None or head.shape != table.shape or not torch.equal(head.load(), table.load(head.dtype)):
        raise CheckpointError(f"{path}: the head is not the embedding, and the architecture ties them: give one that doesn't")
