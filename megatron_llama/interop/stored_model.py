"""A model on disk, in whatever format: its architecture, and its tensors, each read when it is asked for.

Every format is a module with

    read(path, options) -> StoredModel          look, check, and return; no tensor is read yet
    write(stored, directory, options) -> None   fill the new, empty `directory`

so a conversion is one format's `read` and another's `write`, and needs the memory of a few tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_llama.config import ModelConfig
from parallel.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StoredTensor:
    """A whole logical tensor. `read` opens its files, and returns it on the CPU in `dtype`; nothing is kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read it, in `dtype` where given. Raises CheckpointError as the format's reader does, and where fp16 overflows."""
        tensor = self.read()
        assert tuple(tensor.shape) == self.shape and tensor.dtype == self.dtype, "a format's reader broke its word"
        if dtype is None or dtype == self.dtype:
            return tensor
        if dtype == torch.float16 and (largest := tensor.abs().max().item()) > torch.finfo(dtype).max:
            raise CheckpointError(f"a weight of {largest:.3g} is too large for fp16: convert to bf16 or fp32")
        return tensor.to(dtype)


@dataclass(frozen=True)
class StoredModel:
    """What a conversion carries over.

    `weights`: under our names (`layers.0.attention.wq`), all of `logical_shapes(model)` and nothing else; vocabulary rows
    without padding, the rows of q and k in half-split RoPE order (Hugging Face's). `optimizer`: AdamW's moments in fp32,
    `exp_avg/NAME` and `exp_avg_sq/NAME` for each weight, or nothing. `files`: small files to keep beside it, such as
    tokenizer.model.
    """

    origin: str  # for messages: where it was found
    model: ModelConfig
    weights: Mapping[str, StoredTensor]
    optimizer: Mapping[str, StoredTensor] = field(default_factory=dict)
    optimizer_steps: int = 0
    sequence_length: int = 0  # tokens; 0 where the format does not say
    files: Mapping[str, bytes] = field(default_factory=dict)

    def check(self) -> StoredModel:
        """Itself. Raises CheckpointError naming tensors that are missing, of another shape, or not of this model."""
        shapes = logical_shapes(self.model)
        _compare(self.origin, "weights", self.weights, shapes)
        if self.optimizer:
            moments = {f"{kind}/{name}": shape for kind in MOMENTS for name, shape in shapes.items()}
            _compare(self.origin, "moments of the optimizer", self.optimizer, moments)
        return self


@dataclass(frozen=True)
class Options:
    """What a user may say about a conversion; each format takes what concerns it.

    `dtype`: of the weights written; None keeps the source's. `tp`, `pp`: into how many parts the result is split, where its
    format is split. `model`: the architecture, for sources that don't tell it. `step`: of a native result.
    `max_shard_bytes`: of one safetensors file, for results in several. `transformer_impl`: transformer_engine or local, as the
    Megatron-LM run has it that will read a megatron-legacy result.
    """

    dtype: torch.dtype | None = None
    tp: int = 1
    pp: int = 1
    model: ModelConfig | None = None
    step: int = 0
    max_shard_bytes: int = 5_000_000_000
    transformer_impl: str = "transformer_engine"


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a model, in the order of the forward pass."""
    hidden, queries, keys = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    block = {
        "attention_norm": (hidden,),
        "attention.wq": (queries, hidden),
        "attention.wk": (keys, hidden),
        "attention.wv": (keys, hidden),
        "attention.wo": (hidden, queries),
        "ffn_norm": (hidden,),
        "feed_forward.w1": (model.ffn_hidden_size, hidden),
        "feed_forward.w3": (model.ffn_hidden_size, hidden),
        "feed_forward.w2": (hidden, model.ffn_hidden_size),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["norm"] = (hidden,)
    if not model.tie_embeddings:
        shapes["output"] = (model.vocab_size, hidden)
    return shapes


def _compare(origin: str, what: str, found: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing, further = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or further:
        texts = [
            f"{len(names)} {kind} ({_some(names)})" for names, kind in ((missing, "missing"), (further, "unknown")) if names
        ]
        raise CheckpointError(f"{origin}: of {len(shapes)} {what}: {', '.join(texts)}: is the architecture right?")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise CheckpointError(f"{origin}: {name} is {list(found[name].shape)}, the architecture says {list(shape)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
