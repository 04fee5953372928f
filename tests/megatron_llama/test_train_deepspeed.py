"""The training program with DeepSpeed's engine: evaluating while it trains, resuming a native run, saying what it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron_llama.programs import STEPS, start, succeed, values
from tests.with_deepspeed import deepspeed_imported  # noqa: F401

TOLERANCE = 1e-5  # of losses in nats; fp32 sums in another order differ by about 1e-6 after a few updates
DEEPSPEED = ["--config", "config.toml", "--zero.engine", "deepspeed"]
pytestmark = pytest.mark.usefixtures("deepspeed_imported")


def test_a_native_run_goes_on_under_stage_3_with_evaluations(run: Path, workplace: Path) -> None:
    """Evaluation calls the stages whose weights are elsewhere between uses."""
    few = ["--log.directory", "other", "--train.evaluate_every", "2"]
    succeed("train", "--config", "config.toml", *few, "--train.exit_step", "2")
    Path("settings.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}', encoding="utf-8")
    stage_3 = ["--zero.stage", "3", "--zero.deepspeed_config", "settings.json"]  # so small weights would not come and go
    printed = succeed("train", *DEEPSPEED, *stage_3, *few, ranks=2)
    assert "adamw, deepspeed ZeRO stage 3 over 2 data ranks" in printed
    assert values(Path("other")) == pytest.approx(values(run), abs=TOLERANCE)
    held_out = values(Path("other"), "valid_loss")
    assert len(held_out) == STEPS // 2 and held_out[-1] == pytest.approx(values(run, "valid_loss")[-1], abs=TOLERANCE)


def test_one_process_without_a_launcher(run: Path, workplace: Path) -> None:
    printed = succeed("train", *DEEPSPEED, "--log.directory", "other")
    assert values(Path("other")) == pytest.approx(values(run), abs=TOLERANCE)
    assert "Virtual Memory" not in printed


def test_a_setting_that_deepspeed_refuses_is_one_line(workplace: Path) -> None:
    Path("settings.json").write_text('{"zero_optimization": {"reduce_bucket_sise": 1}}', encoding="utf-8")
    (ended,) = start("train", *DEEPSPEED, "--zero.deepspeed_config", "settings.json")
    assert ended.code == 78 and "reduce_bucket_sise" in ended.err and "correct zero.deepspeed_config" in ended.err
    assert "Traceback" not in ended.err
