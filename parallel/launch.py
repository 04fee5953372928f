"""Who am I: rank facts from the launcher, the rendezvous, and the device.

The only module that reads the environment, or changes it for a library. What each launcher says is in launchers.py.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group

from parallel import launchers
from parallel.errors import LaunchError, LostContactError
from parallel.heartbeat import Heartbeat, beat_path
from parallel.launchers import HEARTBEATS, Launch, MeetingPoint

__all__ = [
    "Launch",
    "advise_against_restart",
    "become",
    "choose_device",
    "detect",
    "environment_of_no_rank",
    "lent_environment",
    "meet",
    "open_heartbeat",
    "provide_local_rank",
    "start",
    "stop",
    "visible_devices",
]

NAMED_RANKS = 8  # that an error lists
DEVICES = "CUDA_VISIBLE_DEVICES"


def detect(environment: Mapping[str, str] | None = None) -> Launch:
    """Rank facts of this process. Raises LaunchError where the environment contradicts itself."""
    launch = launchers.detect(os.environ if environment is None else environment)
    if launch.launcher == "srun" and "mpi4py.MPI" in sys.modules:
        _check_mpi(launch, "start with srun --mpi=pmix (or pmi2, as your MPI was built), or with mpirun inside the job")
    return launch


def choose_device(launch: Launch, wanted: str = "auto") -> torch.device:
    """The device of this rank, or the CPU where not every local rank has one.

    `cuda:<local rank>`, or `cuda:0` where a rank sees its own device only. `wanted` is "auto", "cpu" or "cuda"; LaunchError
    where "cuda" cannot be had.
    """
    count = torch.cuda.device_count()
    needed = 1 if launch.own_device else launch.local_world_size
    if wanted == "cuda" and count < needed:
        raise LaunchError(
            f"train.device is cuda, but this node has {count} CUDA devices for {launch.local_world_size} ranks: "
            + (f"start {count} ranks per node, or " if count else "")
            + "set --train.device cpu"
        )
    if wanted == "cpu" or count < needed:
        return torch.device("cpu")
    return torch.device("cuda", 0 if launch.own_device and count == 1 else launch.local_rank)


def start(launch: Launch, device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Join the other processes. One process alone needs no process group and makes none.

    Raises LaunchError, on every rank that came, that says where they were to meet and which ranks did not come in `timeout`.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1 or dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store = meet(launch, timeout)
        _wait_for_all(store, launch, timeout)
        group_store = dist.PrefixStore("world", store)
        dist.init_process_group(backend, store=group_store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    except (dist.DistError, ValueError, RuntimeError) as error:
        where = f"rank {launch.rank} of {launch.world_size}"
        raise LostContactError(f"{where} could not join the others over {backend}: {error}") from error


def stop(lost: bool = False) -> None:
    """Leave the process group, if there is one. Call it on every way out that all ranks take.

    `lost`: another rank has died or does not answer, so nobody is waited for.
    """
    if not dist.is_initialized():
        return
    if lost and dist.get_backend() == "nccl":
        _abort_process_group()  # to destroy it would wait for what will never come
    else:
        dist.destroy_process_group()


def meet(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store that all processes of the launcher share. Raises LaunchError, LostContactError and DistError."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent runs it
        return next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))[0]
    if launch.meeting_point is not None:
        return _store(launch.meeting_point, launch, timeout)
    if launch.launcher == "mpirun":
        return _meet_over_mpi(launch, timeout)
    raise LaunchError(f"rank {launch.rank} of {launch.world_size} has no MASTER_ADDR in its environment: start with torchrun")


def _store(point: MeetingPoint, launch: Launch, timeout: timedelta) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            point.host, point.port, launch.world_size, is_master=point.serves, timeout=timeout, wait_for_workers=False
        )
    except (dist.DistError, RuntimeError) as error:
        if point.serves:
            advice = "another program may have the port: export MASTER_ADDR and a free MASTER_PORT on all nodes"
            text = f"rank {launch.rank} cannot open port {point.port} for the others ({error}): {advice}"
            raise LostContactError(text) from error
        raise LostContactError(
            f"rank {launch.rank} on {socket.gethostname()} cannot reach {point.host}:{point.port}, where all ranks of this "
            f"{launch.launcher} job meet, in {timeout.total_seconds():.0f} s: is the name known on this node, did the first "
            "process start, and may nodes connect to each other? Another address: export MASTER_ADDR and MASTER_PORT"
        ) from error


def _meet_over_mpi(launch: Launch, timeout: timedelta) -> dist.TCPStore:
    """Rank 0 opens a free port and broadcasts where it is."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(
            f"mpirun has started {launch.world_size} ranks on several nodes, and nothing says where they meet: give it "
            "-x MASTER_ADDR=NAME -x MASTER_PORT=29500 (Open MPI; NAME is that of rank 0's node), or pip install mpi4py"
        ) from error
    _check_mpi(launch, "mpi4py must be built for the MPI whose mpirun starts it: pip install --force-reinstall mpi4py")
    point, server = None, None
    if launch.rank == 0:
        server = dist.TCPStore("0.0.0.0", 0, launch.world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        point = (socket.gethostname(), server.port)
    host, port = MPI.COMM_WORLD.bcast(point)
    return server or _store(MeetingPoint(host, port, serves=False), launch, timeout)


def _check_mpi(launch: Launch, advice: str) -> None:
    """MPI sees as many ranks as the launcher says; otherwise each process would be alone in a world of its own."""
    from mpi4py import MPI

    size = MPI.COMM_WORLD.Get_size()
    if size != launch.world_size:
        raise LaunchError(f"{launch.launcher} has started {launch.world_size} ranks, and mpi4py sees {size}: {advice}")


def _wait_for_all(store: dist.Store, launch: Launch, timeout: timedelta) -> None:
    """Return when every rank has come. Raises LaunchError naming those that have not."""
    store.set(_key(launch.rank), socket.gethostname())
    if store.add("ranks here", 1) == launch.world_size:
        store.set("all here", "")
    try:
        store.wait(["all here"], timeout)
    except (dist.DistError, RuntimeError) as error:
        missing = [rank for rank in range(launch.world_size) if not store.check([_key(rank)])]
        here = sorted({store.get(_key(rank)).decode() for rank in range(launch.world_size) if rank not in set(missing)})
        raise LostContactError(
            f"{len(missing)} of {launch.world_size} ranks have not come in {timeout.total_seconds():.0f} s: rank "
            f"{_listed(missing)}; the others are on {_listed(here)}. Look at the logs of the nodes that are missing here"
        ) from error


def _key(rank: int) -> str:
    return f"rank {rank}"


def _listed(items: list) -> str:
    return ", ".join(map(str, items[:NAMED_RANKS])) + (
        f" and {len(items) - NAMED_RANKS} more" if len(items) > NAMED_RANKS else ""
    )


def advise_against_restart() -> None:
    """Make the file that NO_RESTART_FILE names, if it is set: where a job's script or supervisor looks.

    For the exit code of a job with many ranks may be that of one that was killed after this one.
    """
    path = os.environ.get("NO_RESTART_FILE")
    if path:
        with suppress(OSError):
            Path(path).touch()


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


def environment_of_no_rank() -> dict[str, str]:
    """This environment without what launchers tell their ranks: for a program that is to be on its own."""
    told = re.compile(r"(OMPI|PMI|PMIX|PRTE|MPI|HYDRA)_|SLURM_(?!CONF)|(LOCAL_)?(RANK|WORLD_SIZE)$")
    return {name: value for name, value in os.environ.items() if not told.match(name)}


def provide_local_rank(local_rank: int) -> None:
    """LOCAL_RANK, for a library that reads it while it runs; a launcher's own value stays."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))


def visible_devices(slots: Sequence[int]) -> str:
    """The CUDA devices at these places among those that this process sees, as CUDA_VISIBLE_DEVICES has them.

    Raises LaunchError where there are not as many.
    """
    visible = os.environ.get(DEVICES)
    if not visible:  # all of them; or none, if the variable is empty
        return ",".join(map(str, slots)) if visible is None else ""
    names = visible.split(",")
    if max(slots) >= len(names):
        raise LaunchError(
            f"--ranks and --spares together need {max(slots) + 1} devices, and {DEVICES}={visible} has {len(names)}: lower "
            "one of them, or show this process more devices"
        )
    return ",".join(names[slot] for slot in slots)


def become(launch: Launch, heartbeats: Path, devices: str | None = None) -> None:
    """This process is that rank from now on, as if torchrun had started it; its heartbeat is in the directory `heartbeats`.

    `devices`: what the ranks of this node see of the GPUs (`visible_devices`); None changes nothing.
    """
    point = launch.meeting_point
    assert point is not None
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "CROSS_SIZE"):  # of a torchrun or deepspeed that started the supervisor
        os.environ.pop(name, None)
    os.environ.update(
        RANK=str(launch.rank),
        LOCAL_RANK=str(launch.local_rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_WORLD_SIZE=str(launch.local_world_size),
        MASTER_ADDR=point.host,
        MASTER_PORT=str(point.port),
        **{HEARTBEATS: str(heartbeats)},
    )
    if devices is not None:
        os.environ[DEVICES] = devices


def open_heartbeat(launch: Launch) -> Heartbeat:
    """The heartbeat of this rank: seen by the supervisor that has started it, if one has."""
    directory = os.environ.get(HEARTBEATS)
    return Heartbeat(None if directory is None else beat_path(Path(directory), launch.rank))
