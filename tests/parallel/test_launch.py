"""Rank facts from the environment, and the device."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

import parallel.launch as launch_module
from parallel.errors import LaunchError
from parallel.launch import Launch, choose_device, detect, start, stop
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


def join_and_leave(rank, world_size, port, store):
    """`run_ranks` has initialised one already; leave it, and join by the launcher's variables."""
    stop()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start(Launch(rank, rank, world_size, world_size, "torchrun"), torch.device("cpu"))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    facts = total.item(), dist.get_rank(), dist.get_backend()
    dist.barrier()
    stop()
    left = not dist.is_initialized()
    # for the barrier at the end of `run_ranks`
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
    return *facts, left


def test_start_joins_over_gloo_and_stop_leaves(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert run_ranks(2, join_and_leave, port, tmp_path / "store") == [(3.0, 0, "gloo", True), (3.0, 1, "gloo", True)]


def test_a_rendezvous_that_fails_names_the_rank(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LaunchError, match="rank 0 of 2 could not join the others over gloo"):
        start(Launch(0, 0, 2, 2, "torchrun"), torch.device("cpu"))
