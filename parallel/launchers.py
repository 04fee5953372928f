"""What torchrun, DeepSpeed's launcher, mpirun, srun and Hydra tell a process about itself. Pure functions of the environment.

Of several launchers the innermost counts: torchrun's RANK wins over all, as it may run inside a job step, and Open MPI's
variables win over SLURM's, as its daemons are started by srun. A step's variables win over the job's: it may use a part of it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from parallel.errors import LaunchError

FIRST_PORT, PORTS = 15_000, 15_000  # below those that systems give out by themselves
HEARTBEATS = "PARALLEL_HEARTBEATS"  # the directory where a supervisor looks for them
NO_STEP = ("", str(0xFFFFFFFA), str(0xFFFFFFFB))  # SLURM_STEP_ID of interactive shells and batch scripts, which are no ranks


@dataclass(frozen=True)
class MeetingPoint:
    """The store through which the ranks find each other: `serves` is true in the one process that runs it."""

    host: str
    port: int
    serves: bool


@dataclass(frozen=True)
class Launch:
    """This process among all: global `rank` of `world_size`, `local_rank` of `local_world_size` on this node.

    `meeting_point`: None where it is to be agreed on (mpirun) or not needed. `own_device`: the launcher shows each rank its own
    GPU only.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = "one process"
    meeting_point: MeetingPoint | None = None
    own_device: bool = False


Environment = Mapping[str, str]


def detect(environment: Environment) -> Launch:
    """Rank facts from the environment. Raises LaunchError where it contradicts itself."""
    for detector in (_from_torchrun, _from_open_mpi, _from_slurm, _from_hydra):
        launch = detector(environment)
        if launch is not None:
            return launch
    if "SLURM_JOB_ID" in environment:
        return Launch(launcher=f"one process in SLURM job {environment['SLURM_JOB_ID']}, not started by srun")
    return Launch()


def _from_torchrun(environment: Environment) -> Launch | None:
    """torchrun, DeepSpeed's launcher (which says LOCAL_SIZE), a supervisor, or variables set by hand."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    local_size = "LOCAL_SIZE" if "CROSS_SIZE" in environment else "LOCAL_WORLD_SIZE"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", local_size)
    rank, local_rank, size, local = _integers(
        environment, names, "RANK or WORLD_SIZE", "start with torchrun, or unset them all"
    )
    launcher = "supervisor" if HEARTBEATS in environment else "deepspeed" if local_size == "LOCAL_SIZE" else "torchrun"
    return _checked(Launch(rank, local_rank, size, local, launcher, _given_meeting_point(environment, rank)), names)


def _from_open_mpi(environment: Environment) -> Launch | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    names = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))
    return _of_mpirun(environment, names, environment.get("PMIX_NAMESPACE", ""))


def _from_hydra(environment: Environment) -> Launch | None:
    """MPICH and what descends from it."""
    if "PMI_RANK" not in environment:
        return None
    names = ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS")
    return _of_mpirun(environment, names, environment.get("PMI_PORT", ""))


def _of_mpirun(environment: Environment, names: tuple[str, ...], job: str) -> Launch:
    values = _integers(environment, names, names[0], "start with mpirun, or unset it")
    rank, _, size, local_size = values
    meeting_point = _given_meeting_point(environment, rank)
    if meeting_point is None and local_size == size and job:
        meeting_point = MeetingPoint("127.0.0.1", _port_of(job), serves=rank == 0)
    return _checked(Launch(*values, "mpirun", meeting_point), names)


def _from_slurm(environment: Environment) -> Launch | None:
    """A task of a step that srun started; a batch script has SLURM_PROCID=0 too, but is no rank."""
    if environment.get("SLURM_STEP_ID", "") in NO_STEP or "SLURM_PROCID" not in environment:
        return None
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_STEP_ID", "SLURM_JOB_ID")
    values = _integers(environment, names, "SLURM_STEP_ID", "start with srun, or unset it")
    rank, local_rank, size, node, step, job = values
    local_size = _of_node(environment, "SLURM_STEP_TASKS_PER_NODE", expand_counts, node)
    meeting_point = _given_meeting_point(environment, rank)
    if meeting_point is None:  # with --distribution=arbitrary, rank 0 may be elsewhere than on the first node
        first_host = _of_node(environment, "SLURM_STEP_NODELIST", expand_hosts, 0)
        meeting_point = MeetingPoint(first_host, _port_of(f"{job}.{step}"), serves=node == 0 and local_rank == 0)
    binding = environment.get("SLURM_GPU_BIND", "")
    own_device = (
        "SLURM_GPUS_PER_TASK" in environment
        or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
        or binding.startswith(("single:", "per_task:"))
    )
    launch = Launch(rank, local_rank, size, local_size, "srun", meeting_point, own_device)
    return _checked(launch, ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"))


def _given_meeting_point(environment: Environment, rank: int) -> MeetingPoint | None:
    """MASTER_ADDR and MASTER_PORT, where rank 0 runs the store, if they are set."""
    if "MASTER_ADDR" not in environment and "MASTER_PORT" not in environment:
        return None
    (port,) = _integers(environment, ("MASTER_PORT",), "MASTER_ADDR", "export both, or neither")
    if "MASTER_ADDR" not in environment:
        raise LaunchError("the environment has MASTER_PORT but no MASTER_ADDR: export both, or neither")
    return MeetingPoint(environment["MASTER_ADDR"], port, serves=rank == 0)


def expand_hosts(text: str) -> list[str]:
    """SLURM's list of hosts: `n[01-02,05],m1` -> n01, n02, n05, m1. Raises ValueError."""
    hosts = []
    for part in _split_outside_brackets(text):
        bracket = re.fullmatch(r"([^\[\]]*)\[([^\[\]]+)\](.*)", part)
        if bracket is None:
            if "[" in part or "]" in part:
                raise ValueError(f"brackets do not match in {part!r}")
            hosts.append(part)
            continue
        before, ranges, rest = bracket.groups()
        for number in _numbers(ranges):
            hosts += [f"{before}{number}{after}" for after in (expand_hosts(rest) if rest else [""])]
    return hosts


def expand_counts(text: str) -> list[int]:
    """SLURM's counts per node: `2(x3),1` -> 2, 2, 2, 1. Raises ValueError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if match is None:
            raise ValueError(f"{part!r} is no count")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split_outside_brackets(text: str) -> list[str]:
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(parts) != text:
        raise ValueError(f"{text!r} is no list of hosts")
    return parts


def _numbers(ranges: str) -> Iterator[str]:
    """`01-02,5` -> 01, 02, 5: as wide as written."""
    for item in ranges.split(","):
        low, _, high = item.partition("-")
        for number in range(int(low), int(high or low) + 1):
            yield f"{number:0{len(low)}d}"


def _of_node(environment: Environment, name: str, expand, node: int):
    """The entry of a node in a list of SLURM's."""
    try:
        return expand(environment[name])[node]
    except KeyError:
        raise LaunchError(f"the environment has SLURM_STEP_ID but no {name}: start with srun, or unset it") from None
    except (ValueError, IndexError) as error:
        raise LaunchError(f"{name}={environment[name]!r} in the environment says nothing of node {node}: {error}") from None


def _port_of(job: str) -> int:
    """The same port on every rank of a job; another one, most likely, in another job on the same node."""
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def _integers(environment: Environment, names: tuple[str, ...], because: str, advice: str) -> list[int]:
    values = []
    for name in names:
        if name not in environment:
            raise LaunchError(f"the environment has {because} but no {name}: {advice}")
        try:
            values.append(int(environment[name]))
        except ValueError:
            raise LaunchError(f"{name}={environment[name]!r} in the environment is not an integer") from None
    return values


def _checked(launch: Launch, names: tuple[str, ...]) -> Launch:
    """`launch`; `names` are the variables of rank, local rank, size and local size, for the errors."""
    rank, local_rank, size, local_size = names
    for value, limit, name, of in (
        (launch.rank, launch.world_size, rank, size),
        (launch.local_rank, launch.local_world_size, local_rank, local_size),
    ):
        if not 0 <= value < limit:
            raise LaunchError(f"{name}={value} is not below {of}={limit}")
    return launch
