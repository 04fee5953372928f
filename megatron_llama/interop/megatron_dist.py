"""A LLaMA as Megatron-Core saves it today ("torch_dist"): a folder of PyTorch's DCP and Megatron-LM's arguments.

    latest_checkpointed_iteration.txt    a number, or "release" for weights without a run
    iter_0001000/ (or release/)
        .metadata, *.distcp              the tensors, see dcp_files.py
        common.pt                        the arguments (since 2026 an object among the tensors)
        metadata.json                    {"sharded_backend": "torch_dist", ...}

Names are those of `megatron_layout`, with Transformer Engine's for the norms before a linear. All layers are stacked in
tensors with a leading dimension, `decoder.layers.mlp.linear_fc1.weight` [layers, 2 f, d], or each is there with its number.
The layout of the run does not show: each tensor is whole. Only weights are carried; the optimizer's state is not.

Source: megatron-core 0.16, core/dist_checkpointing; core/transformer/{transformer_block,transformer_layer,mlp}.py.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop.dcp_files import Chunk, DcpFolder, DcpTensor, write_dcp
from megatron_llama.interop.megatron_args import load_megatron_file, load_megatron_object, read_args, written_args
from megatron_llama.interop.megatron_layout import (
    LOCAL_NAMES,
    CoreTensor,
    core_tensors,
    fuse,
    local_name,
    padded,
    padded_vocabulary,
    part_of,
)
from megatron_llama.interop.stored_model import Options, StoredModel, StoredTensor
from parallel.errors import CheckpointError
from parallel.shards import Box

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
COMMON, COMMON_OBJECT = "common.pt", "common_state/shard_0_1"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
BACKEND |= {"common_backend": "torch", "common_backend_version": 1}
CONTENT = {"singleton_local_shards": False, "non_homogeneous_layers": False}
FUSED_NAMES = {local: fused for fused, local in LOCAL_NAMES.items()}
TOKENIZER = "tokenizer.model"
LAYERS = "decoder.layers."
# Where Transformer Engine keeps state of FP8; Megatron asks for it even where there is none.
EXTRA_STATE = tuple(f"self_attention.{name}" for name in ("linear_qkv", "core_attention", "linear_proj"))
EXTRA_STATE += ("mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class Source:
    """Where a whole tensor of Megatron-Core lies: in `tensors`, one below the other, or in row `layer` of each of them."""

    tensors: tuple[DcpTensor, ...]
    layer: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *columns = self._shape(self.tensors[0])
        return (rows * len(self.tensors), *columns)

    def read(self) -> Tensor:
        parts = [tensor.read(self._box(tensor)).view(self._shape(tensor)) for tensor in self.tensors]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _shape(self, tensor: DcpTensor) -> tuple[int, ...]:
        return tensor.shape if self.layer is None else tensor.shape[1:]

    def _box(self, tensor: DcpTensor) -> Box:
        whole = Box.whole(tensor.shape)
        return whole if self.layer is None else Box((self.layer, *whole.offset[1:]), (1, *whole.shape[1:]))


def read(path: Path, options: Options) -> StoredModel:
    """The model in the folder `path`, or in the iteration that its tracker file names.

    Raises CheckpointError, and ConfigError where the arguments beside it don't tell the architecture.
    """
    directory = _iteration(path)
    folder = DcpFolder(directory)
    common, origin = _common(folder)
    model, sequence_length = read_args(common.get("args"), origin, options.model)
    sources = _sources(folder)
    weights: dict[str, StoredTensor] = {}
    for tensor in core_tensors(model):
        source = sources.pop(tensor.name, None)
        if source is None:
            raise CheckpointError(f"{directory} has no {tensor.name}: is the architecture right?")
        rows = source.shape[:1] if tensor.is_table and source.shape[:1] >= tensor.shape[:1] else tensor.shape[:1]
        if source.shape != rows + tensor.shape[1:]:
            expected = f"{'at least ' if tensor.is_table else ''}{list(tensor.shape)}"
            raise CheckpointError(f"{directory}: {tensor.name} is {list(source.shape)}, the architecture says {expected}")
        weights |= {part: _part(tensor, source, part, model) for part in tensor.parts}
    if sources:
        raise CheckpointError(f"{directory} has {next(iter(sources))}, which the architecture does not have")
    return StoredModel(
        origin=str(directory),
        model=model,
        weights=weights,
        sequence_length=sequence_length,
        files={TOKENIZER: (path / TOKENIZER).read_bytes()} if (path / TOKENIZER).is_file() else {},
    )


def write(stored: StoredModel, directory: Path, options: Options) -> None:
    """Fill `directory` with the release `stored`; the vocabulary is padded for `options.tp`, and any tp and pp can load it.

    A tensor or two are in memory at a time. Raises ConfigError where Megatron can't say the architecture, and OSError.
    """
    arguments = written_args(stored, options.tp)
    release = directory / RELEASE
    release.mkdir()
    write_dcp(release, list(_chunks(stored, options)), _extra_state(stored.model))
    common = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": CONTENT}
    torch.save(common, release / COMMON)
    (release / "metadata.json").write_text(json.dumps(BACKEND))
    (directory / TRACKER).write_text(RELEASE)
    if TOKENIZER in stored.files:
        (directory / TOKENIZER).write_bytes(stored.files[TOKENIZER])


def _iteration(path: Path) -> Path:
    """The folder of tensors at `path` or below it."""
    tracker = path / TRACKER
    if (path / ".metadata").is_file() or not tracker.is_file():
        return path
    name = tracker.read_text(errors="replace").strip()[:40]
    if name != RELEASE and not re.fullmatch(r"\d+", name):
        raise CheckpointError(f"{tracker} says {name!r}, which is no iteration: give the folder of one, iter_...")
    return path / (RELEASE if name == RELEASE else f"iter_{int(name):07d}")


def _common(folder: DcpFolder) -> tuple[dict, str]:
    """What is not a tensor, and where it is; nothing where it is in neither place."""
    path = folder.path / COMMON
    if path.is_file():
        return load_megatron_file(path), str(path)
    if COMMON_OBJECT in folder.objects:
        content, origin = folder.object(COMMON_OBJECT)
        return load_megatron_object(content, origin), origin
    return {}, str(folder.path)


def _sources(folder: DcpFolder) -> dict[str, Source]:
    """Every weight of the folder, by its name in the local spec, layer by layer."""
    sources: dict[str, Source] = {}
    for key in folder.tensors:
        name = local_name(key)
        if name is None or name.startswith(("optimizer.", "rng_state", "rerun_state")):
            continue
        name, tensors = _halves(folder, name, key)
        rest = name.removeprefix(LAYERS)
        if rest == name or rest.split(".", 1)[0].isdigit():
            sources[name] = Source(tensors)
        else:
            sources |= {f"{LAYERS}{layer}.{rest}": Source(tensors, layer) for layer in range(tensors[0].shape[0])}
    return sources


def _halves(folder: DcpFolder, name: str, key: str) -> tuple[str, tuple[DcpTensor, ...]]:
    """The tensor itself, or both halves of gate and up, which may be apart, as `linear_fc1.weight_w` and `_v`."""
    whole = name.removesuffix("_w").removesuffix("_v")
    if whole == name:
        return name, (folder.tensor(key),)
    keys = [key[:-1] + side for side in "wv"]
    halves = tuple(folder.tensor(half) for half in keys if half in folder.tensors)
    if len(halves) != 2 or halves[0].shape != halves[1].shape:
        raise CheckpointError(f"{folder.path}: {' and '.join(keys)} are not two halves of the same shape")
    return whole, halves


def _part(tensor: CoreTensor, source: Source, part: str, model: ModelConfig) -> StoredTensor:
    whole = torch.empty(source.shape, device="meta")
    shape = tuple(part_of(tensor, whole, part, model).shape)
    return StoredTensor(shape, source.dtype, lambda: part_of(tensor, source.read(), part, model))


def _chunks(stored: StoredModel, options: Options) -> Iterator[Chunk]:
    """Layers stacked, as Megatron saves them; each layer is a chunk."""
    rows = padded_vocabulary(stored.model.vocab_size, options.tp)
    for tensor in core_tensors(stored.model):
        parts = [stored.weights[part] for part in tensor.parts]
        dtype = options.dtype or reduce(torch.promote_types, (part.dtype for part in parts))
        shape = (rows, *tensor.shape[1:]) if tensor.is_table else tensor.shape
        found = re.fullmatch(rf"{re.escape(LAYERS)}(\d+)\.(.+)", tensor.name)
        box = Box.whole(shape)
        key = tensor.name
        if found:
            key = LAYERS + FUSED_NAMES.get(found[2], found[2])
            box, shape = Box((int(found[1]), *box.offset), (1, *shape)), (stored.model.num_layers, *shape)
        yield Chunk(key, shape, box, dtype, _fusing(tensor, parts, stored.model, dtype, box.shape))


def _fusing(tensor: CoreTensor, parts: Sequence[StoredTensor], model: ModelConfig, dtype: torch.dtype, shape: tuple[int, ...]):
    def make() -> Tensor:
        whole = fuse(tensor, [part.load(dtype) for part in parts], model)
        return (padded(whole, shape[0]) if tensor.is_table else whole).reshape(shape)

    return make


def _extra_state(model: ModelConfig) -> dict[str, bytes]:
    nothing = io.BytesIO()
    torch.save([None], nothing)
    shards = [f"shard_{layer}_{model.num_layers}" for layer in range(model.num_layers)]
    keys = [f"{LAYERS}{name}._extra_state/{shard}" for name in EXTRA_STATE for shard in shards]
    return {key: nothing.getvalue() for key in (*keys, "decoder.final_layernorm._extra_state/shard_0_1")}
