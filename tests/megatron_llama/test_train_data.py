"""The training program and what it says about its data: limits, another mixture and another length on resume."""

from __future__ import annotations

from pathlib import Path

from tests.megatron_llama.programs import start, succeed, values, write_dataset

MIXED = '[{prefix = "train", weight = 0.7}, {prefix = "more", weight = 0.3, max_epochs = 2}]'


def test_a_run_in_three_legs(workplace: Path) -> None:
    write_dataset(workplace / "more", 1000, seed=3)
    flags = ["--config", "config.toml", "--data.train", MIXED]
    first = succeed("train", *flags, "--train.exit_step", 2)
    assert " 0.11 " in first and "max epochs" in first and "goes on where" not in first
    longer = ["--train.sequence_length", 32, "--train.global_batch_size", 2]
    second = succeed("train", *flags, *longer, "--train.exit_step", 4, ranks=2)
    assert "the sequence length changes from 16 to 32 at sample 8" in second
    third = succeed("train", "--config", "config.toml", *longer, "--data.train", '["more", "train"]')
    assert "the mixture changes at sample 12" in third and "starting at step 4" in third
    assert len(values(workplace / "run")) == 6


def test_a_limit_ends_a_run_before_it_starts(workplace: Path) -> None:
    write_dataset(workplace / "more", 1000, seed=3)
    flags = ["--config", "config.toml", "--data.train", MIXED, "--train.steps", 300, "--train.exit_step", 1]
    ended = start("train", *flags, ranks=2)
    said = "".join(rank.err for rank in ended)
    assert [rank.code for rank in ended] == [2, 2] and said.count("error") == 1 and "2.00 exceeded" in said
    out = succeed("train", *flags, "--data.on_cap", "redistribute")
    assert out.index("as configured:") < out.index("2.00 exceeded") < out.index("as read:")


def test_megatron_order_goes_on_from_consumed_samples(workplace: Path) -> None:
    order = ["--config", "config.toml", "--data.order", "megatron"]
    whole = succeed("train", *order, "--log.directory", "whole", "--optimizer.learning_rate", 1e-30)
    assert "order megatron" in whole and "Megatron's index arrays" in whole
    late = ["--data.first_sample", 8, "--train.steps", 4, "--log.directory", "late", "--optimizer.learning_rate", 1e-30]
    succeed("train", *order, *late)
    assert values(workplace / "late") == values(workplace / "whole")[2:]  # weights stay as they are: the same samples
