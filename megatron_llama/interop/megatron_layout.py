"""Megatron-Core's tensors of a LLaMA: names, fused matrices, padded vocabulary and tensor-parallel shards.

Sizes below: d hidden, f feed-forward, D head_dim, H query heads, G key and value heads ("query groups"), V vocabulary rows.

    Megatron-Core, below `decoder.layers.N.`       ours, below `layers.N.`         shape              split over tp ranks
    input_layernorm.weight                         attention_norm                  [d]                no
    self_attention.linear_qkv.weight               attention.wq, .wk, .wv          [(H + 2 G) D, d]   rows
    self_attention.linear_proj.weight              attention.wo                    [d, H D]           columns
    pre_mlp_layernorm.weight                       ffn_norm                        [d]                no
    mlp.linear_fc1.weight                          feed_forward.w1 (gate), .w3     [2 f, d]           rows of each half
    mlp.linear_fc2.weight                          feed_forward.w2                 [d, f]             columns

    embedding.word_embeddings.weight               tok_embeddings                  [V padded, d]      rows
    decoder.final_layernorm.weight                 norm                            [d]                no
    output_layer.weight (not where it is tied)     output                          [V padded, d]      rows

`linear_qkv` goes group by group: the H / G query heads of the group, its key head, its value head. A tensor-parallel shard is
a run of its rows. `linear_fc1` as a whole is [gate; up]; the shard of a rank is [its gate rows; its up rows]. Both tables have
V rounded up to a multiple of 128 x tp; the rows above V are never used. Rows of q and k are in half-split order, as ours.

These are the names of Megatron-Core's local spec. With Transformer Engine the norms before a linear are parts of it:
`self_attention.linear_qkv.layer_norm_weight`, `mlp.linear_fc1.layer_norm_weight`; `local_name` tells what they are.

Source: megatron-core 0.16, core/transformer (attention.py, mlp.py), core/models/gpt; Megatron-LM, training/arguments.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop.stored_model import logical_shapes

VOCABULARY_MULTIPLE = 128  # Megatron's --make-vocab-size-divisible-by

QKV = "self_attention.linear_qkv.weight"
GATE_UP = "mlp.linear_fc1.weight"
LAYER = {
    "input_layernorm.weight": ("attention_norm",),
    QKV: ("attention.wq", "attention.wk", "attention.wv"),
    "self_attention.linear_proj.weight": ("attention.wo",),
    "pre_mlp_layernorm.weight": ("ffn_norm",),
    GATE_UP: ("feed_forward.w1", "feed_forward.w3"),
    "mlp.linear_fc2.weight": ("feed_forward.w2",),
}
EMBEDDING, FINAL_NORM, OUTPUT = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"
COLUMN_SPLIT = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
LOCAL_NAMES = {  # Transformer Engine's spec -> the local spec
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class CoreTensor:
    """A whole tensor of Megatron-Core: its `name`, our tensors in it, and the dimension that tp ranks split (None: copies).

    `shape` has no vocabulary padding.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    split_dim: int | None

    @property
    def is_qkv(self) -> bool:
        return len(self.parts) == 3

    @property
    def is_gate_up(self) -> bool:
        return len(self.parts) == 2

    @property
    def is_table(self) -> bool:
        """Whether its rows are the vocabulary."""
        return self.name in (EMBEDDING, OUTPUT)


def core_tensors(model: ModelConfig) -> list[CoreTensor]:
    """Every tensor of a model, in the order of the forward pass."""
    shapes = logical_shapes(model)
    named = {EMBEDDING: ("tok_embeddings",)}
    for layer in range(model.num_layers):
        named |= {
            f"decoder.layers.{layer}.{name}": tuple(f"layers.{layer}.{part}" for part in parts) for name, parts in LAYER.items()
        }
    named[FINAL_NORM] = ("norm",)
    if not model.tie_embeddings:
        named[OUTPUT] = ("output",)
    return [_core_tensor(name, parts, shapes) for name, parts in named.items()]


def _core_tensor(name: str, parts: tuple[str, ...], shapes: dict[str, tuple[int, ...]]) -> CoreTensor:
    rows, *columns = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
    split_dim = None if not columns else 1 if name.endswith(COLUMN_SPLIT) else 0
    return CoreTensor(name, parts, (rows, *columns), split_dim)


def local_name(name: str) -> str | None:
    """The name in the local spec of a tensor that may be of Transformer Engine's; None for state that is no weight.

    Such are Transformer Engine's `_extra_state` and stored rotary frequencies.
    """
    if name.endswith(("_extra_state", "rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")):
        return None
    for fused, local in LOCAL_NAMES.items():
        if name.endswith(f".{fused}"):
            return name.removesuffix(fused) + local
    return name


def renumbered(name: str, first_layer: int) -> str:
    """The name in the whole model of a tensor of a pipeline stage, which counts its layers from 0; and back (negative)."""
    return re.sub(r"\blayers\.([0-9]{1,9})\.", lambda found: f"layers.{int(found[1]) + first_layer}.", name, count=1)


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Rows of a vocabulary table in Megatron at a tensor-parallel size."""
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def fuse(tensor: CoreTensor, parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """The whole tensor, `tensor.shape`, from ours, in the order of `tensor.parts`."""
    if tensor.is_qkv:
        return fuse_qkv(*parts, model)
    return torch.cat(list(parts)) if tensor.is_gate_up else parts[0]


def part_of(tensor: CoreTensor, whole: Tensor, part: str, model: ModelConfig) -> Tensor:
    """Our tensor `part` in a whole one, which may have padded vocabulary rows: a view where that is possible."""
    if tensor.is_qkv:
        return split_qkv(whole, model)[tensor.parts.index(part)]
    if tensor.is_gate_up:
        return whole.chunk(2)[tensor.parts.index(part)]
    return whole[: model.vocab_size] if tensor.is_table else whole


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, model: ModelConfig) -> Tensor:
    """[H D, d], [G D, d], [G D, d] -> [(H + 2 G) D, d], group by group."""
    groups = [matrix.unflatten(0, (model.num_kv_heads, -1)) for matrix in (q, k, v)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def split_qkv(qkv: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `fuse_qkv`."""
    heads = model.num_heads // model.num_kv_heads
    groups = qkv.unflatten(0, (model.num_kv_heads, (heads + 2) * model.head_dim))
    q, k, v = groups.split([heads * model.head_dim, model.head_dim, model.head_dim], dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def padded(table: Tensor, rows: int) -> Tensor:
    """A vocabulary table with zeros below, [rows, d]."""
    return torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])


def shard(tensor: CoreTensor, whole: Tensor, tp: int, rank: int) -> Tensor:
    """What tp rank `rank` holds of a whole tensor (a table: padded): a view, except of gate and up."""
    if tensor.split_dim is None:
        return whole
    if tensor.is_gate_up:
        return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
    return whole.chunk(tp, tensor.split_dim)[rank]


def join_part(tensor: CoreTensor, shards: Sequence[Tensor], part: str, model: ModelConfig) -> Tensor:
    """Our tensor `part` from all tp ranks' shards of a tensor; of copies the first is taken."""
    if tensor.is_gate_up:
        side = tensor.parts.index(part)
        return torch.cat([shard.chunk(2)[side] for shard in shards])
    is_one = tensor.split_dim is None or len(shards) == 1
    whole = shards[0] if is_one else torch.cat(list(shards), tensor.split_dim)
    return part_of(tensor, whole, part, model)
