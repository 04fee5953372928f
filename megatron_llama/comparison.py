"""What a run takes beside what it was predicted to take: measured once, over a few of its first steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from megatron_llama.config import RunConfig, tokens_per_step
from megatron_llama.forecast import Forecast, seconds_text, unit_of
from megatron_llama.metrics import MetricsWriter
from megatron_llama.program import LOGGER
from parallel.collectives import all_gather
from parallel.groups import ProcessGroups
from parallel.host_copy import HostCopy
from parallel.zero.engine import Engine

WARM_UP = 3  # steps of this process that do not count: kernels are compiled, connections and memory are made
WINDOW = 10  # steps that do
MISMATCH = 0.1  # share of what was predicted, from which on the difference is pointed out
NOTABLE_WAIT = 0.02  # share of a step that waits for data


@dataclass(frozen=True)
class Fullest:
    """The rank that has the most of something."""

    size_bytes: float
    rank: int


@dataclass(frozen=True)
class Measured:
    """What a run has taken.

    `step_seconds`: the median; `data_wait_seconds`: the part of it in which a rank waits for its batch. `state`: weights,
    gradients and optimizer state. `allocated`, `reserved`: the most that this process ever had of a GPU's memory, and that its
    allocator kept for it; None on a CPU, where nobody counts them.
    """

    step_seconds: float
    tokens_per_second_per_gpu: float
    data_wait_seconds: float
    state: Fullest
    allocated: Fullest | None = None
    reserved: Fullest | None = None

    def record(self) -> dict[str, float]:
        """For the metrics."""
        record = {name: getattr(self, name) for name in ("step_seconds", "tokens_per_second_per_gpu", "data_wait_seconds")}
        for name in ("state", "allocated", "reserved"):
            found = getattr(self, name)
            if found is not None:
                record |= {f"{name}_bytes": found.size_bytes, f"{name}_rank": found.rank}
        return record


class Comparison:
    """Measures a run's steps until it has enough of them, and says how far they are from its forecast.

    All ranks make it and call `hear` alike, until it is `done`; rank 0 alone has a forecast and the metrics. What the ranks
    have allocated is on its way for a step, so nobody waits for it.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroups,
        device: torch.device,
        engine: Engine,
        forecast: Forecast | None,
        metrics: MetricsWriter | None,
    ) -> None:
        self.groups, self.device, self.engine = groups, device, engine
        self.forecast, self.metrics = forecast, metrics
        self.tokens_per_step = tokens_per_step(config)
        self.done = config.log.hardware == "none"
        self._left_out = max(WARM_UP, 1 + config.log.trace_steps)  # the first steps, traced ones among them
        self._steps: list[tuple[float, float]] = []  # seconds, and those of them in which it waited for data
        self._look: HostCopy | None = None  # at the ranks' memory, under way
        self._log = logging.getLogger(LOGGER)

    def hear(self, step: int, seconds: float, data_wait_seconds: float, counts: bool) -> None:
        """A step is finished. It does not count where something else than training was part of it."""
        if self._look is not None:
            self._conclude(step, self._look)
            self.done = True
        elif self._left_out:
            self._left_out -= 1
        elif counts:
            self._steps.append((seconds, data_wait_seconds))
            if len(self._steps) == WINDOW:
                own = torch.tensor(self._own_bytes(), dtype=torch.float64).to(self.device)
                self._look = HostCopy(lambda: [all_gather(own, self.groups.world)], self.device)

    def _own_bytes(self) -> list[int]:
        """This rank's state, and on a GPU what it has allocated and reserved."""
        state, device = self.engine.state_bytes, self.device
        if device.type != "cuda":
            return [state]
        return [state, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]

    def _conclude(self, step: int, look: HostCopy) -> None:
        found, ranks = look.read(), self.groups.world.size
        if self.forecast is None or self.metrics is None:
            return
        kinds = len(found) // ranks
        seconds = median(seconds for seconds, _ in self._steps)
        measured = Measured(
            seconds,
            self.tokens_per_step / seconds / ranks,
            median(waited for _, waited in self._steps),
            *(fullest(found[kind::kinds]) for kind in range(kinds)),
        )
        ratio = ratios(self.forecast, measured)
        values = {"measured": measured.record(), "predicted": self.forecast.compared, "ratio": ratio}
        self.metrics.write_event(step, "measured", **values)
        self._log.info(measured_line(self.forecast, measured))
        complaint = mismatch(ratio, measured, self.metrics.path)
        if complaint:
            self._log.warning(complaint)


def fullest(sizes: Sequence[float]) -> Fullest:
    """Of the ranks' sizes in bytes the largest."""
    rank = max(range(len(sizes)), key=sizes.__getitem__)
    return Fullest(sizes[rank], rank)


def ratios(forecast: Forecast, measured: Measured) -> dict[str, float]:
    """Measured over predicted, of what is known of both."""
    found = measured.record()
    return {name: found[name] / value for name, value in forecast.compared.items() if name in found}


def measured_line(forecast: Forecast, measured: Measured) -> str:
    """The figures side by side."""
    seconds, predicted = measured.step_seconds, forecast.step_seconds
    beside = f" (predicted {seconds_text(predicted)}, {seconds / predicted - 1:+.0%})" if predicted else ""
    said = f"measured  step {seconds_text(seconds)}{beside}, {measured.tokens_per_second_per_gpu:,.0f} tokens/s per device; "
    if measured.allocated is None or measured.reserved is None:
        return f"{said}weights, gradients and optimizer state {_size(measured.state, forecast.state_bytes)}"
    allocated = forecast.memory.allocated if forecast.memory is not None else None
    return f"{said}memory {_size(measured.allocated, allocated)}, {_size(measured.reserved, None)} with what is kept free"


def _size(found: Fullest, predicted: float | None) -> str:
    unit, name = unit_of(found.size_bytes)
    beside = f" (predicted {predicted / unit:,.1f}, {found.size_bytes / predicted - 1:+.0%})" if predicted else ""
    return f"{found.size_bytes / unit:,.1f} {name} on rank {found.rank}{beside}"


def mismatch(ratio: Mapping[str, float], measured: Measured, metrics: Path) -> str:
    """One line where something is far from what was predicted: how far, the likeliest reason, what to do. Empty otherwise."""
    far = {name: value for name, value in ratio.items() if abs(value - 1) > MISMATCH}
    said = []
    if "step_seconds" in far:
        waits = measured.data_wait_seconds / measured.step_seconds
        reason = "clocks, links or kernels are not the profile's"
        if far["step_seconds"] > 1 and waits > NOTABLE_WAIT:
            reason = f"{waits:.0%} of it waits for data"
        advice = f"tools/plan.py --calibrate {metrics} plans by this run"
        said.append(f"the step takes {far['step_seconds']:.2f} times as long as predicted: {reason}; {advice}")
    if "state_bytes" in far:
        said.append(f"weights, gradients and optimizer state take {far['state_bytes']:.2f} times the memory predicted")
    elif "allocated_bytes" in far:
        reason = "activations or workspaces are not what the planner takes them for, so leave as much room in plans"
        said.append(f"{far['allocated_bytes']:.2f} times the memory predicted is allocated: {reason}")
    return f"MISMATCH  {'. '.join(said)} (docs/planning.md)" if said else ""
