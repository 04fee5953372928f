"""Rank facts from the environment, and the device."""

import socket
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import parallel.launch as launch_module
from parallel.errors import LaunchError
from parallel.launch import Launch, choose_device, detect, start, stop, visible_devices
from parallel.launchers import MeetingPoint
from tests.parallel.test_launchers import HYDRA, SRUN
from tests.ranks import run_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_torchrun_variables_give_the_rank():
    assert detect(TORCHRUN) == Launch(rank=5, local_rank=1, world_size=8, local_world_size=4, launcher="torchrun")


def test_alone_without_them():
    assert detect({"HOME": "/root"}) == Launch(rank=0, local_rank=0, world_size=1, local_world_size=1, launcher="one process")


def test_the_process_environment_is_the_default(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert detect().rank == 5


@pytest.mark.parametrize("missing", sorted(TORCHRUN))
def test_a_missing_variable_is_named(missing):
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(LaunchError, match=f"no {missing}: start with torchrun, or unset them all"):
        detect(environment)


@pytest.mark.parametrize("name", sorted(TORCHRUN))
@pytest.mark.parametrize("value", ["", "two", "1.5"])
def test_a_variable_that_is_no_integer_is_named_with_its_value(name, value):
    with pytest.raises(LaunchError, match=f"{name}={value!r} in the environment is not an integer"):
        detect(TORCHRUN | {name: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK=-1 is not below WORLD_SIZE=8"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK=0 is not below WORLD_SIZE=0"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not below LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK=0 is not below LOCAL_WORLD_SIZE=0"),
    ],
    ids=str,
)
def test_variables_that_contradict_each_other_are_named(change, text):
    with pytest.raises(LaunchError, match=text):
        detect(TORCHRUN | change)


@pytest.fixture
def cuda_devices(monkeypatch):
    def set_count(count):
        monkeypatch.setattr(launch_module.torch.cuda, "device_count", lambda: count)

    return set_count


@pytest.mark.parametrize(
    ("wanted", "count", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 3, "cpu"),  # fewer devices than local ranks
        ("auto", 4, "cuda:1"),
        ("cuda", 8, "cuda:1"),
        ("cpu", 8, "cpu"),
    ],
)
def test_a_device_for_each_local_rank_or_the_cpu(cuda_devices, wanted, count, device):
    cuda_devices(count)
    assert choose_device(detect(TORCHRUN), wanted) == torch.device(device)


@pytest.mark.parametrize("count", [0, 3])
def test_asking_for_devices_that_are_not_there_is_an_error(cuda_devices, count):
    cuda_devices(count)
    with pytest.raises(LaunchError, match=f"this node has {count} CUDA devices for 4 ranks.*--train.device cpu"):
        choose_device(detect(TORCHRUN), "cuda")


def test_one_process_starts_no_process_group():
    start(Launch(), torch.device("cpu"))
    assert not dist.is_initialized()
    stop()


def join_and_leave(rank, world_size, port):
    """Join by the launcher's variables, and leave."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start(detect({name: str(value) for name, value in (variables | meeting).items()}), torch.device("cpu"))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    facts = total.item(), dist.get_rank(), dist.get_backend()
    dist.barrier()
    stop()
    return *facts, not dist.is_initialized()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_start_joins_over_gloo_and_stop_leaves():
    ranks = run_ranks(2, join_and_leave, free_port(), joined=False)
    assert ranks == [(3.0, 0, "gloo", True), (3.0, 1, "gloo", True)]


def test_a_rank_without_an_address_is_named(monkeypatch):
    with pytest.raises(LaunchError, match="rank 0 of 2 has no MASTER_ADDR in its environment: start with torchrun"):
        start(detect({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}), torch.device("cpu"))


def test_ranks_that_do_not_come_are_named():
    """The world is of four; two come, and both say who is missing."""

    def come(rank, world_size, port):
        point = MeetingPoint("127.0.0.1", port, serves=rank == 0)
        with pytest.raises(LaunchError) as error:
            start(Launch(3 * rank, rank, 4, 4, "srun", point), torch.device("cpu"), timedelta(seconds=2))
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port + 1}", rank=rank, world_size=world_size)
        dist.barrier()
        return str(error.value)

    for text in run_ranks(2, come, free_port(), joined=False):
        assert text.startswith("2 of 4 ranks have not come in 2 s: rank 1, 2; the others are on " + socket.gethostname())


def test_a_store_that_is_not_there_is_named():
    launch = Launch(1, 1, 2, 2, "srun", MeetingPoint("127.0.0.1", free_port(), serves=False))
    with pytest.raises(LaunchError, match=r"rank 1 on .* cannot reach 127.0.0.1:\d+, .* in 1 s: .* export MASTER_ADDR"):
        start(launch, torch.device("cpu"), timedelta(seconds=1))


def test_a_port_that_is_taken_is_named():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        launch = Launch(0, 0, 2, 2, "srun", MeetingPoint("127.0.0.1", holder.getsockname()[1], serves=True))
        with pytest.raises(LaunchError, match="rank 0 cannot open port .* free MASTER_PORT"):
            start(launch, torch.device("cpu"), timedelta(seconds=1))


def test_own_devices_are_number_zero(cuda_devices):
    cuda_devices(1)
    launch = Launch(5, 1, 8, 4, "srun", own_device=True)
    assert choose_device(launch) == choose_device(launch, "cuda") == torch.device("cuda:0")


def test_mpi_without_an_address_and_mpi4py_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match="nothing says where they meet: .* -x MASTER_ADDR=NAME .* or pip install mpi4py"):
        start(Launch(1, 0, 4, 2, "mpirun"), torch.device("cpu"))


class OneRankEach:
    """An MPI that was not told of the others."""

    COMM_WORLD = SimpleNamespace(Get_size=lambda: 1)


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (SRUN, "srun has started 4 ranks, and mpi4py sees 1: start with srun --mpi=pmix"),
        (HYDRA | {"MPI_LOCALNRANKS": "2"}, "mpirun has started 4 ranks, and mpi4py sees 1: mpi4py must be built"),
    ],
    ids=["srun", "mpirun"],
)
def test_an_mpi_that_sees_one_rank_in_each_process_is_found(environment, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=OneRankEach))
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", OneRankEach)
    with pytest.raises(LaunchError, match=text):
        start(detect(environment), torch.device("cpu"))


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "0,2"), ("", ""), ("4,5,6,7", "4,6"), ("GPU-a,GPU-b,GPU-c", "GPU-a,GPU-c")]
)
def test_slots_are_devices_among_those_that_are_visible(
    visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_devices((0, 2)) == expected


def test_too_few_devices_for_the_slots_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(LaunchError, match="together need 3 devices, and CUDA_VISIBLE_DEVICES=0,1 has 2"):
        visible_devices((0, 2))
