"""Meta's own files: params.json and consolidated.NN.pth, one for each model-parallel rank (MP of them).

Names are ours with `.weight` behind them, and each shard holds

    wq, w1, w3, output     a run of rows
    wk, wv                 a run of rows, whole heads; where MP is above the key heads, MP / heads shards in a row hold the same
    wo, w2                 a run of columns
    tok_embeddings         a run of columns (LLaMA 1 and 2) or of rows (LLaMA 3): the shapes tell
    norms                  a copy

Rows of wq and wk are in interleaved RoPE order. A tied head is there a second time, as `output`.

Source: llama-models, models/llama3/model.py and models/checkpoint.py; llama, llama/model.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop.meta_params import LLAMA_3_THETA, read_params, write_params
from megatron_llama.interop.rope_order import to_half_split, to_interleaved
from megatron_llama.interop.sidecar import architecture, check_agreement, read_json, read_sidecar, write_sidecar
from megatron_llama.interop.stored_model import Options, StoredModel, StoredTensor, logical_shapes
from megatron_llama.interop.torch_files import load_torch_file, mapped_copy
from parallel.errors import CheckpointError, ConfigError

PARAMS, TOKENIZER = "params.json", "tokenizer.model"
IGNORED = ("rope.freqs",)  # a buffer in the files of LLaMA 1 and 2
SPLIT_DIM = {
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w3": 0,
    "w2": 1,
    "output": 0,
    "attention_norm": None,
    "ffn_norm": None,
    "norm": None,
}
Shards = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Layout:
    """How a model lies in Meta's files. `embedding_dim` is the dimension of tok_embeddings that is split."""

    model: ModelConfig
    mp: int
    embedding_dim: int

    def split_dim(self, name: str) -> int | None:
        """The dimension of our tensor `name` that is split over the files; None where each has a copy."""
        return self.embedding_dim if name == "tok_embeddings" else SPLIT_DIM[name.rsplit(".", 1)[-1]]

    def parts(self, name: str) -> int:
        """How many different parts it is split into."""
        if self.split_dim(name) is None:
            return 1
        return min(self.mp, self.model.num_kv_heads) if name.endswith((".wk", ".wv")) else self.mp

    def part_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each part of a tensor of a shape."""
        dim = self.split_dim(name)
        return tuple(size // self.parts(name) if i == dim else size for i, size in enumerate(shape))

    def heads(self, name: str) -> int:
        """How many heads have rotary pairs in the rows of a tensor; 0 where none is turned."""
        return {"wq": self.model.num_heads, "wk": self.model.num_kv_heads}.get(name.rsplit(".", 1)[-1], 0)

    def split(self, name: str, whole: Tensor) -> list[Tensor]:
        """What each of the files holds of our whole tensor `name`."""
        rows = to_interleaved(whole, self.heads(name)) if self.heads(name) else whole
        parts = rows.chunk(self.parts(name), self.split_dim(name) or 0)
        copies = self.mp // len(parts)
        return [parts[rank // copies] for rank in range(self.mp)]

    def join(self, name: str, held: list[Tensor]) -> Tensor:
        """The inverse of `split`. Raises CheckpointError where copies differ."""
        copies = self.mp // self.parts(name)
        for rank, tensor in enumerate(held):
            if rank % copies and not torch.equal(tensor, held[rank - 1]):
                raise CheckpointError(f"{name}.weight is not the same in files {rank - 1} and {rank}, which hold copies of it")
        rows = held[0] if len(held) == copies else torch.cat(held[::copies], self.split_dim(name))
        return to_half_split(rows, self.heads(name)) if self.heads(name) else rows


def read(path: Path, options: Options) -> StoredModel:
    """The model in the directory `path`; its files are mapped. Raises CheckpointError, and ConfigError for --model."""
    sidecar = read_sidecar(path)
    told = read_params(read_json(path / PARAMS), path / PARAMS)
    shards = [load_torch_file(file) for file in _shard_files(path)]
    _check_tables(path, shards)
    given = options.model or (sidecar.model if sidecar else None)
    embedding_dim = _embedding_dim(path, shards, told["hidden_size"])
    model = _model(path, told, given, shards, embedding_dim)
    layout = Layout(model, len(shards), embedding_dim)
    _check_tensors(path, shards, layout)
    tokenizer = next((file for file in (path / TOKENIZER, path.parent / TOKENIZER) if file.is_file()), None)
    return StoredModel(
        origin=str(path),
        model=model,
        weights={name: _lazy(path, shards, layout, name, shape) for name, shape in logical_shapes(model).items()},
        sequence_length=sidecar.sequence_length if sidecar else 0,
        files={TOKENIZER: tokenizer.read_bytes()} if tokenizer else {},
    )


def write(stored: StoredModel, directory: Path, options: Options) -> None:
    """Fill `directory` with params.json, `options.tp` files of weights, our sidecar, and the tokenizer.

    Raises ConfigError where the model can't be split so, or params.json can't tell its architecture.
    """
    model = stored.model
    of_llama_3 = model.rope_theta == LLAMA_3_THETA or model.rope_scaling_factor != 1.0
    layout = Layout(model, options.tp, 0 if of_llama_3 else 1)
    params = write_params(model)
    _check_split(layout, options)
    shards: Shards = [{} for _ in range(layout.mp)]
    for name, tensor in stored.weights.items():
        whole = tensor.load(options.dtype)
        names = ["tok_embeddings", "output"] if name == "tok_embeddings" and model.tie_embeddings else [name]
        for part_name in names:
            for shard, part in zip(shards, layout.split(part_name, whole), strict=True):
                shard[f"{part_name}.weight"] = mapped_copy(part, directory)
    for rank in range(layout.mp):
        torch.save(shards[rank], directory / f"consolidated.{rank:02d}.pth")
        shards[rank].clear()
    (directory / PARAMS).write_text(json.dumps(params) + "\n")
    write_sidecar(stored, directory)
    if TOKENIZER in stored.files:
        (directory / TOKENIZER).write_bytes(stored.files[TOKENIZER])


def _shard_files(path: Path) -> list[Path]:
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"{path} has no consolidated.00.pth: it is not a directory of Meta's weights")
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(files))]
    if [file.name for file in files] != expected:
        missing = next(name for name in expected if not (path / name).exists())
        raise CheckpointError(f"{path} has {len(files)} files of weights, but not {missing}: copy it from the source")
    return files


def _check_tables(path: Path, shards: Shards) -> None:
    """Each file is a table of plain tensors; those of the vocabulary have the same shape in each."""
    for rank, shard in enumerate(shards):
        if not isinstance(shard, dict) or not isinstance(shard.get("tok_embeddings.weight"), Tensor):
            raise CheckpointError(f"{path}/consolidated.{rank:02d}.pth is not a table of tensors with tok_embeddings.weight")
        for name, tensor in shard.items():
            dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
            if not dense or not (tensor.is_floating_point() and tensor.itemsize > 1):
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise CheckpointError(f"{path}/consolidated.{rank:02d}.pth: {name} is {kind}, not weights in 16 or 32 bits")
        for name in ("tok_embeddings.weight", "output.weight"):
            shape, first = (list(table[name].shape) if name in table else None for table in (shard, shards[0]))
            if shape != first or (shape and len(shape) != 2):
                raise CheckpointError(f"{path}/consolidated.{rank:02d}.pth: {name} is {shape}, in the first file {first}")


def _model(path: Path, told: dict[str, Any], given: ModelConfig | None, shards: Shards, embedding_dim: int) -> ModelConfig:
    """The architecture: the given one where there is one, which must agree with the files."""
    has_output, same_table = "output.weight" in shards[0], _same_table(shards, embedding_dim)
    vocabulary = "output.weight" if has_output else "tok_embeddings.weight"
    parts = len(shards) if has_output or embedding_dim == 0 else 1
    told = {"vocab_size": len(shards[0][vocabulary]) * parts} | told  # params.json of LLaMA 1 and 2 has none
    if given is not None:
        if told["rope_scaling_factor"] != 1.0 and given.rope_scaling_factor != 1.0:
            del told["rope_scaling_factor"]  # params.json doesn't tell the factor
        check_agreement(given, told if same_table else told | {"tie_embeddings": not has_output}, path / PARAMS)
        return given
    told["tie_embeddings"] = same_table or not has_output
    if told["tie_embeddings"] and told["rope_scaling_factor"] != 1.0:
        raise ConfigError(
            f"{path / PARAMS}: LLaMA 3.2 scales rotary frequencies by 32, LLaMA 3.1 by 8, and Meta's files don't say which: "
            "give --model llama-3.2-1b, llama-3.2-3b, or --config FILE"
        )
    return architecture(told, path / PARAMS)


def _same_table(shards: Shards, embedding_dim: int) -> bool:
    """Whether the head has the values of the embedding, as where it is tied."""
    if "output.weight" not in shards[0]:
        return False
    tables = [shard["tok_embeddings.weight"] for shard in shards]
    rows = len(shards[0]["output.weight"])
    for rank, shard in enumerate(shards):  # the first rows end it where they differ
        columns = [table[rank * rows : (rank + 1) * rows] for table in tables]
        part = tables[rank] if embedding_dim == 0 else torch.cat(columns, 1)
        if not torch.equal(part, shard["output.weight"]):
            return False
    return True


def _embedding_dim(path: Path, shards: Shards, hidden_size: int) -> int:
    shape = tuple(shards[0]["tok_embeddings.weight"].shape)
    for dim, columns in ((0, hidden_size), (1, hidden_size // len(shards))):
        if shape[1:] == (columns,):
            return dim
    raise CheckpointError(
        f"{path}: tok_embeddings.weight is {list(shape)} in consolidated.00.pth; {len(shards)} files of a model with dim "
        f"{hidden_size} have {hidden_size} or {hidden_size // len(shards)} columns: is a file missing?"
    )


def _check_tensors(path: Path, shards: Shards, layout: Layout) -> None:
    """The names and shapes of every file are those of the layout."""
    shapes = {f"{name}.weight": layout.part_shape(name, shape) for name, shape in logical_shapes(layout.model).items()}
    if "output.weight" in shards[0]:
        shapes |= {"output.weight": layout.part_shape("output", (layout.model.vocab_size, layout.model.hidden_size))}
    for rank, shard in enumerate(shards):
        file = path / f"consolidated.{rank:02d}.pth"
        missing, unknown = shapes.keys() - shard.keys(), shard.keys() - shapes.keys() - set(IGNORED)
        for names, kind in ((missing, "lacks"), (unknown, "has, and the architecture has not,")):
            if names:
                raise CheckpointError(f"{file} {kind} {len(names)} tensors: {', '.join(sorted(names)[:3])}")
        for name, shape in shapes.items():
            found, first = shard[name], shards[0][name]
            if tuple(found.shape) != shape or found.dtype != first.dtype:
                wanted = f"{list(shape)} {first.dtype}"
                raise CheckpointError(f"{file}: {name} is {list(found.shape)} {found.dtype}; {len(shards)} files need {wanted}")


def _lazy(path: Path, shards: Shards, layout: Layout, name: str, shape: tuple[int, ...]) -> StoredTensor:
    held = [shard[f"{name}.weight"] for shard in shards]

    def load() -> Tensor:
        try:
            return layout.join(name, held)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    return StoredTensor(shape, held[0].dtype, load)


def _check_split(layout: Layout, options: Options) -> None:
    model, mp = layout.model, layout.mp
    if options.pp != 1:
        raise ConfigError(f"--pp {options.pp}: Meta's files are split by --tp alone; leave --pp out")
    divided = {
        "num_heads": model.num_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size if layout.embedding_dim == 1 else 0,
    }
    for name, size in divided.items():
        if size % mp:
            raise ConfigError(f"--tp {mp}: Meta's files hold equal parts, and model.{name} is {size}; take another --tp")
    heads = model.num_kv_heads
    if heads % mp and mp % heads:
        raise ConfigError(f"--tp {mp}: model.num_kv_heads is {heads}, so neither divides the other; take --tp {heads}")
