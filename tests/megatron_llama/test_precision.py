"""Runs in fp16 and with narrow optimizer state, from outside: their metrics, and how they go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron_llama.programs import succeed, values
from tests.megatron_llama.test_train import train

FP16 = ("--train.dtype", "fp16", "--train.loss_scale", 1024, "--train.loss_scale_window", 2)


def test_a_run_in_fp16_records_its_scale_and_goes_on_with_it(workplace: Path, run: Path) -> None:
    train(*FP16, "--train.exit_step", 3)
    train(*FP16)
    assert values(workplace / "run", "loss_scale") == [1024.0, 1024.0, 2048.0, 2048.0, 4096.0, 4096.0]
    assert values(run, "loss_scale") == []
    assert values(workplace / "run", "loss") == pytest.approx(values(run, "loss"), rel=1e-3)
    assert values(workplace / "run", "grad_norm") == pytest.approx(values(run, "grad_norm"), rel=1e-2)
    assert "loss" in succeed("evaluate", "--checkpoint", "run/checkpoints", "--data", "valid")


def test_narrow_optimizer_state_goes_on_as_if_never_stopped(workplace: Path) -> None:
    narrow = ("--train.dtype", "bf16", "--optimizer.moment_dtype", "bf16", "--optimizer.master_weights", "remainder")
    train(*narrow, "--log.directory", "whole")
    train(*narrow, "--train.exit_step", 3)
    train(*narrow)
    assert values(workplace / "run", "loss") == values(workplace / "whole", "loss")
