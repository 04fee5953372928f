"""Our checkpoints beside torch.save, safetensors and torch.distributed.checkpoint, and beside raw files, on the same tensors.

    python tools/benchmark_checkpoint.py --gib 1 --ranks 2 DIRECTORY

Matrices in fp32, split over the ranks along dim 0. A load fills tensors that are there already (a running model's), and its
values are compared with what was saved, outside the timing. `reshape` loads what was split along dim 0 into tensors split
along dim 1. `async` is how long a save in the background holds up its caller, from the second one on, so that the memory for
the copy is there; its CPU seconds are the calling thread's. Every save ends with fsync. The contestants take turns, in another
order in each round, each time in fresh processes, one per rank, that have done the same with one matrix before, so that imports
and other first calls do not count. Before each timed save as many bytes are written and removed: on a virtual machine the first
to fill pages that the host has taken back can pay several times what the next one does.

ours          one safetensors file per rank, CRC32 of every block: written by save and async, verified by load and reshape
torch         torch.save of a dict per rank; torch.load(weights_only=True) and copy; reshape by mmap=True and slices
safetensors   save_file per rank; load_file and copy; reshape by safe_open and get_slice
dcp           torch.distributed.checkpoint of DTensors; async_save with a stager that keeps its memory
raw           write 4 MiB at a time and fsync; preadv into the tensors; a plain copy to memory that is there: the limit

Wall seconds are the slowest rank's (median of the rounds), CPU seconds all ranks' (the least of the rounds, as what a shared
host adds is never negative; the ratios are of these), memory the peak of one rank beyond its tensors (pages of mapped
files count). Loads find the files in the page cache, unless --cold drops them from it first.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cached_property
from itertools import count
from pathlib import Path
from statistics import median

try:
    import safetensors
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from torch import Tensor
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from parallel.checkpoint import GroupVoter, load_tensors, save_checkpoint, step_directory
    from parallel.checkpoint.background import BackgroundSaver
    from parallel.checkpoint.readers import GroupReaders
    from parallel.shards import Box, TensorBox
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

ROWS, COLUMNS = 512, 2048  # of one matrix: 4 MiB
BLOCK_BYTES = 4 << 20
Tensors = dict[str, Tensor]


class Contestant:
    """One rank's view: `save` its parts along dim 0, `load` them, `reshape` into parts along dim 1.

    `begin` saves in the background until `end`. What these are given is made by `prepare`, which a running program would have
    at hand and which is not timed. None: it cannot do that.
    """

    begin = None

    def __init__(self, directory: Path, rank: int, size: int) -> None:
        self.directory, self.rank, self.size = directory, rank, size
        self.steps = count(2)  # of saves in the background

    def path(self, rank: int | None = None) -> Path:
        return self.directory / f"rank-{self.rank if rank is None else rank}"

    def prepare(self, tensors: Tensors, dim: int) -> object:
        return tensors

    def reshape(self, targets: Tensors) -> None:
        """Fill parts along dim 1 from the files of all ranks."""
        columns = part(1, self.rank, self.size)
        for rank in range(self.size):
            rows = part(0, rank, self.size)
            for name, stored in self.slices(rank, columns):
                targets[name][rows].copy_(stored)

    def slices(self, rank: int, columns: slice) -> Iterator[tuple[str, Tensor]]:
        raise NotImplementedError


class Ours(Contestant):
    def prepare(self, tensors: Tensors, dim: int) -> list[TensorBox]:
        start = part(dim, self.rank, self.size).start
        offset = (0, start) if dim else (start, 0)
        return [TensorBox(name, (ROWS, COLUMNS), Box(offset, tuple(t.shape)), t) for name, t in tensors.items()]

    def save(self, boxes: list[TensorBox]) -> None:
        save_checkpoint(self.directory, 1, {"weights": boxes}, {}, world=GroupVoter())

    @cached_property
    def saver(self) -> BackgroundSaver:
        return BackgroundSaver(GroupVoter(), torch.device("cpu"))

    def begin(self, boxes: list[TensorBox]) -> None:
        self.saver.start(self.directory, next(self.steps), lambda: {"weights": boxes}, {})

    def end(self) -> None:
        error = self.saver.wait().error
        if error:
            raise error

    def load(self, boxes: list[TensorBox]) -> None:
        readers = GroupReaders()
        load_tensors(step_directory(self.directory, 1), boxes, readers=readers)
        readers.close()

    reshape = load


class Torch(Contestant):
    def save(self, tensors: Tensors) -> None:
        torch.save(tensors, self.path())
        fsync(self.path())

    def load(self, targets: Tensors) -> None:
        for name, stored in torch.load(self.path(), weights_only=True).items():
            targets[name].copy_(stored)

    def slices(self, rank: int, columns: slice) -> Iterator[tuple[str, Tensor]]:
        for name, stored in torch.load(self.path(rank), weights_only=True, mmap=True).items():
            yield name, stored[:, columns]


class Safetensors(Contestant):
    def save(self, tensors: Tensors) -> None:
        save_file(tensors, self.path())
        fsync(self.path())

    def load(self, targets: Tensors) -> None:
        for name, stored in load_file(self.path()).items():
            targets[name].copy_(stored)

    def slices(self, rank: int, columns: slice) -> Iterator[tuple[str, Tensor]]:
        with safe_open(self.path(rank), "pt") as file:
            for name in file.keys():
                yield name, file.get_slice(name)[:, columns]


class Dcp(Contestant):
    def prepare(self, tensors: Tensors, dim: int) -> dict[str, DTensor]:
        mesh = init_device_mesh("cpu", (self.size,))
        return {name: DTensor.from_local(t, mesh, [Shard(dim)], run_check=False) for name, t in tensors.items()}

    def save(self, state: dict[str, DTensor]) -> None:
        dcp.save(state, checkpoint_id=self.directory)

    @cached_property
    def stager(self) -> DefaultStager:
        return DefaultStager(StagingOptions(False, False, False, False))  # in memory that is neither pinned nor shared

    def begin(self, state: dict[str, DTensor]) -> None:
        self.future = dcp.async_save(state, checkpoint_id=self.directory / str(next(self.steps)), async_stager=self.stager)

    def end(self) -> None:
        self.future.result()

    def load(self, state: dict[str, DTensor]) -> None:
        dcp.load(state, checkpoint_id=self.directory)

    reshape = load


class Raw(Contestant):
    copies: Tensors | None = None

    def save(self, tensors: Tensors) -> None:
        with open(self.path(), "wb", buffering=0) as file:
            for tensor in tensors.values():
                data = as_bytes(tensor)
                for start in range(0, len(data), BLOCK_BYTES):
                    file.write(data[start : start + BLOCK_BYTES])
            os.fsync(file.fileno())

    def begin(self, tensors: Tensors) -> None:
        self.copies = self.copies or {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self.copies[name].copy_(tensor)

    def end(self) -> None:
        """The copy is made."""

    def load(self, targets: Tensors) -> None:
        position = 0
        with open(self.path(), "rb", buffering=0) as file:
            for tensor in targets.values():
                position += os.preadv(file.fileno(), [as_bytes(tensor)], position)

    reshape = None


OPERATIONS = ("save", "load", "reshape", "async")
CONTESTANTS = {"raw": Raw, "ours": Ours, "torch": Torch, "safetensors": Safetensors, "dcp": Dcp}


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def part(dim: int, rank: int, size: int) -> slice:
    length = (ROWS, COLUMNS)[dim] // size
    return slice(rank * length, (rank + 1) * length)


def fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def drop_from_cache(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_bytes(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(key)) * 1024


def measure(action: Callable[[], None], cpu_clock: Callable[[], float] = time.process_time) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds, and the peak of resident memory beyond what there was before."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left in the allocator would hide new memory
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_bytes("VmRSS")
    dist.barrier()
    wall, cpu = time.perf_counter(), cpu_clock()
    action()
    return time.perf_counter() - wall, cpu_clock() - cpu, memory_bytes("VmHWM") - before


def measure_background(contestant: Contestant, state: object) -> tuple[float, float, int]:
    """The same of the part of a save in the background that its caller waits for, the second time."""
    contestant.begin(state)
    contestant.end()
    figures = measure(lambda: contestant.begin(state), time.thread_time)
    contestant.end()
    return figures


def rank_main(operation: str, name: str, directory: Path, rank: int, size: int, full: Tensors, results) -> None:
    """One rank's process, forked: `full` is shared with the parent."""
    store = f"file://{directory.parent}/store-{operation}-{name}"
    dist.init_process_group("gloo", store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    dim = 1 if operation == "reshape" else 0
    index = (slice(None),) * dim + (part(dim, rank, size),)
    first = dict(list(full.items())[:1])
    warm = CONTESTANTS[name](directory.parent / f"warm-{operation}-{name}", rank, size)
    warm.directory.mkdir(exist_ok=True)
    warm.save(warm.prepare(own_parts(first, (part(0, rank, size),)), 0))
    dist.barrier()
    if operation == "async":
        measure_background(warm, warm.prepare(own_parts(first, index), dim))
    elif operation != "save":
        getattr(warm, operation)(warm.prepare(own_parts(first, index), dim))
    contestant, tensors = CONTESTANTS[name](directory, rank, size), own_parts(full, index)
    if operation in ("load", "reshape"):
        for tensor in tensors.values():
            tensor.zero_()
    state = contestant.prepare(tensors, dim)
    if operation == "async":
        figures = measure_background(contestant, state)
    else:
        figures = measure(lambda: getattr(contestant, operation)(state))
    wrong = [key for key, tensor in full.items() if not torch.equal(tensors[key], tensor[index])]
    results.put(f"{name}, {operation}: rank {rank} found other values in {', '.join(wrong[:3])}" if wrong else figures)


def own_parts(full: Tensors, index: tuple[slice, ...]) -> Tensors:
    return {name: tensor[index].clone(memory_format=torch.contiguous_format) for name, tensor in full.items()}


def run(operation: str, name: str, directory: Path, size: int, full: Tensors) -> tuple[float, float, int]:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    arguments = [(operation, name, directory, rank, size, full, results) for rank in range(size)]
    ranks = [context.Process(target=rank_main, args=one) for one in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit(f"error: {name}, {operation}: a rank failed; its message is above")
    figures = [results.get() for _ in ranks]
    wrong = next((text for text in figures if isinstance(text, str)), None)
    if wrong:
        sys.exit(f"error: {wrong}")
    return max(f[0] for f in figures), sum(f[1] for f in figures), max(f[2] for f in figures)


def touch_pages(directory: Path, ranks: int, full: Tensors) -> None:
    """Write all bytes and remove them, untimed, so that every contestant finds the page cache in the same state."""
    untimed = directory / "untimed"
    untimed.mkdir()
    run("save", "raw", untimed, ranks, full)
    shutil.rmtree(untimed)
    for path in (*directory.glob("warm-*"), *directory.glob("store-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def compete(arguments: argparse.Namespace, full: Tensors) -> dict[tuple[str, str], list[tuple]]:
    figures: dict[tuple[str, str], list[tuple]] = {}
    expected = {name: tensor.clone() for name, tensor in full.items()} if arguments.plant_error else full
    if arguments.plant_error:
        expected["w0"][-1, -1] += 1.0
    names = list(CONTESTANTS)
    for number in range(arguments.rounds):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            kind = CONTESTANTS[name]
            directory = arguments.directory / "benchmark" / name
            directory.mkdir(parents=True)
            background = directory.with_name(f"{name}-async")
            background.mkdir()
            try:
                for operation in OPERATIONS:
                    if operation == "reshape" and (arguments.ranks == 1 or kind.reshape is None):
                        continue
                    if operation == "async" and kind.begin is None:
                        continue
                    if arguments.cold:
                        drop_from_cache(directory)
                    if operation == "save":
                        touch_pages(directory.parent, arguments.ranks, full)
                    tensors = expected if operation in ("load", "reshape") else full
                    where = background if operation == "async" else directory
                    figures.setdefault((operation, name), []).append(run(operation, name, where, arguments.ranks, tensors))
            finally:
                shutil.rmtree(arguments.directory / "benchmark")
    return figures


def report(figures: dict[tuple[str, str], list[tuple]], gib: float) -> None:
    print("                           wall s  of all rounds   CPU s  of all rounds    MiB/s  extra MiB/rank  CPU s ours / this")
    for operation in OPERATIONS:
        for name in CONTESTANTS:
            rows = figures.get((operation, name))
            if rows is None:
                continue
            wall, cpu = median(row[0] for row in rows), min(row[1] for row in rows)
            spreads = [f"{min(row[i] for row in rows):.2f}-{max(row[i] for row in rows):.2f}" for i in (0, 1)]
            ratio = min(row[1] for row in figures[operation, "ours"]) / cpu
            memory = max(row[2] for row in rows) / 2**20
            print(
                f"{operation:10s}{name:14s}{wall:9.2f}{spreads[0]:>15s}{cpu:8.2f}{spreads[1]:>15s}{gib * 1024 / wall:9.0f}"
                f"{memory:16.1f}{ratio:19.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="on the file system to measure; must be empty")
    parser.add_argument("--gib", type=float, default=1.0, metavar="N", help="GiB of all ranks together (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 4), help="processes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each load")
    parser.add_argument("--plant-error", action="store_true", help="expect one other value: the comparison must fail")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if any(arguments.directory.iterdir()):
        parser.error(f"{arguments.directory} is not empty")
    torch.set_num_threads(1)  # the ranks are forked
    matrices = max(1, round(arguments.gib * 1024 / (ROWS * COLUMNS * 4 / 2**20)))
    full = {f"w{i}": torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(i)) for i in range(matrices)}
    gib = matrices * ROWS * COLUMNS * 4 / 2**30
    options = [argument for argument in sys.argv[1:] if argument != str(arguments.directory)]
    print(f"command    {shlex.join(['python', sys.argv[0], *options])} DIRECTORY")
    print(f"hardware   {os.cpu_count()} x {platform.machine()} CPU")
    print(f"versions   Python {platform.python_version()}, torch {torch.__version__}, safetensors {safetensors.__version__}")
    print(f"tensors    {matrices} of [{ROWS}, {COLUMNS}] fp32, {gib:.3f} GiB on {arguments.ranks} ranks\n")
    report(compete(arguments, full), gib)


if __name__ == "__main__":
    main()
