"""The training program with DeepSpeed's engine: evaluating while it trains, resuming a native run, saying what it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron_llama.planting import NAN, bad_loss, poisoned_samples
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


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_numbers_that_are_not_finite(stage: int, workplace: Path) -> None:
    """A transient fault leaves no trace; a bad batch sends the run back to step 2, which goes on like a native one."""
    flags = [*DEEPSPEED, "--zero.stage", stage, "--checkpoint.save_every", 2]
    succeed("train", *flags, "--log.directory", "unbroken", ranks=2)
    printed = succeed("train", *flags, "--log.directory", "transient", ranks=2, change=bad_loss(rank=1, step=3))
    assert "loss of rank 1; finite when it was run again" in printed
    for field in ("loss", "grad_norm"):
        assert values(Path("transient"), field) == values(Path("unbroken"), field)
    back = ["--checkpoint.save_every", 2, "--watch.skips_allowed", 0]
    printed = succeed("train", *flags, *back, "--log.directory", "back", ranks=2, change=poisoned_samples({13: NAN}))
    assert "back to step 2, without samples 8 to 15" in printed
    native = ["--config", "config.toml", *back, "--log.directory", "native"]
    succeed("train", *native, ranks=2, change=poisoned_samples({13: NAN}))
    assert values(Path("back")) == pytest.approx(values(Path("native")), abs=TOLERANCE)


def test_one_process_without_a_launcher(run: Path, workplace: Path) -> None:
    printed = succeed("train", *DEEPSPEED, "--log.directory", "other")
    assert values(Path("other")) == pytest.approx(values(run), abs=TOLERANCE)
    assert "Virtual Memory" not in printed


def test_a_setting_that_deepspeed_refuses_is_one_line(workplace: Path) -> None:
    Path("settings.json").write_text('{"zero_optimization": {"reduce_bucket_sise": 1}}', encoding="utf-8")
    (ended,) = start("train", *DEEPSPEED, "--zero.deepspeed_config", "settings.json")
    assert ended.code == 78 and "reduce_bucket_sise" in ended.err and "correct zero.deepspeed_config" in ended.err
    assert "Traceback" not in ended.err
