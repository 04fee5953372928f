"""Runs with recomputation, offload and float8, as people start them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_llama import runtime
from parallel import offload
from tests.megatron_llama.programs import start, succeed, values
from tests.parallel.kernels.test_float8 import needs_rows

MEMORY = ["--parallel.recompute", "full", "--parallel.recompute_layers", 1, "--parallel.offload_layers", 1]


def test_a_run_with_less_memory_has_the_same_losses(workplace: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    out = succeed("train", "--config", "config.toml", *MEMORY, "--log.directory", "less")
    assert "recompute full in the first 1 layers of a stage, the first 1 layers of a stage offloaded" in out
    assert values(Path("less")) == values(run)


@needs_rows
def test_a_float8_run_can_be_evaluated_where_there_is_none(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--train.float8", "rowwise", "--train.dtype", "bf16", "--log.directory", "float8"]
    (ended,) = start("train", "--config", "config.toml", *flags)
    assert ended.code == 78 and "train.float8 = rowwise cannot run here" in ended.err and "Traceback" not in ended.err
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "float8_missing", lambda device: None)
        out = succeed("train", "--config", "config.toml", *flags, "--checkpoint.load", "none")
    assert "linear float8 rowwise" in out and "slower than bf16 for wqkv (32 x 64)" in out
    found = json.loads(succeed("evaluate", "--checkpoint", "float8", "--data", "valid", "--json"))
    assert found["valid_loss"] < 6.0
