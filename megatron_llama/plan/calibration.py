"""One factor from a user's own run: how much slower its steps were than predicted."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from megatron_llama.config import load_config
from megatron_llama.goodput import world_size
from megatron_llama.plan.configured import predict
from megatron_llama.plan.hardware import Hardware
from parallel.errors import DataError

WARM_UP = 3  # steps of each run that are left out


def calibrate(metrics: Path, hardware: Hardware, gpus: int | None = None) -> float:
    """Measured over predicted step time of the run whose metrics.jsonl is given; its config.toml lies beside it.

    `gpus`: of that run; by its log where that is None. The median of the steps after the first few counts. Raises DataError
    where the run does not say enough.
    """
    measured = _step_seconds(metrics)
    gpus = gpus or world_size(metrics.parent)
    if gpus is None:
        raise DataError(f"{metrics.parent}/logs does not say how many GPUs the run had: give --calibrate-gpus")
    config = load_config(["--config", str(metrics.parent / "config.toml")])
    return measured / predict(config, gpus, hardware).time.total


def _step_seconds(metrics: Path) -> float:
    """The median step of a metrics.jsonl. Raises DataError."""
    try:
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{metrics}: {error}") from error
    seconds = [line["step_seconds"] for line in lines if isinstance(line, dict) and "step_seconds" in line]
    if len(seconds) <= WARM_UP:
        raise DataError(f"{metrics} has {len(seconds)} steps; calibration needs at least {WARM_UP + 1}")
    return median(seconds[WARM_UP:])
