"""A save in the background is the synchronous one, of the moment when it was begun, and all ranks agree on how it ends."""

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.checkpoint import SingleProcess, committed_steps, load_tensors, newest_checkpoint, save, save_checkpoint
from parallel.checkpoint.background import BackgroundSaver, HostMemory, Progress
from parallel.checkpoint.save import FailedElsewhere, remove_unfinished
from parallel.errors import CheckpointError
from parallel.shards import Box, TensorBox

CPU = torch.device("cpu")
LAYOUT = (2, 1, 1)
STATE = {"step": 2}


def training_steps(saver, at_most=10**9):
    """The outcome of the save under way, after steps whose sums are heard while the next one runs, as in a training."""
    launched = Progress()
    for _ in range(at_most):
        sums = torch.tensor(saver.progress(), dtype=torch.float64)
        dist.all_reduce(sums)
        outcome = saver.hear(launched)
        launched = Progress(*sums.tolist())
        if outcome is not None:
            return outcome
    return saver.hear(launched)


class Gate:
    """Holds a function of `module` until it is opened; `reached` says that a thread is there."""

    def __init__(self, module, name):
        self.open, self.reached, original = threading.Event(), threading.Event(), getattr(module, name)

        def held(*arguments, **options):
            self.reached.set()
            assert self.open.wait(20)
            return original(*arguments, **options)

        setattr(module, name, held)


def fail(error_number, times=1):
    """Fails `times` times, then does what `original` does."""

    def make(original):
        left = iter(range(times))

        def failing(*arguments, **options):
            if next(left, None) is not None:
                raise OSError(error_number, os.strerror(error_number))
            return original(*arguments, **options)

        return failing

    return make


def replace(module, name, make):
    setattr(module, name, make(getattr(module, name)))


# What is saved


def test_it_is_the_state_of_its_moment_and_file_for_file_the_synchronous_save(tmp_path, model):
    expected = model.save_layout(tmp_path / "expected", 2, LAYOUT, state=STATE, extra_files={"tokenizer.model": b"abc"})
    root = tmp_path / "root"

    def body(voter):
        gate = Gate(save, "write_safetensors")
        saver, state = BackgroundSaver(voter, CPU), model.RankState(LAYOUT, voter.rank, True)
        saver.start(root, 2, state.groups, STATE, extra_files={"tokenizer.model": b"abc"})
        for item in state.targets():
            item.tensor.fill_(7)  # training goes on before a byte has been written
        assert training_steps(saver, at_most=3) is None and saver.step == 2
        gate.open.set()
        outcome = training_steps(saver)
        assert outcome.error is None and (outcome.step, outcome.directory) == (2, root / "step_00000002")
        assert saver.step is None and saver.progress() == Progress()

    assert model.run_ranks(2, body, tmp_path) == [(0, "")] * 2
    found = newest_checkpoint(root)
    assert os.listdir(root) == [found.name]
    assert sorted(os.listdir(found)) == sorted(os.listdir(expected))
    for name in os.listdir(expected):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_the_memory_of_the_copy_is_made_once():
    sizes = [(3, 5), (0, 4), (), (7,)]
    dtypes = [torch.float32, torch.float32, torch.int64, torch.bfloat16]
    tensors = [torch.randn(size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    strided = torch.randn(6, 4).t()[1:, ::2]

    def groups():
        for number, tensor in enumerate([*tensors, strided]):
            yield TensorBox(f"w{number}", tuple(tensor.shape), Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor)

    memory = HostMemory(CPU)
    first = memory.copy(lambda: {"weights": groups()})["weights"]
    places = [item.tensor.data_ptr() for item in first if item.box.numel]
    for tensor in tensors:
        tensor += 1
    second = memory.copy(lambda: {"weights": groups()})["weights"]
    assert [item.tensor.data_ptr() for item in second if item.box.numel] == places
    assert all(place % 16 == 0 for place in places) and memory.copied is None
    for item, tensor in zip(second, [*tensors, strided], strict=True):
        assert item.tensor.dtype == tensor.dtype and torch.equal(item.tensor, tensor) and item.tensor.is_contiguous()


def test_only_the_copy_communicates_with_nobody_and_steps_have_no_further_messages(tmp_path, model):
    """Every call of torch.distributed is counted, and belongs to the main thread: one per step, and the nonce at the start."""
    root = tmp_path / "root"

    def body(voter):
        calls = []
        for name in ("all_reduce", "broadcast", "barrier", "all_gather", "reduce", "send", "recv", "all_gather_object"):

            def counting(original, name=name):
                def call(*arguments, **options):
                    calls.append((name, threading.current_thread() is threading.main_thread()))
                    return original(*arguments, **options)

                return call

            replace(dist, name, counting)
        saver, state = BackgroundSaver(voter, CPU), model.RankState(LAYOUT, voter.rank, True)
        assert calls == [("broadcast", True)]
        for step in (1, 2):
            calls.clear()
            saver.start(root, step, state.groups, STATE)
            assert calls == []
            assert training_steps(saver).error is None
            assert set(calls) == {("all_reduce", True)}

    assert model.run_ranks(2, body, tmp_path) == [(0, "")] * 2
    assert committed_steps(root) == [1, 2]


def test_saved_is_said_after_the_rename(tmp_path, model):
    root = tmp_path / "root"

    def body(voter):
        gate = Gate(os, "rename")
        saver = BackgroundSaver(voter, CPU)
        saver.start(root, 2, model.RankState(LAYOUT, voter.rank, True).groups, STATE)
        while not saver.commits:
            assert training_steps(saver, at_most=1) is None
        assert voter.rank or gate.reached.wait(20)
        assert training_steps(saver, at_most=20) is None and committed_steps(root) == []
        dist.barrier()
        gate.open.set()
        assert training_steps(saver).error is None and committed_steps(root) == [2]

    assert model.run_ranks(2, body, tmp_path) == [(0, "")] * 2


# Failures


def fails_at(name, error_number=errno.ENOSPC):
    return lambda: replace(save, name, fail(error_number))


FAILURES = {  # the rank, what it patches
    "writing, rank 1": (1, fails_at("write_safetensors")),
    "writing, rank 0": (0, fails_at("write_safetensors", errno.EIO)),
    "making the directory": (0, fails_at("prepare", errno.EROFS)),
    "merging the parts": (0, fails_at("_merge_parts")),
    "renaming": (0, lambda: replace(os, "rename", fail(errno.EIO))),
    "copying": (1, lambda: replace(HostMemory, "copy", fail(errno.EIO))),
}


@pytest.mark.parametrize("waits", [False, True], ids=["heard", "waited for"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_on_one_rank_is_known_to_all_and_the_next_save_works(tmp_path, model, failure, waits):
    failing_rank, patch = FAILURES[failure]
    root = tmp_path / "root"

    def body(voter):
        if voter.rank == failing_rank:
            patch()
        saver, state = BackgroundSaver(voter, CPU), model.RankState(LAYOUT, voter.rank, True)
        saver.start(root, 1, state.groups, STATE)
        error = (saver.wait() if waits else training_steps(saver)).error
        if voter.rank == failing_rank:
            assert type(error) is CheckpointError and "Errno" in str(error) and f"rank {failing_rank}" in str(error)
        else:
            assert isinstance(error, FailedElsewhere) and "nothing was published" in str(error)
        if voter.rank == 0:  # which says it to the user
            assert f"rank {failing_rank}" in str(error) and "Errno" in str(error)
            assert os.listdir(root) == []
        dist.barrier()
        saver.start(root, 2, state.groups, STATE)
        assert (saver.wait() if waits else training_steps(saver)).error is None
        assert saver.wait() is None

    assert model.run_ranks(2, body, tmp_path) == [(0, "")] * 2
    assert os.listdir(root) == ["step_00000002"]
    loaded = model.RankState((1, 1, 1), 0, filled=False)
    load_tensors(newest_checkpoint(root), loaded.targets())
    assert loaded.equals(model.RankState((1, 1, 1), 0, filled=True))


def test_a_failure_is_heard_when_nobody_writes_any_more(tmp_path, model):
    """Rank 1 fails at once, rank 0 is still writing: the directory is not taken from under it."""
    root = tmp_path / "root"

    def body(voter):
        if voter.rank == 1:
            fails_at("write_safetensors")()
        gate = Gate(save, "write_safetensors")
        if voter.rank == 1:
            gate.open.set()
        saver = BackgroundSaver(voter, CPU)
        saver.start(root, 1, model.RankState(LAYOUT, voter.rank, True).groups, STATE)
        assert training_steps(saver, at_most=50) is None
        gate.open.set()
        assert training_steps(saver).error is not None

    assert model.run_ranks(2, body, tmp_path) == [(0, "")] * 2
    assert os.listdir(root) == []


def test_a_defect_keeps_its_type(tmp_path):
    def groups():
        raise ZeroDivisionError("a defect")

    saver = BackgroundSaver(SingleProcess(), CPU)
    saver.start(tmp_path, 1, groups, STATE)
    assert isinstance(saver.wait().error, ZeroDivisionError)
    assert os.listdir(tmp_path) == []


def test_an_existing_step_is_left_alone(tmp_path):
    groups = {"weights": [TensorBox("w", (2,), Box((0,), (2,)), torch.ones(2))]}
    directory = save_checkpoint(tmp_path, 1, groups, {}, world=SingleProcess())
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    saver = BackgroundSaver(SingleProcess(), CPU)
    saver.start(tmp_path, 1, lambda: groups, STATE)
    assert "already committed" in str(saver.wait().error)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert os.listdir(tmp_path) == [directory.name]


def test_memory_that_cannot_be_had_is_said(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    groups = {"weights": [TensorBox("w", (2,), Box((0,), (2,)), torch.ones(2))]}
    saver = BackgroundSaver(SingleProcess(), CPU)
    monkeypatch.setattr(torch, "empty", no_memory)  # (what is on no device is made by empty_like)
    saver.start(tmp_path, 1, lambda: groups, STATE)
    assert "--checkpoint.asynchronous false needs none" in str(saver.wait().error)


def kill(original):
    def killing(*arguments, **options):
        original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    return killing


@pytest.mark.parametrize("killed_rank", [0, 1])
def test_a_rank_killed_between_its_part_and_the_commit_publishes_nothing(tmp_path, model, killed_rank):
    root = tmp_path / "root"
    model.save_layout(root, 1, LAYOUT)

    def body(voter):
        if voter.rank == killed_rank:
            replace(save, "write_part", kill)
        saver = BackgroundSaver(voter, CPU)
        saver.start(root, 2, model.RankState(LAYOUT, voter.rank, True).groups, STATE)
        training_steps(saver)

    outcomes = model.run_ranks(2, body, tmp_path)
    assert outcomes[killed_rank][0] == -signal.SIGKILL and outcomes[1 - killed_rank][0] == 1
    assert committed_steps(root) == [1] and len(os.listdir(root)) == 2
    kept = root / "step_00000003.bad-aa", root / "notes.tmp-bb"
    for path in kept:
        path.mkdir()
    remove_unfinished(root)
    assert sorted(os.listdir(root)) == sorted(["step_00000001", *(path.name for path in kept)])


# On a GPU


class Runtime:
    """Stands in for what `torch.cuda.cudart()` gives."""

    def __init__(self, code=0):
        self.code, self.pinned = code, {}

    def cudaHostRegister(self, address, size, flags):
        assert flags == 1  # portable
        self.pinned[address] = size
        return self.code

    def cudaHostUnregister(self, address):
        del self.pinned[address]
        return 0


def test_memory_is_pinned_as_long_as_it_is_there(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = HostMemory(CPU)
    memory._stream = "a stream"  # as if the device were a GPU
    found = memory._allocate(1000)
    assert runtime.pinned == {found.data_ptr(): 1000}
    del memory
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(code=2))
    memory = HostMemory(CPU)
    memory._stream = "a stream"
    with pytest.raises(CheckpointError, match="cudaHostRegister has failed with code 2.*--checkpoint.asynchronous false"):
        memory._allocate(1000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_copy_from_a_gpu_is_what_was_there_before_the_update(tmp_path: Path) -> None:
    """It has not run on a device yet."""
    device = torch.device("cuda")
    weights = torch.arange(2**24, device=device, dtype=torch.float32)
    saver = BackgroundSaver(SingleProcess(), device)
    for step in (1, 2):
        weights.fill_(step)
        copied = saver.start(
            tmp_path, step, lambda: {"weights": [TensorBox("w", (2**24,), Box((0,), (2**24,)), weights)]}, STATE
        )
        torch.cuda.current_stream().wait_event(copied)
        weights.fill_(-1)
        assert saver.wait().error is None
        found = torch.zeros(2**24)
        load_tensors(newest_checkpoint(tmp_path), [TensorBox("w", (2**24,), Box((0,), (2**24,)), found)])
        assert torch.equal(found, torch.full_like(found, step))
