"""megatron_llama.json, and architectures that nobody should believe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_llama.config import ModelConfig
from megatron_llama.interop.sidecar import Sidecar, check_agreement, read_sidecar, write_sidecar
from megatron_llama.interop.torch_files import mapped_copy
from parallel.errors import CheckpointError, ConfigError
from tests.megatron_llama.interop.models import TIED, random_model


def test_there_and_back(tmp_path: Path) -> None:
    assert read_sidecar(tmp_path) is None
    write_sidecar(replace(random_model(TIED), optimizer_steps=7), tmp_path)
    assert read_sidecar(tmp_path) == Sidecar(TIED, sequence_length=32, optimizer_steps=7)


SIZES = {"num_layers": 2, "hidden_size": 64, "num_heads": 8, "ffn_hidden_size": 96, "vocab_size": 131}
DAMAGE = {
    "cut short": ("{", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "large": (" " * (1 << 21), "a file of its kind has less than"),
    "list": ("[]", "holds no object, but list"),
    "no model": ("{}", "has no table `model`"),
    "unknown field": (json.dumps({"model": SIZES | {"experts": 8}}), "unknown setting model.experts"),
    "text": (json.dumps({"model": SIZES | {"num_layers": "2"}}), "num_layers = '2' has the wrong type"),
    "size left out": (json.dumps({"model": {}}), "model.num_layers is not given"),
    "heads": (json.dumps({"model": SIZES | {"num_heads": 7}}), "model.hidden_size must be an even head size"),
    "many layers": (json.dumps({"model": SIZES | {"num_layers": 10**9}}), "no model has 1,000,000,000 layers"),
    "wide": (json.dumps({"model": SIZES | {"vocab_size": 10**15}}), "no model has vocab_size 1,000,000,000,000,000"),
    "steps": (json.dumps({"model": SIZES, "optimizer_steps": -1}), "optimizer_steps = -1 is not a count"),
}


@pytest.mark.parametrize(("text", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "megatron_llama.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_sidecar(tmp_path)


def test_a_given_architecture_has_to_agree() -> None:
    check_agreement(ModelConfig(**SIZES), SIZES, "args")
    with pytest.raises(ConfigError, match="another model than the given one: vocab_size is 131, not 7; change --model"):
        check_agreement(ModelConfig(**SIZES | {"vocab_size": 7}), SIZES, "args")


def test_mapped_copy_leaves_no_file(tmp_path: Path) -> None:
    tensor = torch.arange(12, dtype=torch.int16).view(3, 4).t().bfloat16()
    copy = mapped_copy(tensor, tmp_path)
    assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype and copy.is_contiguous()
    assert not list(tmp_path.iterdir())
