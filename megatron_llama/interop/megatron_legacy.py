"""Megatron-LM's older checkpoints (`--ckpt-format torch`): one file of torch.save for each tensor and pipeline rank.

    latest_checkpointed_iteration.txt           an iteration, or `release`
    iter_0001000/ or release/
        mp_rank_TT/ or mp_rank_TT_PPP/          tensor rank, pipeline rank (where there are several stages)
            model_optim_rng.pt                  {"args": Namespace, "checkpoint_version": 3.0, "model": {name: shard}, ...}

A stage counts its layers from 0; with interleaved stages a file has `model0`, `model1`, ... instead of `model`. Names are those
of Megatron-Core (megatron_layout), of its local spec or of Transformer Engine's, or older still, `language_model.*`, with the
same matrices. The optimizer's state is not carried: its parts are flat ranges that depend on the run's layout.

Not read: checkpoint versions below 2, with another order of the rows of q, k and v, and Alibaba's Megatron-LLaMA, whose fused
q, k and v are three blocks per tensor rank instead of a run of groups (it writes version 3 too: nothing in the file tells).

Source: Megatron-LM, megatron/training/checkpointing.py, megatron/legacy/model/language_model.py and transformer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop.megatron_args import load_megatron_file, read_args, written_args
from megatron_llama.interop.megatron_layout import (
    EMBEDDING,
    FINAL_NORM,
    LOCAL_NAMES,
    OUTPUT,
    CoreTensor,
    core_tensors,
    fuse,
    join_part,
    local_name,
    padded,
    padded_vocabulary,
    renumbered,
    shard,
)
from megatron_llama.interop.sidecar import read_sidecar, write_sidecar
from megatron_llama.interop.stored_model import Options, StoredModel, StoredTensor, logical_shapes
from megatron_llama.interop.torch_files import mapped_copy
from parallel.errors import CheckpointError, ConfigError

TRACKER, RELEASE, FILE, TOKENIZER = "latest_checkpointed_iteration.txt", "release", "model_optim_rng.pt", "tokenizer.model"
CHECKPOINT_VERSION = 3.0
OLD_LAYERS = "language_model.encoder.layers."
OLD_LAYER = {
    "input_norm.weight": "input_layernorm.weight",
    "self_attention.query_key_value.weight": "self_attention.linear_qkv.weight",
    "self_attention.dense.weight": "self_attention.linear_proj.weight",
    "post_attention_norm.weight": "pre_mlp_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.linear_fc1.weight",
    "mlp.dense_4h_to_h.weight": "mlp.linear_fc2.weight",
}
OLD_NAMES = {
    "language_model.embedding.word_embeddings.weight": EMBEDDING,
    "language_model.encoder.final_norm.weight": FINAL_NORM,
    "language_model.encoder.final_layernorm.weight": FINAL_NORM,
    "language_model.output_layer.weight": OUTPUT,
    "word_embeddings_for_head.weight": OUTPUT,  # the last stage's copy of a tied table
}
TRANSFORMER_ENGINE_NAMES = {local: fused for fused, local in LOCAL_NAMES.items()}

Shards = dict[str, Tensor]  # of one rank, by Megatron-Core's names with the layers of the whole model


def read(path: Path, options: Options) -> StoredModel:
    """The model in the folder `path`, or in the iteration that its tracker file names; its files are mapped.

    Raises CheckpointError, and ConfigError where the arguments in it don't tell the architecture.
    """
    folder = _iteration_folder(path)
    grid = _rank_files(folder)
    tp, pp = len(grid), len(grid[0])
    files = [[load_megatron_file(file) for file in row] for row in grid]
    _check_version(grid[0][0], files[0][0])
    sidecar = read_sidecar(folder) or read_sidecar(folder.parent)
    given = options.model or (sidecar.model if sidecar else None)
    model, length = read_args(files[0][0].get("args"), str(grid[0][0]), given)
    ranks = [_whole_pipeline(grid[rank], files[rank]) for rank in range(tp)]
    weights = _weights(folder, ranks, model, pp)
    tokenizer = next((file for file in (folder / TOKENIZER, folder.parent / TOKENIZER) if file.is_file()), None)
    return StoredModel(
        origin=str(folder),
        model=model,
        weights=weights,
        sequence_length=length,
        files={TOKENIZER: tokenizer.read_bytes()} if tokenizer else {},
    )


def write(stored: StoredModel, directory: Path, options: Options) -> None:
    """Fill `directory` with a `release` of `options.tp` x `options.pp` files, the tracker file, our sidecar and the tokenizer.

    Norms have the names of `options.transformer_impl`. Raises ConfigError where Megatron can't split the model so.
    """
    model, tp, pp = stored.model, options.tp, options.pp
    _check_split(model, tp, pp)
    arguments = written_args(stored, tp, pp)
    arguments.transformer_impl = options.transformer_impl
    per_stage = model.num_layers // pp
    for stage in range(pp):
        ranks: list[Shards] = [{} for _ in range(tp)]
        for tensor in _stage_tensors(model, stage, pp):
            whole = fuse(tensor, [stored.weights[part].load(options.dtype) for part in tensor.parts], model)
            if tensor.is_table:
                whole = padded(whole, padded_vocabulary(model.vocab_size, tp))
            name = _spec_name(renumbered(tensor.name, -stage * per_stage), options.transformer_impl)
            for rank in range(tp):
                ranks[rank][name] = mapped_copy(shard(tensor, whole, tp, rank), directory)
        for rank in range(tp):
            folder = directory / RELEASE / (f"mp_rank_{rank:02d}" if pp == 1 else f"mp_rank_{rank:02d}_{stage:03d}")
            folder.mkdir(parents=True)
            content = {"args": arguments, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0, "model": ranks[rank]}
            torch.save(content, folder / FILE)
            ranks[rank].clear()
    (directory / TRACKER).write_text(RELEASE)
    write_sidecar(stored, directory)
    if TOKENIZER in stored.files:
        (directory / TOKENIZER).write_bytes(stored.files[TOKENIZER])


def _iteration_folder(path: Path) -> Path:
    """The folder with the ranks' folders: `path` itself, or the one that its tracker file names."""
    if any(path.glob("mp_rank_*")):
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(f"{path} has neither folders mp_rank_XX nor {TRACKER}: it is no checkpoint of Megatron-LM")
    text = tracker.read_text(errors="replace").strip()[:100]
    if text != RELEASE and not re.fullmatch(r"[0-9]{1,18}", text):
        raise CheckpointError(f"{tracker} says {text!r}, neither an iteration nor `{RELEASE}`")
    folder = path / (text if text == RELEASE else f"iter_{int(text):07d}")
    if not any(folder.glob("mp_rank_*")):
        kind = "a torch_dist checkpoint: use --from megatron" if (folder / ".metadata").exists() else "incomplete"
        raise CheckpointError(f"{folder} has no folders mp_rank_XX: it is {kind}")
    return folder


def _rank_files(folder: Path) -> list[list[Path]]:
    """The files by tensor rank and stage."""
    found = {}
    for place in folder.glob("mp_rank_*"):
        match = re.fullmatch(r"mp_rank_([0-9]{2,6})(?:_([0-9]{3,6}))?", place.name)
        if match is None:
            raise CheckpointError(f"{place}: not mp_rank_TT or mp_rank_TT_PPP (experts have a third number: not a LLaMA)")
        found[int(match[1]), int(match[2] or 0)] = place / FILE
    tp, pp = (max(ranks) + 1 for ranks in zip(*found, strict=True))
    if len(found) < tp * pp:
        t, p = next((t, p) for t in range(tp) for p in range(pp) if (t, p) not in found)
        raise CheckpointError(f"{folder} lacks the folder of tensor rank {t}, pipeline rank {p}")
    return [[found[t, p] for p in range(pp)] for t in range(tp)]


def _check_version(path: Path, content: Mapping[str, Any]) -> None:
    version = content.get("checkpoint_version", 0)
    if type(version) not in (int, float) or not 2.0 <= version <= CHECKPOINT_VERSION:
        raise CheckpointError(f"{path}: checkpoint_version {version!r}; only 2 and 3 are read: load and save it with Megatron")


def _whole_pipeline(paths: list[Path], stages: list[dict[str, Any]]) -> Shards:
    """All tensors of one tensor rank, its layers counted through the stages, and through interleaved ones in turn."""
    interleaved = [name for name in (f"model{i}" for i in range(len(stages[0]))) if name in stages[0]]
    tensors: Shards = {}
    first_layer = 0
    for chunk in interleaved or ["model"]:
        for path, stage in zip(paths, stages, strict=True):
            if not isinstance(stage.get(chunk), dict):
                raise CheckpointError(f"{path} holds no table {chunk!r} of weights")
            layers = set()
            for name, tensor in _core_named(path, stage[chunk]):
                layer = re.search(r"\blayers\.([0-9]{1,9})\.", name)
                layers |= {int(layer[1])} if layer else set()
                whole_name = renumbered(name, first_layer)
                if whole_name in tensors:
                    raise CheckpointError(f"{path}: {name} is there twice")
                tensors[whole_name] = tensor
            first_layer += len(layers)
    return tensors


def _core_named(path: Path, table: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights in a table, nested or not, under the names of Megatron-Core's local spec."""
    for name, value in _flat(table):
        if name.startswith(OLD_LAYERS):
            layer, _, rest = name.removeprefix(OLD_LAYERS).partition(".")
            name = f"decoder.layers.{layer}.{OLD_LAYER.get(rest, rest)}"
        name = local_name(OLD_NAMES.get(name, name))
        if name is None:
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
            raise CheckpointError(f"{path}: {name} is {type(value).__name__}, not a tensor of weights")
        yield name, value


def _flat(table: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Names and values of a table; `language_model` is nested: {"encoder": {"layers.0...": ...}}."""
    for key, value in table.items():
        if isinstance(value, dict) and depth < 4:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _weights(folder: Path, ranks: list[Shards], model: ModelConfig, pp: int) -> dict[str, StoredTensor]:
    """Our tensors from the shards of all tensor ranks, whose names, shapes and dtypes are checked."""
    tensors = {tensor.name: tensor for tensor in core_tensors(model)}
    copy = OUTPUT if model.tie_embeddings and pp > 1 else None
    for rank, shards in enumerate(ranks):
        missing, unknown = tensors.keys() - shards.keys(), shards.keys() - tensors.keys() - {copy}
        for names, kind in ((missing, "lacks"), (unknown, "has, and the architecture has not,")):
            if names:
                listed = ", ".join(sorted(names)[:3])
                raise CheckpointError(f"{folder}: tensor rank {rank} {kind} {len(names)} tensors: {listed}")
    shapes, weights = logical_shapes(model), {}
    for name, tensor in tensors.items():
        held = [shards[name] for shards in ranks]
        _check_shards(folder, tensor, held, model)
        tied = [shards[copy] for shards in ranks if copy in shards] if name == EMBEDDING else []
        for part in tensor.parts:
            load = partial(_load, folder, tensor, held, tied, part, model)
            weights[part] = StoredTensor(shapes[part], held[0].dtype, load)
    return weights


def _check_shards(folder: Path, tensor: CoreTensor, held: list[Tensor], model: ModelConfig) -> None:
    tp, shape = len(held), list(tensor.shape)
    if tensor.is_table and held[0].dim() == 2:
        shape[0] = max(len(held[0]) * tp, model.vocab_size)  # whatever the padding
    if tensor.split_dim is not None:
        shape[tensor.split_dim] //= tp
    for rank, found in enumerate(held):
        if list(found.shape) != shape or found.dtype != held[0].dtype:
            raise CheckpointError(
                f"{folder}: {tensor.name} is {list(found.shape)} {found.dtype} on tensor rank {rank}; the architecture says "
                f"{shape}, and rank 0 {held[0].dtype}"
            )


def _load(folder: Path, tensor: CoreTensor, held: list[Tensor], tied: list[Tensor], part: str, model: ModelConfig) -> Tensor:
    """Our tensor `part` in the shards `held`; `tied` are the same shards on the last stage, where the table is tied."""
    pairs = [(held[0], copy) for copy in held[1:]] if tensor.split_dim is None else list(zip(held, tied, strict=bool(tied)))
    for one, other in pairs:
        if not torch.equal(one, other):
            raise CheckpointError(f"{folder}: {tensor.name} is not the same on all ranks that hold copies of it")
    return join_part(tensor, held, part, model)


def _stage_tensors(model: ModelConfig, stage: int, pp: int) -> list[CoreTensor]:
    """The tensors of a pipeline stage; of a tied table the last stage has a copy."""
    tensors = core_tensors(model)
    layers = range(stage * model.num_layers // pp, (stage + 1) * model.num_layers // pp)
    prefixes = tuple(f"decoder.layers.{layer}." for layer in layers)
    mine = [tensor for tensor in tensors if tensor.name.startswith(prefixes)]
    if stage == 0:
        mine.insert(0, tensors[0])
    if stage == pp - 1:
        mine += [tensor for tensor in tensors if tensor.name in (FINAL_NORM, OUTPUT)]
        if model.tie_embeddings and pp > 1:
            mine.append(replace(tensors[0], name=OUTPUT))
    return mine


def _spec_name(name: str, transformer_impl: str) -> str:
    """The name of a tensor of the local spec in the spec of an implementation."""
    if transformer_impl == "transformer_engine":
        for local, fused in TRANSFORMER_ENGINE_NAMES.items():
            if name.endswith(f".{local}"):
                return name.removesuffix(local) + fused
    return name


def _check_split(model: ModelConfig, tp: int, pp: int) -> None:
    if model.num_layers % pp:
        raise ConfigError(f"--pp {pp}: Megatron's stages have equal parts, and model.num_layers is {model.num_layers}")
    for name in ("num_heads", "ffn_hidden_size"):
        if getattr(model, name) % tp:
            raise ConfigError(f"--tp {tp}: Megatron's ranks have equal parts, and model.{name} is {getattr(model, name)}")
    groups = model.num_kv_heads
    if groups % tp and tp % groups:
        raise ConfigError(f"--tp {tp}: model.num_kv_heads is {groups}, so neither divides the other; take --tp {groups}")
