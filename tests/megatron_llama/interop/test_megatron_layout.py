"""Names, fused matrices, padding and shards of Megatron-Core, against the same written out slowly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_llama.interop.megatron_layout import (
    core_tensors,
    fuse,
    fuse_qkv,
    join_part,
    local_name,
    padded,
    padded_vocabulary,
    part_of,
    renumbered,
    shard,
    split_qkv,
)
from megatron_llama.interop.stored_model import logical_shapes
from tests.megatron_llama.interop.models import GROUPED, PLAIN, TIED, loaded, random_model

NORM = "decoder.layers.3.input_layernorm.weight"


def rows_of_head(matrix: Tensor, head: int, d: int) -> list[Tensor]:
    return [matrix[head * d + i] for i in range(d)]


@pytest.mark.parametrize("groups", [8, 4, 1])
def test_fused_qkv_goes_group_by_group(groups: int) -> None:
    model = replace(PLAIN, num_kv_heads=groups)
    weights = loaded(random_model(model))
    q, k, v = (weights[f"layers.1.attention.{name}"] for name in ("wq", "wk", "wv"))
    expected = []
    for group in range(groups):
        for head in range(group * 8 // groups, (group + 1) * 8 // groups):
            expected += rows_of_head(q, head, 8)
        expected += rows_of_head(k, group, 8) + rows_of_head(v, group, 8)
    fused = fuse_qkv(q, k, v, model)
    assert torch.equal(fused, torch.stack(expected))
    assert all(torch.equal(one, other) for one, other in zip(split_qkv(fused, model), (q, k, v), strict=True))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shard_of_the_fused_matrix_is_the_fused_shard(tp: int) -> None:
    """Up to as many ranks as groups, a rank's shard is that of a model with its heads and its part of gate and up alone."""
    weights = loaded(random_model(GROUPED))
    small = replace(GROUPED, hidden_size=64 // tp, num_heads=8 // tp, num_kv_heads=4 // tp)
    for tensor in core_tensors(GROUPED)[2:7]:
        whole = fuse(tensor, [weights[part] for part in tensor.parts], GROUPED)
        assert whole.shape == tensor.shape
        for rank in range(tp):
            found = shard(tensor, whole, tp, rank)
            parts = [weights[part] for part in tensor.parts]
            if tensor.is_qkv:
                assert torch.equal(found, fuse_qkv(*(part.chunk(tp)[rank] for part in parts), small))
            elif tensor.is_gate_up:
                assert torch.equal(found, torch.cat([part.chunk(tp)[rank] for part in parts]))
            elif tensor.split_dim is not None:
                assert torch.equal(found, parts[0].chunk(tp, 1)[rank])


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("model", [GROUPED, TIED], ids=["gqa", "tied"])
def test_shards_join_to_every_tensor(model, tp: int) -> None:
    weights = loaded(random_model(model))
    joined = {}
    for tensor in core_tensors(model):
        whole = fuse(tensor, [weights[part] for part in tensor.parts], model)
        whole = padded(whole, padded_vocabulary(model.vocab_size, tp)) if tensor.is_table else whole
        shards = [shard(tensor, whole, tp, rank) for rank in range(tp)]
        for part in tensor.parts:
            joined[part] = join_part(tensor, shards, part, model)
            assert torch.equal(joined[part], part_of(tensor, whole, part, model))
    assert {name: tuple(tensor.shape) for name, tensor in joined.items()} == logical_shapes(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in joined.items())


def test_vocabulary_is_padded_by_tensor_ranks() -> None:
    assert [padded_vocabulary(32_000, tp) for tp in (1, 2, 4, 8, 16)] == [32_000, 32_000, 32_256, 32_768, 32_768]
    assert not padded(torch.ones(3, 2), 5)[3:].any()


def test_names() -> None:
    assert local_name("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight") == NORM
    assert local_name("decoder.layers.3.mlp.linear_fc1.layer_norm_weight") == "decoder.layers.3.pre_mlp_layernorm.weight"
    assert local_name("decoder.layers.3.mlp.linear_fc1._extra_state") is None
    assert local_name("decoder.layers.3.mlp.linear_fc1.bias") == "decoder.layers.3.mlp.linear_fc1.bias"
    assert renumbered("decoder.layers.3.mlp.linear_fc1.weight", 9) == "decoder.layers.12.mlp.linear_fc1.weight"
    assert renumbered("embedding.word_embeddings.weight", 9) == "embedding.word_embeddings.weight"
    assert renumbered("decoder.layers.x.weight", 9) == "decoder.layers.x.weight"
