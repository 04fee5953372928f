"""What a run is predicted to take: said before its first step, and compared with what it then takes (`comparison`).

A prediction never stops a run: where one fails, the reason is said in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from megatron_llama.config import RunConfig
from megatron_llama.plan import hardware
from megatron_llama.plan.configured import job_of, predict, rank_memory
from megatron_llama.plan.detection import profile_of
from megatron_llama.plan.hardware import Hardware
from megatron_llama.plan.memory import Memory, largest
from megatron_llama.progress import GIB
from parallel.errors import ConfigError, UserError
from parallel.launch import Launch

MIB = 2**20
HOST_GPUS = 16  # the most that a host has; the larger "nodes" of profiles are racks, which NVLink joins
ANY_GPU = "h100"  # for what does not depend on it: the bytes that a run allocates


@dataclass(frozen=True)
class Forecast:
    """What is predicted of a run; None where it is not known, and `reasons` why.

    `profile`: the hardware's name. `mfu` counts attention's causal half. `memory`: of the fullest rank. `state_bytes`: weights,
    gradients and optimizer state of the rank that has the most. `capacity_bytes`: of a GPU.
    """

    profile: str | None = None
    step_seconds: float | None = None
    tokens_per_second_per_gpu: float | None = None
    mfu: float | None = None
    memory: Memory | None = None
    state_bytes: float | None = None
    capacity_bytes: float | None = None
    reasons: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For the log, before the first step."""
        said = []
        if self.step_seconds is not None:
            speed = f"{self.tokens_per_second_per_gpu:,.0f} tokens/s per device"
            said.append(f"step {seconds_text(self.step_seconds)}, {speed}, MFU {self.mfu:.1%} ({self.profile})")
        if self.memory is not None:
            said.append(self._memory_line(self.memory))
        said += self.reasons
        return [f"{'predicted ' if number == 0 else ' ' * 10}{line}" for number, line in enumerate(said)]

    def _memory_line(self, memory: Memory) -> str:
        unit, name = unit_of(memory.allocated)
        parts = ", ".join(
            f"{item.name} {getattr(memory, item.name) / unit:,.1f}" for item in fields(memory) if item.name != "framework"
        )
        line = f"the fullest rank allocates {memory.allocated / unit:,.1f} {name}: {parts}"
        if self.capacity_bytes is None:
            return line
        taken, capacity = memory.total / GIB, self.capacity_bytes / GIB
        return f"{line}; with fragmentation and the framework's share {taken:,.1f} of {capacity:,.1f} GiB"

    def record(self) -> dict[str, Any]:
        """For the metrics."""
        record = {name: getattr(self, name) for name in ("step_seconds", "tokens_per_second_per_gpu", "mfu", "state_bytes")}
        if self.memory is not None:
            record["memory_bytes"] = asdict(self.memory) | {"allocated": self.memory.allocated, "total": self.memory.total}
        return _known(record)

    @property
    def compared(self) -> dict[str, float]:
        """What can be measured."""
        allocated = self.memory.allocated if self.memory is not None else None
        return _known({"step_seconds": self.step_seconds, "state_bytes": self.state_bytes, "allocated_bytes": allocated})


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def seconds_text(seconds: float) -> str:
    """Seconds, or milliseconds where that reads better."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def unit_of(size_bytes: float) -> tuple[int, str]:
    """GiB, or MiB where that reads better."""
    return (GIB, "GiB") if size_bytes >= GIB else (MIB, "MiB")


def make_forecast(config: RunConfig, launch: Launch, device: torch.device) -> Forecast | None:
    """The forecast of a configuration whose schedule is settled; None where `log.hardware` asks for none.

    Raises ConfigError where `log.hardware` is no profile.
    """
    wanted, world_size = config.log.hardware, launch.world_size
    if wanted == "none":
        return None
    profile = None if wanted == "auto" else _named(wanted)
    known: dict[str, Any] = {}
    reasons: list[str] = []
    with _saying_why_not("memory", reasons):
        memories = rank_memory(config, job_of(config, world_size, hardware.find(ANY_GPU)))
        known["memory"] = largest(memories)
        if config.zero.offload == "none":
            known["state_bytes"] = max(one.weights + one.gradients + one.optimizer for one in memories)
    with _saying_why_not("step time", reasons):
        profile = _on_these_nodes(profile or _detected(device), launch)
        known["profile"] = profile.name
        if device.type == "cuda":
            known["capacity_bytes"] = profile.memory_bytes
            if config.train.dtype == "fp32":
                raise NotPredicted("profiles are of 16-bit products, and train.dtype = fp32")
        prediction = predict(config, world_size, profile)
        known["step_seconds"] = prediction.step_seconds
        known["tokens_per_second_per_gpu"] = prediction.tokens_per_second_per_gpu
        known["mfu"] = prediction.mfu("causal")
    return Forecast(**known, reasons=tuple(reasons))


class NotPredicted(Exception):
    """Why something cannot be predicted."""


@contextmanager
def _saying_why_not(what: str, reasons: list[str]) -> Iterator[None]:
    """What fails inside is not predicted, whatever the reason, which is noted: the run does not depend on it."""
    try:
        yield
    except (NotPredicted, UserError) as error:
        reasons.append(f"no {what}: {error}")
    except Exception as error:
        reasons.append(f"no {what}: {type(error).__name__}: {error}")


def _named(profile: str) -> Hardware:
    """The profile that `log.hardware` names. Raises ConfigError."""
    try:
        return hardware.find(profile)
    except ConfigError as error:
        raise ConfigError(f"log.hardware = {profile}: {error}; --log.hardware none does without") from error


def _detected(device: torch.device) -> Hardware:
    """The profile of this device."""
    name, profile = "a CPU", None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, profile = properties.name, profile_of(properties.name, properties.total_memory)
    if profile is None:
        advice = "name one, or measure it and give its file: --log.hardware FILE.toml (docs/profiling.md)"
        raise NotPredicted(f"there is no hardware profile of {name}; {advice}")
    return hardware.find(profile)


def _on_these_nodes(profile: Hardware, launch: Launch) -> Hardware:
    """The profile with as many GPUs in a node as this job has there."""
    if profile.gpus_per_node > HOST_GPUS:
        return profile
    return replace(profile, gpus_per_node=launch.local_world_size)
