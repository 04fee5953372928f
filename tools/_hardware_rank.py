"""One rank of profile_throughput.py's hardware mode: times what steps are made of, on all ranks at once.

Products, attention and memory share a node's caches, power and memory, so all ranks time them together, as they do in training.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import launch as launching
from parallel.collectives import (
    all_gather,
    all_reduce,
    barrier,
    contact_kept,
    gather_objects,
    reduce_scatter,
    start_exchange,
)
from parallel.errors import ConfigError
from parallel.groups import Axis
from parallel.kernels.providers import Workload
from parallel.kernels.table import Kernels, resolve_kernels
from parallel.launch import Launch
from parallel.ledger import Ledger

TIMEOUT = timedelta(minutes=10)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPEATS = 7
LEAST_SECONDS = {"cpu": 2e-3, "cuda": 5e-3}  # of a sample, which is as many calls as that takes
COLD_BYTES = {"cpu": 2**26, "cuda": 2**28}  # weights take turns, so that a cache does not hold them
MOST_COPIES = 8
LAUNCHES = 300  # of a sample of small kernels
FLOAT, MIB = 4, 2**20


@dataclass(frozen=True)
class Grid:
    """Sizes of what is timed: (tokens, hidden, ffn) of blocks; inner sizes of further products; (samples, positions, heads,
    head dim) of attention; MiB of a copy, and of messages."""

    blocks: tuple[tuple[int, int, int], ...]
    depths: tuple[int, ...]
    attention: tuple[tuple[int, int, int, int], ...]
    copy_mib: int
    message_mib: tuple[float, ...]


GRIDS = {
    "large": Grid(
        blocks=((2048, 2048, 5632), (4096, 4096, 11008), (8192, 4096, 14336), (4096, 8192, 22016)),
        depths=(128, 256, 512, 1024),
        attention=((2, 2048, 16, 128), (1, 4096, 32, 128), (1, 8192, 32, 128)),
        copy_mib=2048,
        message_mib=(1, 4, 16, 64, 256, 1024),
    ),
    "small": Grid(
        blocks=((256, 256, 704), (512, 512, 1408), (1024, 512, 1408), (512, 1024, 2816)),
        depths=(64, 128, 256),
        attention=((2, 256, 8, 64), (1, 512, 8, 64), (1, 1024, 8, 64)),
        copy_mib=64,
        message_mib=(0.0625, 0.25, 1, 4, 16),
    ),
    "tiny": Grid(
        blocks=((32, 64, 96),), depths=(16, 32), attention=((1, 32, 2, 16),), copy_mib=1, message_mib=(0.01, 0.1, 0.5)
    ),
}


@dataclass(frozen=True)
class HardwareWish:
    """What is asked for; None is decided by the device."""

    device: str = "auto"
    dtype: str | None = None
    grid: str | None = None


class Product(NamedTuple):
    """An m x n x k product: what it writes per number (8: adds to an fp32 gradient), and the seconds of the median rank."""

    m: int
    n: int
    k: int
    output_bytes: int
    seconds: float

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k


class Attention(NamedTuple):
    """Causal attention: forward and backward seconds."""

    samples: int
    positions: int
    heads: int
    head_dim: int
    forward: float
    backward: float


class Passes(NamedTuple):
    """The element-wise kernels of a block, forward and backward seconds together."""

    tokens: int
    hidden: int
    ffn: int
    seconds: float


class Message(NamedTuple):
    """A collective or message: the bytes that a rank sends, and the seconds that it takes."""

    kind: str
    sent_bytes: float
    seconds: float


@dataclass(frozen=True)
class HardwareMeasured:
    """What the ranks have measured. `inside`: between the ranks of a node; `across`: between nodes, all ranks at once."""

    device: str
    device_type: str
    dtype: str
    ranks: int
    ranks_per_node: int
    threads: int
    memory_bytes: float
    multiprocessors: int
    products: list[Product]
    attention: list[Attention]
    attention_kernel: str
    passes: list[Passes]
    copy_bytes_per_second: float
    launch_seconds: float
    inside: list[Message]
    across: list[Message]

    @property
    def best_flops(self) -> float:
        """FLOP/s of the fastest product."""
        return max(product.flops / product.seconds for product in self.products)


def measure_hardware(launch: Launch, wish: HardwareWish) -> HardwareMeasured | None:
    """Time everything. All ranks call it; rank 0 gets the result, the others None. Raises UserError."""
    device = launching.choose_device(launch, wish.device)
    launching.start(launch, device, TIMEOUT)
    world = _axis("world", tuple(range(launch.world_size)), launch.rank)
    with contact_kept(world):
        measured = _measure(launch, wish, world, device)
    return measured if launch.rank == 0 else None


def _measure(launch: Launch, wish: HardwareWish, world: Axis, device: torch.device) -> HardwareMeasured:
    on_gpu = device.type == "cuda"
    dtype = wish.dtype or ("bf16" if on_gpu else "fp32")
    grid = GRIDS[wish.grid or ("large" if on_gpu else "small")]
    kernels = resolve_kernels({}, Workload(device, DTYPES[dtype], 1))
    bench = Bench(world, device, DTYPES[dtype])
    inside, across = _node_axes(launch, world)
    local = launch.local_world_size
    return HardwareMeasured(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        device_type=device.type,
        dtype=dtype,
        ranks=launch.world_size,
        ranks_per_node=local,
        threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(device) / (1 if on_gpu else local),
        multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1,
        products=_products(bench, grid, kernels),
        attention=[_attention(bench, kernels, *sizes) for sizes in grid.attention],
        attention_kernel=kernels.names["attention"],
        passes=[_passes(bench, kernels, *sizes) for sizes in grid.blocks],
        copy_bytes_per_second=_copy_rate(bench, grid.copy_mib * MIB),
        launch_seconds=_launch_seconds(bench),
        inside=_messages(bench, inside, grid.message_mib),
        across=_messages(bench, across, grid.message_mib),
    )


def _axis(name: str, ranks: tuple[int, ...], rank: int) -> Axis:
    """An axis of these ranks; all ranks of the job make it together."""
    group = dist.new_group(list(ranks), timeout=TIMEOUT) if len(ranks) > 1 else None
    if rank not in ranks or group is None:
        return Axis.single(name, rank)
    return Axis(name, ranks.index(rank), len(ranks), ranks, group, Ledger())


def _node_axes(launch: Launch, world: Axis) -> tuple[Axis, Axis]:
    """This rank's axis inside its node, and the one of the ranks that have its place on the other nodes."""
    size, places = launch.local_world_size, range(launch.local_world_size)
    sizes = set(gather_objects(size, world))
    if len(sizes) > 1:
        raise ConfigError(f"the nodes have {min(sizes)} to {max(sizes)} ranks: start as many on each, to compare them")
    nodes = [tuple(range(first, first + size)) for first in range(0, world.size, size)]
    peers = [tuple(range(place, world.size, size)) for place in places]
    inside = [_axis("node", ranks, world.rank) for ranks in nodes]
    across = [_axis("nodes", ranks, world.rank) for ranks in peers]
    return inside[world.rank // size], across[world.rank % size]


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Bench:
    """Times work on all ranks at once."""

    def __init__(self, world: Axis, device: torch.device, dtype: torch.dtype) -> None:
        self.world, self.device, self.dtype = world, device, dtype

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(self.dtype)

    def seconds(self, work: Callable[[], object], waits: bool = False) -> float:
        """Of one call, on the median rank; `waits`: for other ranks.

        Of samples of several calls each, the median on a GPU, whose clocks settle under load; on a CPU the fastest, and of work
        that does not wait the CPU's seconds over its threads: what other programs take of a machine is not the machine's.
        """
        on_cpu = self.device.type == "cpu"
        now = self._cpu_seconds if on_cpu and not waits else time.perf_counter
        work()
        calls = max(1, round(LEAST_SECONDS[self.device.type] / max(self._sample(work, 1, now), 1e-7)))
        calls = max(gather_objects(calls, self.world))
        samples = [self._sample(work, calls, now) for _ in range(REPEATS)]
        return median(gather_objects(min(samples) if on_cpu else median(samples), self.world))

    def _cpu_seconds(self) -> float:
        return time.process_time() / torch.get_num_threads()

    def _sample(self, work: Callable[[], object], calls: int, now: Callable[[], float]) -> float:
        barrier(self.world, self.device)
        self._synchronize()
        start = now()
        for _ in range(calls):
            work()
        self._synchronize()
        return (now() - start) / calls

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---- what a rank does by itself -----------------------------------------------------------------------------------------


def _products(bench: Bench, grid: Grid, kernels: Kernels) -> list[Product]:
    """Forward products and weight gradients of the grid's blocks, and some of little depth."""
    found = []
    for tokens, hidden, ffn in grid.blocks:
        for n, k in ((3 * hidden, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn)):
            found += [_forward_product(bench, tokens, n, k), _weight_gradient(bench, kernels, tokens, n, k)]
    tokens, hidden, ffn = grid.blocks[-1]
    return found + [_forward_product(bench, tokens, 2 * ffn, depth) for depth in grid.depths]


def _forward_product(bench: Bench, tokens: int, n: int, k: int) -> Product:
    x, weights = bench.randn(tokens, k), _cold(bench, n, k)
    turn = itertools.cycle(weights)
    seconds = bench.seconds(lambda: torch.mm(x, next(turn).t()))
    return Product(tokens, n, k, 2, seconds)


def _weight_gradient(bench: Bench, kernels: Kernels, tokens: int, n: int, k: int) -> Product:
    x, dy = bench.randn(tokens, k), bench.randn(tokens, n)
    gradient = torch.zeros(n, k, device=bench.device, dtype=torch.float32)
    return Product(n, k, tokens, 2 * FLOAT, bench.seconds(lambda: kernels.wgrad(gradient, x, dy)))


def _cold(bench: Bench, n: int, k: int) -> list[Tensor]:
    """Copies of a weight, together larger than caches."""
    size = n * k * torch.finfo(bench.dtype).bits // 8
    return [bench.randn(n, k) for _ in range(max(1, min(MOST_COPIES, COLD_BYTES[bench.device.type] // size)))]


def _attention(bench: Bench, kernels: Kernels, samples: int, positions: int, heads: int, head_dim: int) -> Attention:
    """The program's own kernel, forward, and the backward pass as what both take more."""
    q, k, v = (bench.randn(positions, samples, heads, head_dim).requires_grad_() for _ in range(3))
    dy = bench.randn(positions, samples, heads, head_dim)

    def forward() -> Tensor:
        return kernels.attention(q, k, v)

    with torch.no_grad():
        forward_seconds = bench.seconds(forward)
    both = bench.seconds(lambda: torch.autograd.grad(forward(), (q, k, v), dy))
    return Attention(samples, positions, heads, head_dim, forward_seconds, max(both - forward_seconds, 0.1 * both))


def _passes(bench: Bench, kernels: Kernels, tokens: int, hidden: int, ffn: int) -> Passes:
    """A block's two norms with residual additions, its rotary embedding and its SwiGLU, forward and backward."""
    heads = max(1, hidden // 64)
    x, y = (bench.randn(tokens, 1, hidden).requires_grad_() for _ in range(2))
    weight = bench.randn(hidden).requires_grad_()
    gate = bench.randn(tokens, 1, 2 * ffn).requires_grad_()
    qk = bench.randn(tokens, 1, 2 * heads, hidden // heads).requires_grad_()
    angles = torch.randn(tokens, 1, hidden // heads // 2, device=bench.device)
    cos, sin = angles.cos(), angles.sin()

    def passes() -> None:
        for _ in range(2):
            outputs = kernels.add_rms_norm(x, y, weight, 1e-5)
            torch.autograd.grad(outputs, (x, y, weight), outputs)
        for output, leaf in ((kernels.rope(qk, cos, sin), qk), (kernels.swiglu(gate), gate)):
            torch.autograd.grad(output, leaf, output)

    return Passes(tokens, hidden, ffn, bench.seconds(passes))


def _copy_rate(bench: Bench, size: int) -> float:
    """Bytes read and written per second: the mean of a copy and of a sum of two tensors."""
    a, b, out = (torch.ones(size // FLOAT, device=bench.device) for _ in range(3))
    copied = 2 * size / bench.seconds(lambda: out.copy_(a))
    added = 3 * size / bench.seconds(lambda: torch.add(a, b, out=out))
    return (copied + added) / 2


def _launch_seconds(bench: Bench) -> float:
    """Of the host, to start a small kernel that autograd takes note of."""
    x, y = (torch.ones(16, device=bench.device, requires_grad=True) for _ in range(2))

    def launches() -> None:
        for _ in range(LAUNCHES):
            torch.mul(x, y)

    return bench.seconds(launches) / LAUNCHES


# ---- what ranks do together ---------------------------------------------------------------------------------------------


def _messages(bench: Bench, axis: Axis, sizes_mib: Sequence[float]) -> list[Message]:
    """Each kind of collective over the axis, at each size of the whole tensor; nothing on an axis of one."""
    if axis.size == 1:
        return []
    found = []
    for size in sizes_mib:
        numbers = max(axis.size, round(size * MIB / FLOAT) // axis.size * axis.size)
        whole = torch.zeros(numbers, device=bench.device)
        part, other = whole[: numbers // axis.size].clone(), torch.empty_like(whole)
        share = whole.nbytes * (axis.size - 1) / axis.size
        kinds = {
            "all_reduce": (2 * share, lambda whole=whole: all_reduce(whole, axis)),
            "all_gather": (share, lambda part=part: all_gather(part, axis)),
            "reduce_scatter": (share, lambda whole=whole: reduce_scatter(whole, axis)),
            "send": (whole.nbytes, lambda whole=whole, other=other: start_exchange(whole, other, axis, 1).wait()),
        }
        found += [Message(kind, sent, bench.seconds(work, waits=True)) for kind, (sent, work) in kinds.items()]
    return found
