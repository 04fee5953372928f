"""A run with post-validated updates, from outside: it leaves what any run leaves, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_llama.config import load_config, validate
from parallel.errors import ConfigError
from tests.megatron_llama.programs import values
from tests.megatron_llama.test_train import assert_same_run, stored_bytes, train

PIPELINE = ("--parallel.pp", 2, "--parallel.schedule", "zb-h2", "--checkpoint.save_every", 2, "--train.evaluate_every", 3)
LATE = ("--parallel.post_validation", "true")


def test_a_run_with_evaluations_and_checkpoints_is_the_ordinary_one(workplace: Path) -> None:
    """Two ranks, whose sums are the same in either order; stopped after step 3 and resumed."""
    train(*PIPELINE, "--log.directory", "ordinary", ranks=2)
    norms = values(workplace / "ordinary", "grad_norm")
    clip = ("--optimizer.clip_norm", sorted(norms)[len(norms) // 2])
    train(*PIPELINE, *clip, "--log.directory", "waited", ranks=2)
    train(*PIPELINE, *clip, *LATE, "--train.exit_step", 3, ranks=2)
    train(*PIPELINE, *clip, *LATE, ranks=2)
    found, expected = workplace / "run", workplace / "waited"
    assert_same_run(found, expected)
    assert stored_bytes(found, 4) == stored_bytes(expected, 4) != {}
    assert values(found, "valid_loss") == values(expected, "valid_loss") != []


def test_it_needs_a_pipeline() -> None:
    sizes = ("num_layers", 2, "hidden_size", 32, "num_heads", 4, "ffn_hidden_size", 48, "vocab_size", 96)
    model = [str(x) for name, size in zip(sizes[::2], sizes[1::2], strict=True) for x in (f"--model.{name}", size)]
    config = load_config([*model, "--data.train", "train", "--train.steps", "3", *LATE])
    with pytest.raises(ConfigError, match="parallel.pp = 1: set --parallel.post_validation false"):
        validate(config, 1)
