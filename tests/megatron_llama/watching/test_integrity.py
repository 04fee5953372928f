"""A run whose state is no longer the same on all ranks: it ends, keeps nothing of it, and goes on as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_llama.program import CORRUPTED, LOST
from megatron_llama.step import TrainStep
from parallel.checkpoint.steps import committed_steps
from tests.megatron_llama.programs import records, start, succeed, values
from tests.megatron_llama.test_supervise import events, supervised

CONFIG = ("--config", "config.toml")
SAVES = ("--checkpoint.save_every", 2, "--checkpoint.keep", 0)
NORM = "layers.0.attention_norm"


@pytest.fixture
def flip(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    """`flip(rank, step)`: a bit of a norm's weight flips on that rank after that step of its first process."""

    def plant(rank: int, step: int) -> None:
        run, marker, steps = TrainStep.run, workplace / "flipped", []

        def run_and_flip(self: TrainStep, *args):
            info = run(self, *args)
            steps.append(info)
            if len(steps) == step and self.runtime.groups.world.rank == rank and not marker.exists():
                marker.touch()
                self.engine.finish()
                weights = {p.shard.segments[0].name: p.detach() for c in self.runtime.chunks for p in c.parameters()}
                weights[NORM].view(torch.int32)[0] ^= 1 << 3
            return info

        monkeypatch.setattr(TrainStep, "run", run_and_flip)

    return plant


def test_a_flipped_bit_ends_the_run_before_it_is_saved_and_the_restart_is_the_unbroken_run(flip, workplace: Path) -> None:
    layout = (*CONFIG, *SAVES, "--parallel.tp", 2)
    succeed("train", *layout, "--log.directory", "unbroken", ranks=4)
    flip(rank=1, step=4)
    ended = start("train", *layout, ranks=4)
    assert [rank.code for rank in ended] == [LOST, CORRUPTED, LOST, LOST]
    assert [bool(rank.err) for rank in ended] == [True, False, False, False]
    assert "error: after step 4 the state of rank 1 (" in ended[0].err
    assert f"{NORM} over tp (ranks 0, 1): 1 of 32 elements differ, the first at [0]" in ended[0].err
    assert committed_steps(Path("run/checkpoints")) == [2]
    assert records(Path("run"), "event")[4]["event"] == "corruption"
    succeed("train", *layout, ranks=4)
    for field in ("loss", "grad_norm"):
        assert values(Path("run"), field) == values(Path("unbroken"), field)
    discarded = [json.loads(line) for line in Path("run/discarded.jsonl").read_text().splitlines()]
    assert [line["ranks"] for line in discarded if line.get("event") == "corruption"] == [[1]]


def test_a_supervisor_starts_it_again(flip, workplace: Path) -> None:
    """Without shards of the optimizer, the copies part for good; the audit of the next save sees it."""
    unsharded = ("--zero.stage", 0)
    succeed("train", *CONFIG, *unsharded, "--log.directory", "unbroken", ranks=2)
    flip(rank=1, step=3)
    assert supervised(*unsharded, "--watch.audit_every", 0) == 0
    assert values(Path("run")) == values(Path("unbroken"))
    death, restart = events(Path("run"))[1:3]
    assert (death["event"], death["code"], restart["step"]) == ("death", CORRUPTED, 2)


def test_audits_come_between_saves_too(flip, workplace: Path) -> None:
    flip(rank=1, step=3)
    ended = start("train", *CONFIG, "--watch.audit_every", 3, "--checkpoint.save_every", 0, ranks=2)
    assert [rank.code for rank in ended] == [CORRUPTED, CORRUPTED]
    assert "after step 3 the state of one of the ranks 0 (" in ended[0].err and "nothing tells which" in ended[0].err
    assert committed_steps(Path("run/checkpoints")) == []
