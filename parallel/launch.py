"""Who am I: rank facts from torchrun or from being alone, the rendezvous, and the device.

The only module that reads the environment, or changes it for a library. `DETECTORS` is the door through which SLURM and MPI
come: each looks at the environment and returns the facts, or None where it is not its launcher.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.errors import LaunchError


@dataclass(frozen=True)
class Launch:
    """This process among all: global `rank` of `world_size`, `local_rank` of `local_world_size` on this node."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = "one process"


def _from_torchrun(environment: Mapping[str, str]) -> Launch | None:
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name not in environment:
            raise LaunchError(f"the environment has RANK or WORLD_SIZE but no {name}: start with torchrun, or unset them all")
        try:
            values[name] = int(environment[name])
        except ValueError:
            raise LaunchError(f"{name}={environment[name]!r} in the environment is not an integer") from None
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if not 0 <= values[rank] < values[size]:
            raise LaunchError(f"{rank}={values[rank]} is not below {size}={values[size]}")
    return Launch(values["RANK"], values["LOCAL_RANK"], values["WORLD_SIZE"], values["LOCAL_WORLD_SIZE"], "torchrun")


DETECTORS = (_from_torchrun,)


def detect(environment: Mapping[str, str] | None = None) -> Launch:
    """Rank facts of this process. Raises LaunchError where the environment contradicts itself."""
    environment = os.environ if environment is None else environment
    for detector in DETECTORS:
        launch = detector(environment)
        if launch is not None:
            return launch
    return Launch()


def choose_device(launch: Launch, wanted: str = "auto") -> torch.device:
    """The device of this rank: `cuda:<local rank>` where each local rank has one, else the CPU.

    `wanted` is "auto", "cpu" or "cuda"; LaunchError where "cuda" cannot be had.
    """
    count = torch.cuda.device_count()
    enough = count >= launch.local_world_size
    if wanted == "cuda" and not enough:
        raise LaunchError(
            f"train.device is cuda, but this node has {count} CUDA devices for {launch.local_world_size} ranks: "
            + (f"start {count} ranks per node, or " if count else "")
            + "set --train.device cpu"
        )
    if wanted == "cpu" or not enough:
        return torch.device("cpu")
    return torch.device("cuda", launch.local_rank)


def start(launch: Launch, device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Join the other processes. One process alone needs no process group and makes none."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1 or dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    except (dist.DistError, ValueError, RuntimeError) as error:
        where = f"rank {launch.rank} of {launch.world_size}"
        raise LaunchError(f"{where} could not join the others over {backend}: {error}") from error


def stop() -> None:
    """Leave the process group, if there is one. Call it on every way out that all ranks take."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lent_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for a library that reads them. Afterwards the environment is as it was, whatever the library has set."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def provide_local_rank(local_rank: int) -> None:
    """LOCAL_RANK, for a library that reads it while it runs; a launcher's own value stays."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
