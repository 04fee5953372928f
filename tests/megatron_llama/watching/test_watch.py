"""What a run does about steps that are not finite, and about spikes, with faults planted in real ranks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_llama.config import WatchConfig
from megatron_llama.watching.attribution import Finding, find_cause
from megatron_llama.watching.watch import Criteria, Watch
from parallel.checkpoint.manifest import read_manifest
from parallel.checkpoint.steps import committed_steps
from parallel.topology import Topology
from parallel.zero.engine import StepInfo
from tests.megatron_llama.planting import bad_gradient, bad_loss, bad_weight, poisoned_samples, together
from tests.megatron_llama.programs import BATCH_SIZE, Change, records, start, succeed
from tests.megatron_llama.test_train import assert_same_run, at_step

NAN = float("nan")
DP2 = (2, ())
LATE = (2, ("--parallel.pp", 2, "--parallel.schedule", "zb-h2", "--parallel.post_validation", "true"))
TP2_PP2 = (4, ("--parallel.tp", 2, "--parallel.pp", 2))
SAVES = ("--checkpoint.save_every", 2, "--checkpoint.keep", 0)
Layout = tuple[int, tuple]


def train(layout: Layout, directory: str, *flags: object, change: Change | None = None) -> str:
    ranks, layout_flags = layout
    words = (*layout_flags, *SAVES, "--log.directory", directory, *flags)
    return succeed("train", "--config", "config.toml", *words, ranks=ranks, change=change)


def events(directory: str, kind: str) -> list[dict]:
    lines = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event") == kind]


def skipped_samples(directory: str, step: int) -> list[list]:
    """What the manifest of a step says that was left out."""
    return read_manifest(Path(directory) / f"checkpoints/step_{step:08d}").state["position"]["skipped_samples"]


@pytest.fixture(scope="session")
def unbroken(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """The run directory of a layout that nothing happens to, made once."""
    made: dict[Layout, Path] = {}

    def run_of(layout: Layout) -> Path:
        if layout not in made:
            before, made[layout] = Path.cwd(), tmp_path_factory.mktemp("unbroken") / "run"
            os.chdir(project)
            try:
                train(layout, str(made[layout]))
            finally:
                os.chdir(before)
        return made[layout]

    return run_of


# not finite, once: as if nothing had happened


@pytest.mark.parametrize(
    ("layout", "fault", "ranks"),
    [
        pytest.param(DP2, bad_loss(rank=1, step=3), [1], id="loss-while-the-next-step-runs"),
        pytest.param(DP2, bad_loss(rank=1, step=4), [1], id="loss-before-a-save"),
        pytest.param(LATE, bad_gradient(rank=0, step=3), [0], id="gradient-under-post-validation"),
        pytest.param(TP2_PP2, bad_gradient(rank=3, step=6), [3], id="gradient-in-the-last-step"),
    ],
)
def test_a_transient_fault_leaves_no_trace_but_a_warning(
    layout: Layout, fault: Change, ranks: list[int], unbroken: Callable[[Layout], Path], workplace: Path
) -> None:
    out = train(layout, "run", change=fault)
    assert_same_run(workplace / "run", unbroken(layout))
    assert committed_steps(workplace / "run/checkpoints") == [2, 4, 6] and skipped_samples("run", 6) == []
    (event,) = events("run", "transient")
    assert event["ranks"] == ranks and "a transient fault" in out


def test_the_state_that_has_gone_bad_is_loaded_again_with_the_same_data(unbroken, workplace: Path) -> None:
    train(DP2, "run", change=bad_weight(rank=1, step=5))
    assert_same_run(workplace / "run", unbroken(DP2))
    (back,) = events("run", "went_back")
    assert back["about"]["ranks"][0] == 1 and back["about"]["first"]["state"]
    assert (back["step"], back["at"], back["first"], back["stop"]) == (4, 5, 16, 16)


# not finite for good


def test_a_bad_batch_is_skipped_and_named_and_the_run_replays(workplace: Path) -> None:
    """Sample 11 is in the third step, in the second micro-batch of rank 1."""
    poison = poisoned_samples({11: NAN})
    out = train(DP2, "whole", change=poison)
    assert "of rank 1" in out and "(sample 11)" in out and "samples 8 to 11 are skipped" in out
    (event,) = events("whole", "not_finite")
    first = event["first"]
    assert event["ranks"] == [1] and first["loss"] and first["gradient"] == "output" and first["micro_batch"] == 1
    assert records(workplace / "whole")[3]["skipped"] and records(workplace / "whole")[3]["loss"] is None
    assert skipped_samples("whole", 6) == [[8, 12, 3, "skipped: not finite"]] and skipped_samples("whole", 2) == []
    state = read_manifest(workplace / "whole/checkpoints/step_00000006").state
    assert (state["optimizer_steps"], state["position"]["samples"]) == (5, 6 * BATCH_SIZE)

    kill = at_step(7, lambda: os.kill(os.getpid(), signal.SIGKILL))  # the rerun is one: this is step 6
    with pytest.raises(AssertionError, match="exit code -9"):
        train(DP2, "run", "--checkpoint.asynchronous", "false", change=together(poison, kill))
    assert committed_steps(workplace / "run/checkpoints") == [2, 4]
    train(DP2, "run", change=poison)
    assert_same_run(workplace / "run", workplace / "whole")
    assert skipped_samples("run", 6) == skipped_samples("whole", 6)


def test_a_gradient_that_is_bad_for_good_is_named(workplace: Path) -> None:
    """Its loss is finite, and it is not the rank whose shard it lands in that is named."""
    for rank in (0, 1):
        fault = bad_gradient(rank, step=3, times=9, name="layers.1.attention.wk")
        train(DP2, f"run{rank}", "--train.exit_step", 3, "--watch.spikes", "off", change=fault)
        (event,) = events(f"run{rank}", "not_finite")
        assert event["ranks"] == [rank] and not event["first"]["loss"]
        assert (event["first"]["gradient"], event["first"]["micro_batch"]) == ("layers.1.attention.wk", 0)


def test_too_many_bad_batches_go_back_and_then_stop(workplace: Path) -> None:
    """Step 4 (samples 12 to 15) is bad: the run goes on from step 2 with sample 16, and the next bad one is in step 4 again."""
    flags = ("--watch.skips_allowed", 0)
    ranks, layout = DP2
    words = ("--config", "config.toml", *layout, *SAVES, *flags)
    ended = start("train", *words, ranks=ranks, change=poisoned_samples({13: NAN, 20: NAN}))
    assert [rank.code for rank in ended] == [78, 78]
    assert "error: step 4: loss nan" in ended[0].err and "watch.rollbacks_allowed = 1" in ended[0].err
    assert "(sample 20)" in ended[0].err
    (back,) = events("run", "went_back")
    assert (back["step"], back["at"], back["first"], back["stop"], back["reason"]) == (2, 4, 8, 16, "not finite")
    assert list(records(workplace / "run")) == [1, 2, 3] and committed_steps(workplace / "run/checkpoints") == [2]
    discarded = [json.loads(line) for line in (workplace / "run/discarded.jsonl").read_text().splitlines()]
    assert [line["step"] for line in discarded if "loss" in line] == [3]
    train(DP2, "run", *flags, "--watch.rollbacks_allowed", 2, change=poisoned_samples({13: NAN, 20: NAN}))
    assert skipped_samples("run", 6) == [[8, 16, 4, "went back: not finite"], [16, 24, 4, "went back: not finite"]]
    assert list(records(workplace / "run")) == [1, 2, 3, 4, 5, 6]


def test_stop_stops_at_once(workplace: Path) -> None:
    words = ("--config", "config.toml", "--watch.non_finite", "stop")
    ended = start("train", *words, ranks=2, change=bad_loss(rank=1, step=3))
    assert [rank.code for rank in ended] == [78, 78]
    assert "step 3: loss nan" in ended[0].err and "loss of rank 1" in ended[0].err and not ended[1].err


# spikes

QUICK = ("--watch.spike_deviations", 20, "--watch.window", 4, "--train.steps", 9, "--optimizer.learning_rate", 1e-3)
SPIKE = poisoned_samples({27: 30.0})  # of step 7


def test_a_spike_is_reported(workplace: Path) -> None:
    out = train(DP2, "run", *QUICK, change=SPIKE)
    (event,) = events("run", "spike")
    assert event["step"] == 7 and event["loss"] > event["loss_limit"] and "step 7: loss" in out
    assert "skipped" not in records(workplace / "run")[7] and skipped_samples("run", 9) == []


@pytest.mark.parametrize("layout", [DP2, LATE], ids=["dp2", "post-validation"])
def test_a_spike_is_skipped_on_the_device(layout: Layout, workplace: Path) -> None:
    """As if its step had been run with a learning rate of 0; a resumed run judges by the same statistics."""
    flags = (*QUICK, "--watch.spikes", "skip")
    train(layout, "whole", *flags, change=SPIKE)
    assert [event["step"] for event in events("whole", "spike")] == [7] and records(workplace / "whole")[7]["skipped"]
    assert skipped_samples("whole", 9) == [[24, 28, 7, "skipped: spike"]]
    assert read_manifest(workplace / "whole/checkpoints/step_00000009").state["optimizer_steps"] == 8
    for exit_step in (7, 0):
        train(layout, "run", *flags, "--train.exit_step", exit_step, change=SPIKE)
    assert_same_run(workplace / "run", workplace / "whole", last_step=9)
    assert skipped_samples("run", 9) == skipped_samples("whole", 9)


def test_a_spike_sends_the_run_back(workplace: Path) -> None:
    flags = (*QUICK, "--watch.spikes", "roll_back")
    train(DP2, "whole", *flags, change=SPIKE)
    assert skipped_samples("whole", 9) == [[24, 28, 7, "went back: spike"]]
    assert read_manifest(workplace / "whole/checkpoints/step_00000009").state["position"]["samples"] == 10 * BATCH_SIZE
    kill = at_step(11, lambda: os.kill(os.getpid(), signal.SIGKILL))  # 8 ran, too, and 7 again: this is step 9
    with pytest.raises(AssertionError, match="exit code -9"):
        train(DP2, "run", *flags, "--checkpoint.asynchronous", "false", change=together(SPIKE, kill))
    assert committed_steps(workplace / "run/checkpoints")[-1] == 8
    train(DP2, "run", *flags, change=SPIKE)
    assert_same_run(workplace / "run", workplace / "whole", last_step=9)
    assert skipped_samples("run", 9) == skipped_samples("whole", 9)


# fp16


def test_a_loss_scale_that_is_too_large_is_no_fault(workplace: Path) -> None:
    train(DP2, "run", "--train.dtype", "fp16", "--train.loss_scale", 2.0**40, "--train.steps", 3)
    assert [line.get("skipped") for line in records(workplace / "run").values()] == [True] * 3
    assert not events("run", "not_finite") and not events("run", "transient")


# who it was


def test_the_likeliest_rank_is_named() -> None:
    """pp 2 x dp 2, ranks 2 and 3 are the last stage."""
    topology = Topology(pp=2, dp=2)
    shards = [Finding(rank, shard=True) for rank in range(4)]
    assert str(find_cause(shards, topology)).endswith("gradients in the shard of rank 2 (as on rank 3, 0, 1)")
    gradients = [replace(shards[0], gradient="a"), replace(shards[2], gradient="b"), shards[1], shards[3]]
    assert find_cause(gradients, topology).ranks == [2, 0]
    loss = [replace(shards[1], gradient="a"), replace(shards[3], gradient="b", loss=True), shards[0]]
    assert str(find_cause(loss, topology)).startswith("gradient of b in micro-batch -1 of rank 3, whose loss was not finite")
    state = [*loss, replace(shards[0], state="sent"), replace(shards[2], state="made", updates=True)]
    assert find_cause(state, topology).ranks == [2, 0]
    assert find_cause([Finding(0), Finding(1)], Topology(dp=2)).first is None


# the statistics


def info(loss: float, norm: float) -> StepInfo:
    totals = torch.tensor([norm**2, loss], dtype=torch.float64)
    return StepInfo(totals, totals)


def told(watch: Watch, losses: list[float], first: int = 1) -> list[Criteria]:
    """What each step is judged by; as in a training, the host hears of a step when the next one was launched."""
    found = []
    for step, loss in enumerate(losses, first):
        found.append(watch.before_step(step))
        if step > first:
            watch.hear(step - 1, losses[step - 1 - first], 2 * losses[step - 1 - first])
        watch.after_step(info(loss, 2 * loss))
    watch.hear(first + len(losses) - 1, losses[-1], 2 * losses[-1])
    return found


def test_limits_are_numpys() -> None:
    losses = np.random.default_rng(0).normal(5.0, 0.1, 30).tolist()
    watch = Watch(WatchConfig(window=8, spike_deviations=3.0), torch.device("cpu"))
    for before, criteria in enumerate(told(watch, losses)):
        known = np.array(losses[: max(before - 1, 0)])[-8:]
        expected = known.mean() + 3.0 * known.std() if len(known) == 8 else np.inf
        np.testing.assert_allclose(criteria.limits, [expected, 2 * expected], rtol=1e-12)


def test_what_is_not_finite_does_not_count_and_a_spike_as_its_limit() -> None:
    watch = Watch(WatchConfig(window=4, non_finite="skip", spikes="skip"), torch.device("cpu"))
    told(watch, [1.0, 1.2, NAN, 1.0, 1.2])
    limits = watch.before_step(7).limits
    np.testing.assert_allclose(limits, [1.1 + 6 * 0.1, 2.2 + 6 * 0.2])
    assert watch.before_step(7).judge(info(1.6, 3.2)).item() is False
    assert watch.before_step(7).judge(info(1.8, 3.2)).item() is True
    assert watch.before_step(7).judge(info(1.6, 3.5)).item() is True
    watch.hear(7, 50.0, 100.0)
    assert [watch.state["losses"][-1], watch.state["grad_norms"][-1]] == list(limits)


def test_a_new_level_is_learned() -> None:
    watch = Watch(WatchConfig(window=16, spikes="skip"), torch.device("cpu"))
    losses = [2.0 + 0.01 * (step % 3) for step in range(17)] + [4.0 + 0.01 * (step % 3) for step in range(40)]
    spikes = [step for step, s in enumerate(told(watch, losses)) if s.judge(info(losses[step], 2 * losses[step]))]
    assert 17 in spikes and len(spikes) < 14


def test_a_resumed_watch_judges_as_before() -> None:
    losses = np.random.default_rng(1).normal(5.0, 0.1, 20).tolist()
    settings = WatchConfig(window=8)
    whole = Watch(settings, torch.device("cpu"))
    judged = told(whole, losses)
    for cut in (3, 8, 13):
        first, second = (Watch(settings, torch.device("cpu")) for _ in range(2))
        told(first, losses[:cut])
        second.state = json.loads(json.dumps(first.state))
        again = told(second, losses[cut:], first=cut + 1)
        assert [criteria.limits for criteria in again] == [criteria.limits for criteria in judged[cut:]]
        assert second.state == whole.state
    smaller = Watch(WatchConfig(window=4), torch.device("cpu"))
    smaller.state = whole.state
    assert smaller.state["losses"] == losses[-4:]
