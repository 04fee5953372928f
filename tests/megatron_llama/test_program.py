"""The frame of the programs: the arguments that a launcher adds."""

from __future__ import annotations

import sys

import pytest

from megatron_llama.program import command_line
from parallel.errors import LaunchError
from parallel.launch import Launch

THIRD = Launch(rank=7, local_rank=3, world_size=8, local_world_size=4, launcher="deepspeed")


def test_the_local_rank_that_deepspeed_adds_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--local_rank=3", "--config", "run.toml"])
    assert command_line(THIRD) == ["--config", "run.toml"]


def test_a_local_rank_that_contradicts_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--local_rank=2", "--config", "run.toml"])
    with pytest.raises(LaunchError, match="--local_rank=2 contradicts the environment of deepspeed, which says 3"):
        command_line(THIRD)
