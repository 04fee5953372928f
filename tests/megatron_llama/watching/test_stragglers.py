"""Slow ranks are named; those that wait for them, or whose stage has more to do, are not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_llama.watching import stragglers
from megatron_llama.watching.stragglers import Slow, Stragglers, slow_ranks
from parallel.heartbeat import Heartbeat
from parallel.topology import Topology
from tests.megatron_llama.programs import STEPS, start, values
from tests.parallel.building import CPU, grid

LAYOUT = ("--config", "config.toml", "--parallel.pp", 2, "--watch.straggler_every", 1, "--watch.straggler_factor")


def sleepy(*ranks: int) -> Callable[[int], None]:
    """These ranks take their time in the first action of each step."""

    def plant(rank: int) -> None:
        act = Heartbeat.act

        def act_slowly(self: Heartbeat, action: str) -> None:
            act(self, action)
            if action == "F0":
                time.sleep(0.4)

        if rank in ranks:
            Heartbeat.act = act_slowly

    return plant


def named(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "straggler"]


def test_a_slow_rank_is_named_once_and_ends_nothing(workplace: Path) -> None:
    ended = start("train", *LAYOUT, 4, ranks=4, change=sleepy(3))
    assert [rank.code for rank in ended] == [0] * 4
    (line,) = named(Path("run"))
    assert (line["rank"], line["host"]) == (3, os.uname().nodename) and line["step"] >= 2
    assert line["busy_seconds"] > 0.4 and line["busy_seconds"] > 4 * line["peers_busy_seconds"]
    assert ended[0].out.count("SLOW RANK 3 (") == ended[0].out.count("SLOW RANK") == 1
    assert min(values(Path("run"), "step_seconds")) > 0.4  # of all ranks
    assert len(values(Path("run"))) == STEPS


def test_a_stage_with_more_to_do_is_not_slow(workplace: Path) -> None:
    ended = start("train", *LAYOUT, 8, ranks=4, change=sleepy(0, 1))
    assert [rank.code for rank in ended] == [0] * 4
    assert named(Path("run")) == [] and "SLOW RANK" not in ended[0].out


def test_ranks_are_compared_with_those_of_their_stage() -> None:
    grid = Topology(pp=2, dp=2, tp=2)
    stages = [0.1, 0.1, 0.11, 0.1, 0.3, 0.3, 0.3, 0.3]
    assert slow_ranks(stages, grid, 1.2) == []
    stages[5], stages[0] = 0.5, 0.2
    assert slow_ranks(stages, grid, 1.2) == [Slow(5, 0.5, 0.3), Slow(0, 0.2, 0.1)]


def test_of_two_ranks_one_can_be_slow_and_one_alone_cannot() -> None:
    assert slow_ranks([0.1, 0.4], Topology(dp=2), 1.2) == [Slow(1, 0.4, 0.1)]
    assert slow_ranks([0.1, 0.4], Topology(pp=2), 1.2) == []
    assert slow_ranks([0.001, 0.004], Topology(dp=2), 1.2) == []  # too short to tell


def test_it_takes_two_looks_in_a_row_and_a_rank_is_named_again_after_it_has_recovered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fast, slow = [0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.5, 0.1]
    looks = iter([slow, fast, slow, slow, slow, fast, slow, slow, fast])
    monkeypatch.setattr(stragglers, "all_gather", lambda tensor, axis: torch.tensor(next(looks), dtype=torch.float64))
    monkeypatch.setattr(stragglers, "gather_objects", lambda value, axis: ["a", "b", "c", "d"])
    watched = Stragglers(grid(0), CPU, 10, 1.2, None)
    watched.groups = type("Groups", (), {"world": None, "topology": Topology(dp=4)})
    said = []
    monkeypatch.setattr(watched._log, "warning", said.append)
    for step in range(1, 100):
        with watched.step(step):
            pass
        watched.hear(step)
    assert [line.split(":")[0] for line in said] == ["SLOW RANK 2 (c) at step 40", "SLOW RANK 2 (c) at step 80"]
    assert said[0].startswith("SLOW RANK 2 (c) at step 40: busy for 0.500 s of each step, its peers for 0.100 s.")
