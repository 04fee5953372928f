"""Small models with random weights, in memory, for conversions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop.stored_model import StoredModel, StoredTensor, logical_shapes

PLAIN = ModelConfig(num_layers=2, hidden_size=64, num_heads=8, num_kv_heads=8, ffn_hidden_size=96, vocab_size=136)
GROUPED = replace(PLAIN, num_kv_heads=4, rope_theta=500_000.0)
SCALED = replace(GROUPED, num_kv_heads=2, rope_scaling_factor=8.0)
TIED = replace(SCALED, rope_scaling_factor=32.0, tie_embeddings=True)
ODD = replace(PLAIN, num_kv_heads=2, vocab_size=131, ffn_hidden_size=90)


def random_model(model: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> StoredModel:
    """A StoredModel with random weights in memory, norms around 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator) * 0.1
        return (noise + (1.0 if len(shape) == 1 else 0.0)).to(dtype)

    weights = {name: drawn(shape) for name, shape in logical_shapes(model).items()}
    held = {name: StoredTensor(tuple(tensor.shape), dtype, partial(Tensor.clone, tensor)) for name, tensor in weights.items()}
    return StoredModel("memory", model, held, sequence_length=32, files={"tokenizer.model": b"not a real one"}).check()


def loaded(stored: StoredModel) -> dict[str, Tensor]:
    """All weights, read."""
    return {name: tensor.load() for name, tensor in stored.weights.items()}


def assert_same(found: StoredModel, expected: StoredModel) -> None:
    """Both have the same architecture, and bit for bit the same weights."""
    assert found.check().model == expected.model
    theirs = loaded(expected)
    for name, tensor in loaded(found).items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
