"""What is measured beside what was predicted: which steps count, how far is too far, and a run that says both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_llama import comparison, trainer, verdict
from megatron_llama.comparison import WARM_UP, WINDOW, Comparison, Fullest, Measured, measured_line, mismatch, ratios
from megatron_llama.config import load_config
from megatron_llama.forecast import Forecast, make_forecast
from megatron_llama.goodput import account, read_records
from megatron_llama.metrics import MetricsWriter
from megatron_llama.plan.calibration import calibrate
from megatron_llama.plan.configured import predict
from megatron_llama.plan.hardware import GIB, find
from megatron_llama.plan.memory import Memory
from megatron_llama.step import TrainStep
from parallel.launch import Launch
from tests.megatron_llama.planting import bad_loss, together
from tests.megatron_llama.programs import Change, succeed
from tests.megatron_llama.test_trainer import Clock
from tests.parallel.building import CPU, grid

ENOUGH = WARM_UP + WINDOW + 1  # steps until the measured ones have been compared
MEMORY = Memory(
    weights=12.0 * GIB,
    gradients=24.0 * GIB,
    optimizer=4.0 * GIB,
    activations=20.0 * GIB,
    workspace=0.0,
    buffers=0.0,
    framework=8.0 * GIB,
)
PREDICTED = Forecast("h100", 1.0, 4096.0, 0.45, MEMORY, 40.0 * GIB, 80.0 * GIB)


def measured(seconds: float = 1.0, state: float = 40.0, allocated: float | None = None, waited: float = 0.0) -> Measured:
    """Of two ranks; sizes in GiB."""
    of_gpu = () if allocated is None else (Fullest(allocated * GIB, 1), Fullest(70.0 * GIB, 0))
    return Measured(seconds, 4096.0 / seconds, waited, Fullest(state * GIB, 1), *of_gpu)


# which steps count


def comparison_of(*flags: object, forecast: Forecast | None = PREDICTED, metrics: MetricsWriter | None = None) -> Comparison:
    words = ("--model.preset", "llama-tiny", "--train.steps", 99, "--data.train", "x", *flags)
    config = load_config([str(word) for word in words])
    return Comparison(config, grid(0), CPU, SimpleNamespace(state_bytes=40 * GIB), forecast, metrics)


def steps_until_done(compared: Comparison, counts: Callable[[int], bool]) -> int:
    for step in range(1, 100):
        compared.hear(step, 1.0, 0.0, counts(step))
        if compared.done:
            return step
    return 0


@pytest.mark.parametrize(
    ("flags", "counts", "done"),
    [
        ((), lambda step: True, ENOUGH),
        ((), lambda step: step % 2 == 0, 23),  # 4, 6, ... 22
        ((), lambda step: False, 0),
        (("--log.trace_steps", 5), lambda step: True, 17),  # 2 to 6 are traced
    ],
)
def test_steps_that_count(flags: tuple, counts: Callable[[int], bool], done: int) -> None:
    assert steps_until_done(comparison_of(*flags), counts) == done


def test_nothing_is_measured_where_nobody_asks() -> None:
    assert comparison_of("--log.hardware", "none").done


def test_the_fullest_of_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State, allocated and reserved memory of three ranks; steps of 1 s with a slow one, and slow ones before they count."""
    ranks = [[40.0, 66.0, 70.0], [41.0, 60.0, 72.0], [40.0, 67.0, 71.0]]
    found = [size * GIB for rank in ranks for size in rank]
    monkeypatch.setattr(comparison, "HostCopy", lambda make, device: SimpleNamespace(read=lambda: found))
    metrics = MetricsWriter(tmp_path)
    compared = comparison_of(metrics=metrics)
    compared.groups = SimpleNamespace(world=SimpleNamespace(size=3))
    for step in range(1, ENOUGH + 1):
        compared.hear(step, 9.0 if step in (1, 2, 3, 7) else 1.0, 0.25, counts=True)
    metrics.close()
    (event,) = events(tmp_path, "measured")
    seen = event["measured"]
    assert event["step"] == ENOUGH and (seen["step_seconds"], seen["data_wait_seconds"]) == (1.0, 0.25)
    assert [seen[f"{name}_rank"] for name in ("state", "allocated", "reserved")] == [1, 2, 1]
    assert (seen["allocated_bytes"], seen["reserved_bytes"]) == (67.0 * GIB, 72.0 * GIB)
    assert event["ratio"] == {"step_seconds": 1.0, "state_bytes": 41 / 40, "allocated_bytes": 67 / 60}


# how far is too far


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        (measured(1.09, 43.9, 65.9), []),
        (measured(0.91, 36.1, 54.1), []),
        (measured(1.11), ["takes 1.11 times as long as predicted: clocks", "--calibrate run/metrics.jsonl"]),
        (measured(1.5, waited=0.4), ["takes 1.50 times as long as predicted: 27% of it waits for data"]),
        (measured(0.89, waited=0.4), ["takes 0.89 times as long as predicted: clocks"]),
        (measured(1.0, 40.0, 67.0), ["1.12 times the memory predicted is allocated"]),
        (measured(1.0, 40.0, 53.0), ["0.88 times the memory predicted is allocated"]),
        (measured(1.0, 45.0, 67.0), ["optimizer state take 1.12 times the memory predicted"]),
        (measured(1.2, 40.0, 67.0), ["takes 1.20 times as long", ". 1.12 times the memory"]),
    ],
)
def test_a_mismatch_is_said_in_one_line(found: Measured, parts: list[str]) -> None:
    said = mismatch(ratios(PREDICTED, found), found, Path("run/metrics.jsonl"))
    assert said.startswith("MISMATCH") == bool(parts) == bool(said) and "\n" not in said
    assert all(part in said for part in parts)


def test_what_is_not_predicted_is_not_compared() -> None:
    found = measured(5.0, 60.0, 90.0)
    assert ratios(Forecast(), found) == {}
    assert ratios(replace(PREDICTED, step_seconds=None), found).keys() == {"state_bytes", "allocated_bytes"}
    assert ratios(PREDICTED, measured()).keys() == {"step_seconds", "state_bytes"}


def test_the_figures_stand_side_by_side() -> None:
    assert measured_line(PREDICTED, measured(1.06, 40.0, 63.0)) == (
        "measured  step 1.06 s (predicted 1.00 s, +6%), 3,864 tokens/s per device; memory 63.0 GiB on rank 1 (predicted 60.0, "
        "+5%), 70.0 GiB on rank 0 with what is kept free"
    )
    assert measured_line(replace(PREDICTED, step_seconds=None), measured(0.5, 38.0)) == (
        "measured  step 500.0 ms, 8,192 tokens/s per device; weights, gradients and optimizer state 38.0 GiB on rank 1 "
        "(predicted 40.0, -5%)"
    )


# runs


def events(directory: Path | str, kind: str) -> list[dict]:
    lines = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event") == kind]


def steps_of(seconds: float) -> Change:
    """By the run's clock every step takes so long."""

    def change(rank: int) -> None:
        clock = Clock()
        trainer.time = verdict.time = clock
        run = TrainStep.run

        def timed_run(*arguments: object) -> object:
            clock.now += seconds
            return run(*arguments)

        TrainStep.run = timed_run

    return change


def test_a_run_says_both_and_again_after_a_resume(workplace: Path) -> None:
    """Two tensor-parallel ranks of one node, by a profile whose nodes have one GPU; 20 % too slow, and then as predicted."""
    Path("cpu.toml").write_text('based_on = "h100"\ngpus_per_node = 1\nbf16_tflops = 0.01\n')
    flags = ["--config", "config.toml", "--parallel.tp", 2, "--log.hardware", "cpu.toml", "--train.steps", 2 * ENOUGH]
    config = load_config([str(word) for word in flags])
    predicted = predict(config, 2, replace(find("cpu.toml"), gpus_per_node=2)).step_seconds
    assert predicted < predict(config, 2, find("cpu.toml")).step_seconds

    out = succeed("train", *flags, "--train.exit_step", ENOUGH, ranks=2, change=steps_of(1.2 * predicted))
    lines = out.splitlines()
    (said,) = [number for number, line in enumerate(lines) if line.startswith("predicted step ")]
    assert lines[said - 1].startswith("steps ") and "the fullest rank allocates" in lines[said + 1]
    assert out.count("measured  step ") == 1 and out.count("MISMATCH  the step takes 1.20 times as long as predicted") == 1
    (event,) = events("run", "prediction")
    forecast = make_forecast(config, Launch(world_size=2, local_world_size=2), CPU)
    assert event["step"] == 0 and event["hardware"] == "cpu" and event["predicted"] == forecast.record()
    assert event["predicted"]["step_seconds"] == predicted
    (event,) = events("run", "measured")
    assert event["step"] == ENOUGH and event["ratio"]["step_seconds"] == pytest.approx(1.2)
    assert event["ratio"]["state_bytes"] == pytest.approx(1.0, abs=0.03)
    assert calibrate(Path("run/metrics.jsonl"), replace(find("cpu.toml"), gpus_per_node=2)) == pytest.approx(1.2)

    out = succeed("train", *flags, ranks=2, change=steps_of(1.05 * predicted))
    assert out.count("predicted step ") == out.count("measured  step ") == 1 and "MISMATCH" not in out
    assert [event["step"] for event in events("run", "prediction")] == [0, ENOUGH]
    assert [event["step"] for event in events("run", "measured")] == [ENOUGH, 2 * ENOUGH]
    assert account(read_records(Path("run"))).steps == 2 * ENOUGH


def test_steps_after_evaluations_and_steps_run_again_do_not_count(workplace: Path) -> None:
    """4 to 8, 11 and 13 to 16 count: 9 follows an evaluation, and 10 and 12 are run twice."""
    flags = ["--config", "config.toml", "--train.steps", 18, "--train.evaluate_every", 8]
    change = together(steps_of(1.0), bad_loss(rank=0, step=10), bad_loss(rank=0, step=12))
    out = succeed("train", *flags, change=change)
    (event,) = events("run", "measured")
    assert event["step"] == 17 and event["measured"]["step_seconds"] == 1.0
    assert "step_seconds" not in event["predicted"] and "MISMATCH" not in out


def test_a_short_run_predicts_and_measures_nothing(run: Path) -> None:
    assert len(events(run, "prediction")) == 1 and events(run, "measured") == []
