"""How tensor-parallel linears hide their communication behind their products.

A linear has two products that communicate: one of gathered rows (a column linear's output, a row linear's input gradient) and
one whose partial sums are added up over the ranks (a row linear's output, a column linear's input gradient).

| mode     | product of gathered rows            | product with summed rows         | in a column's backward pass        |
|----------|-------------------------------------|----------------------------------|------------------------------------|
| none     | after the gather                    | then the sum                     | gather and sum waited for at once  |
| backward | after the gather                    | then the sum                     | gather behind dgrad, sum: wgrad    |
| chunks   | of what is there, others travelling | others' rows travel, own at last | the same, the sum behind both      |
| async    | by torch's symmetric memory         | by torch's symmetric memory      | gather behind dgrad                |

Pieces go from rank to rank without a collective's buffers: each lands at its place in the sequence. Nothing here depends on
CUDA_DEVICE_MAX_CONNECTIONS: NCCL runs on streams of its own, and events order them with the products.

Source: Wang et al. 2023 (Overlap Communication with Dependent Computation via Decomposition).

Legend: s sequence, b micro-batch, k and n a product's inner and outer dim; /tp = split over tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.collectives import (
    All,
    Done,
    Handle,
    SumOfPieces,
    all_gather,
    start_all_gather,
    start_all_reduce,
    start_exchange,
    start_reduce_scatter,
)
from parallel.errors import ConfigError
from parallel.groups import Axis

# A message of this size takes longer than it takes to start: 20 us at 400 GB/s of NVLink, 0.2 ms at 10 Gbit/s of TCP.
PIECE_BYTES = {"cuda": 8 * 2**20, "cpu": 2**18, "meta": 8 * 2**20}
MAX_PIECES = 4  # of what one rank sends to another: the products get smaller too


@dataclass(frozen=True)
class Product:
    """rows M, [..., k] -> [..., n], by the kernel table: the matrix M [k, n] is W^T for fprop, W for dgrad."""

    kernel: Callable[..., Tensor]
    weight: Tensor
    matrix: Tensor

    @classmethod
    def fprop(cls, kernel: Callable[..., Tensor], weight: Tensor) -> Product:
        return cls(kernel, weight, weight.t())

    @classmethod
    def dgrad(cls, kernel: Callable[..., Tensor], weight: Tensor) -> Product:
        return cls(kernel, weight, weight)

    @property
    def width(self) -> int:
        return self.matrix.shape[1]

    def __call__(self, rows: Tensor) -> Tensor:
        return self.kernel(rows, self.weight)

    def write(self, rows: Tensor, out: Tensor) -> None:
        """The product of some rows, written to its place in a larger one."""
        self.kernel(rows.flatten(0, -2), self.weight, out=out.flatten(0, -2))


class Overlap:
    """Mode "backward": whole messages, those of a backward pass behind the products that don't need them.

    Without sequence parallelism nothing is gathered, and sums are all-reduced instead of reduce-scattered.
    """

    def __init__(self, tp: Axis, sequence_parallel: bool) -> None:
        self.tp, self.sequence_parallel = tp, sequence_parallel

    def start_gather(self, x: Tensor) -> tuple[Tensor, Handle]:  # [s/tp, b, k] -> [s, b, k]
        """The rows of all ranks."""
        return start_all_gather(x, self.tp) if self.sequence_parallel else (x, Done())

    def gather_product(self, x: Tensor, product: Product) -> tuple[Tensor, Tensor]:  # [s/tp, b, k] -> [s, b, n], [s, b, k]
        """The product of the rows of all ranks, and these rows."""
        if self.sequence_parallel:
            x = all_gather(x, self.tp)
        return product(x), x

    def product_sum(self, x: Tensor, product: Product) -> tuple[Tensor, Handle]:  # [s, b, k/tp] -> [s/tp, b, n]
        """The product's partial sums added up over the ranks. It may be read after the handle's `wait`."""
        y = product(x)
        if self.sequence_parallel:
            return start_reduce_scatter(y, self.tp)
        return y, start_all_reduce(y, self.tp)


class NoOverlap(Overlap):
    """Mode "none": every message is waited for at once."""

    def start_gather(self, x: Tensor) -> tuple[Tensor, Handle]:  # [s/tp, b, k] -> [s, b, k]
        x, gather = super().start_gather(x)
        gather.wait()
        return x, Done()

    def product_sum(self, x: Tensor, product: Product) -> tuple[Tensor, Handle]:  # [s, b, k/tp] -> [s/tp, b, n]
        y, reduction = super().product_sum(x, product)
        reduction.wait()
        return y, Done()


def row_pieces(rows: int, row_bytes: int, piece_bytes: int) -> list[slice]:
    """Up to MAX_PIECES runs of rows, none smaller than `piece_bytes` but where all rows are one run."""
    count = max(1, min(rows, MAX_PIECES, rows * row_bytes // piece_bytes))
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


class ChunkedOverlap(Overlap):
    """Mode "chunks": products by rows, each piece's message behind the products of others.

    A gather begins with the product of a rank's own rows, a sum ends with it. In between the ranks meet in turn, `shift` places
    apart, so that no link has two messages at once.
    """

    def __init__(self, tp: Axis, sequence_parallel: bool, piece_bytes: int) -> None:
        super().__init__(tp, sequence_parallel)
        self.piece_bytes = piece_bytes

    def _pieces(self, rows: Tensor) -> list[slice]:
        return row_pieces(len(rows), rows[0].nbytes, self.piece_bytes)

    def gather_product(self, x: Tensor, product: Product) -> tuple[Tensor, Tensor]:  # [s/tp, b, k] -> [s, b, n], [s, b, k]
        """The product of this rank's rows first, then of the others' as they come."""
        if not self.sequence_parallel:
            return super().gather_product(x, product)
        tp, x = self.tp, x.contiguous()
        rows = x.new_empty((tp.size, *x.shape))
        y = x.new_empty((tp.size, *x.shape[:-1], product.width))
        arrivals = []
        for shift in range(1, tp.size):
            source = (tp.rank + shift) % tp.size
            for piece in self._pieces(x):
                arrival = start_exchange(x[piece], rows[source, piece], tp, shift)
                arrivals.append((arrival, source, piece))
        rows[tp.rank] = x
        product.write(x, y[tp.rank])
        for arrival, source, piece in arrivals:
            arrival.wait()
            product.write(rows[source, piece], y[source, piece])
        return y.flatten(0, 1), rows.flatten(0, 1)

    def product_sum(self, x: Tensor, product: Product) -> tuple[Tensor, Handle]:  # [s, b, k/tp] -> [s/tp, b, n]
        """The sum by pieces, each on its way when its product is made."""
        return self._reduce_scatter(x, product) if self.sequence_parallel else self._all_reduce(x, product)

    def _reduce_scatter(self, x: Tensor, product: Product) -> tuple[Tensor, Handle]:  # [s, b, k/tp] -> [s/tp, b, n]
        tp, x = self.tp, x.unflatten(0, (self.tp.size, -1))
        out = x.new_empty((*x.shape[1:-1], product.width))
        sent = out.new_empty((tp.size - 1, *out.shape))
        parts = out.new_empty((tp.size, *out.shape))  # of this rank's rows, by the rank that made them
        exchanges = []
        for shift in range(1, tp.size):
            target, source = (tp.rank - shift) % tp.size, (tp.rank + shift) % tp.size
            for piece in self._pieces(out):
                message = sent[shift - 1, piece]
                product.write(x[target, piece], message)
                exchanges.append(start_exchange(message, parts[source, piece], tp, shift))
        product.write(x[tp.rank], parts[tp.rank])
        return out, SumOfPieces(All(exchanges), parts, out)

    def _all_reduce(self, x: Tensor, product: Product) -> tuple[Tensor, Handle]:  # [s, b, k/tp] -> [s, b, n]
        y = x.new_empty((*x.shape[:-1], product.width))
        reductions = []
        for piece in self._pieces(y):
            product.write(x[piece], y[piece])
            reductions.append(start_all_reduce(y[piece], self.tp))
        return y, All(reductions)


class SymmetricMemoryOverlap(Overlap):
    """Mode "async": torch's fused operators, which read the other ranks' memory over NVLink while they multiply.

    They compute the products themselves, by aten.mm, and not by the kernel table. The weight gradient's gather is NCCL's.
    Written to the operators of torch 2.11 to 2.13, and not run on GPUs yet.
    """

    def gather_product(self, x: Tensor, product: Product) -> tuple[Tensor, Tensor]:  # [s/tp, b, k] -> [s, b, n], [s, b, k]
        fused = torch.ops.symm_mem.fused_all_gather_matmul
        rows, (y,) = fused(x.contiguous(), [product.matrix], 0, self.tp.group.group_name)
        return y, rows

    def product_sum(self, x: Tensor, product: Product) -> tuple[Tensor, Handle]:  # [s, b, k/tp] -> [s/tp, b, n]
        fused = torch.ops.symm_mem.fused_matmul_reduce_scatter
        return fused(x.contiguous(), product.matrix, "sum", 0, self.tp.group.group_name), Done()


def make_overlap(mode: str, tp: Axis, sequence_parallel: bool, device: torch.device) -> Overlap:
    """What carries out a mode ("none", "backward", "chunks", "async") over `tp`. On one rank there is nothing to hide.

    Raises ConfigError where "async" cannot be had.
    """
    if mode == "none":
        return NoOverlap(tp, sequence_parallel)
    if mode == "backward" or tp.size == 1:
        return Overlap(tp, sequence_parallel)
    if mode == "chunks":
        return ChunkedOverlap(tp, sequence_parallel, PIECE_BYTES[device.type])
    assert mode == "async", mode
    reason = _symmetric_memory_missing(tp, sequence_parallel, device)
    if reason is not None:
        raise ConfigError(f"parallel.tp_overlap = async cannot be had: {reason}; set --parallel.tp_overlap chunks")
    import torch.distributed._symmetric_memory  # noqa: F401 (it defines the operators)

    return SymmetricMemoryOverlap(tp, sequence_parallel)


def _symmetric_memory_missing(tp: Axis, sequence_parallel: bool, device: torch.device) -> str | None:
    """Why torch's symmetric memory cannot serve these ranks, or None. A group's devices are numbered as its ranks are."""
    if not sequence_parallel:
        return "torch has fused operators for sequence parallelism only, and parallel.sequence_parallel = false"
    if device.type != "cuda":
        return f"it needs CUDA devices joined by NVLink, and this run is on the {device.type}"
    first, count = device.index - tp.rank, torch.cuda.device_count()
    if first < 0 or first + tp.size > count:
        return f"the {tp.size} tensor ranks are not on one node, which has {count} CUDA devices"
    for index in range(first, first + tp.size):
        if index != device.index and not torch.cuda.can_device_access_peer(device, index):
            return f"cuda:{device.index} cannot reach the memory of cuda:{index}"
    return None
