"""A Llama as transformers keeps it: a folder with config.json, safetensors (or pytorch_model.bin) and the tokenizer's files.

Shapes and the order of the rows of q and k are ours; only names differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llama.interop.hugging_face_config import read_model, read_sequence_length, written_config
from megatron_llama.interop.hugging_face_tokenizer import (
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    generation_config,
    generation_ids,
    text_ids,
    tokenizer_files,
)
from megatron_llama.interop.safetensors_files import read_safetensors, stored_bytes, write_safetensors
from megatron_llama.interop.sidecar import read_json
from megatron_llama.interop.stored_model import Options, StoredModel, StoredTensor, logical_shapes
from megatron_llama.interop.torch_files import load_torch_file
from parallel.checkpoint.manifest import dtype_name
from parallel.errors import CheckpointError

LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OTHER_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
OUR_LAYER_NAMES = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
OUR_OTHER_NAMES = {f"{theirs}.weight": ours for ours, theirs in OTHER_NAMES.items()}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_FILE_BYTES = 64 << 20  # of a tokenizer's file

Tensors = Mapping[str, StoredTensor]


def hugging_face_name(name: str) -> str:
    """`layers.3.attention.wq` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in OTHER_NAMES:
        return f"{OTHER_NAMES[name]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest]}.weight"


def our_name(name: str) -> str:
    """The inverse of `hugging_face_name`; a name that it doesn't give comes back as it is."""
    found = re.fullmatch(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)\.weight", name)
    if found and found[2] in OUR_LAYER_NAMES:
        return f"layers.{found[1]}.{OUR_LAYER_NAMES[found[2]]}"
    return OUR_OTHER_NAMES.get(name, name)


def read(path: Path, options: Options) -> StoredModel:
    """The model in the folder `path`. Raises CheckpointError for one that is incomplete, or asks for what we don't have."""
    origin = path / "config.json"
    fields = read_json(origin)
    model = read_model(fields, str(origin))
    weights = {our_name(name): tensor for name, tensor in _tensors(path).items() if not name.endswith("rotary_emb.inv_freq")}
    for name, tensor in weights.items():
        if tensor.dtype not in DTYPES:
            known = ", ".join(map(dtype_name, DTYPES))
            raise CheckpointError(f"{path}: {name} is in {dtype_name(tensor.dtype)}; only {known} can be read")
    if model.tie_embeddings and "output" in weights:
        _check_tied(path, weights.pop("output"), weights.get("tok_embeddings"))
    return StoredModel(
        origin=str(path),
        model=model,
        weights=weights,
        sequence_length=read_sequence_length(fields, str(origin)),
        files=read_files(path, fields),
    )


def write(stored: StoredModel, directory: Path, options: Options) -> None:
    """Fill `directory`; one tensor is in memory at a time. Raises CheckpointError, DataError and OSError."""
    named = {hugging_face_name(name): stored.weights[name] for name in logical_shapes(stored.model)}
    shards = list(_shards(named, options))
    for number, shard in enumerate(shards, start=1):
        write_safetensors(directory / _shard_name(number, len(shards)), shard, options.dtype)
    if len(shards) > 1:
        places = {name: _shard_name(i, len(shards)) for i, shard in enumerate(shards, start=1) for name in shard}
        total = sum(stored_bytes(tensor, options.dtype) for tensor in named.values())
        _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    dtype = options.dtype or reduce(torch.promote_types, (tensor.dtype for tensor in named.values()))
    files = tokenizer_files(stored.files)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    config = written_config(stored.model, stored.sequence_length, dtype, generation_ids(files))
    _write_json(directory / "config.json", config)


def _tensors(folder: Path) -> Tensors:
    """All tensors, under their names. A folder that has both kinds of files is read from the safetensors."""
    kinds: dict[str, Callable[[Path], Tensors]] = {
        "model.safetensors": read_safetensors,
        "pytorch_model.bin": _read_torch_file,
    }
    for name, read_file in kinds.items():
        if (folder / name).is_file():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed_tensors(index, Path(name).suffix, read_file)
    raise CheckpointError(f"{folder} holds none of {', '.join(f'{name}, {name}.index.json' for name in kinds)}")


def _indexed_tensors(index: Path, suffix: str, read_file: Callable[[Path], Tensors]) -> Tensors:
    """The tensors that an index lists, from the files where it says they are, all of them beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{index}: weight_map is not an object of file names")
    shards: dict[str, Tensors] = {}
    for place in sorted(set(places.values())):
        if Path(place).name != place or not place.endswith(suffix):
            raise CheckpointError(f"{index}: {place[:300]!r} is not the name of a {suffix} file in the same folder")
        if not (index.parent / place).is_file():
            raise CheckpointError(f"{index}: the file {place} is missing: is the download complete?")
        shards[place] = read_file(index.parent / place)
    absent = next((name for name, place in places.items() if name not in shards[place]), None)
    if absent is not None:
        raise CheckpointError(f"{index}: {absent[:300]} is not in {places[absent]}")
    return {name: shards[place][name] for name, place in places.items()}


def _read_torch_file(path: Path) -> Tensors:
    """The tensors of a state dict, mapped: they are read when they are used."""
    content = load_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no state dict")
    return {str(name): _mapped(path, name, value) for name, value in content.items()}


def _mapped(path: Path, name: object, value: object) -> StoredTensor:
    whole = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
    if not whole or value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise CheckpointError(f"{path}: {str(name)[:300]} is not a whole, dense tensor")
    return StoredTensor(tuple(value.shape), value.dtype, value.detach().contiguous)


def _check_tied(path: Path, head: StoredTensor, table: StoredTensor | None) -> None:
    """Some writers store a tied head too; then it has to be the table."""
    if table is None or head.shape != table.shape or not torch.equal(head.load(), table.load(head.dtype)):
        text = "tie_word_embeddings is true, and lm_head.weight is not model.embed_tokens.weight"
        raise CheckpointError(f"{path}: {text}: set tie_word_embeddings to false in config.json if the head is its own")


def read_files(path: Path, fields: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files in the folder `path`, and the ids that end a text; `fields` are those of config.json."""
    files = {}
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if (path / name).is_file():
            if (path / name).stat().st_size > MAX_FILE_BYTES:
                raise CheckpointError(f"{path / name} has more than {MAX_FILE_BYTES} bytes")
            files[name] = (path / name).read_bytes()
    if text_ids(fields):
        files.setdefault(GENERATION_CONFIG, generation_config(fields))
    if "tokenizer.json" in files:  # ours are told apart by their content, and called tokenizer.model
        files.setdefault("tokenizer.model", files["tokenizer.json"])
    return files


def _shards(tensors: Tensors, options: Options) -> Iterator[dict[str, StoredTensor]]:
    """The tensors in turn, each shard filled up to `options.max_shard_bytes`; none is cut."""
    shard: dict[str, StoredTensor] = {}
    filled = 0
    for name, tensor in tensors.items():
        size = stored_bytes(tensor, options.dtype)
        if shard and filled + size > options.max_shard_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = tensor
        filled += size
    yield shard


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
