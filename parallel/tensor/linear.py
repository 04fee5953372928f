"""Column- and row-parallel linears with fused segments.

y = x W^T. A column-parallel weight is split by rows (outputs), a row-parallel one by columns (inputs); a column linear
followed by a row linear needs one communication on the way in and one on the way out.

Legend: s sequence, b micro-batch, i inputs, o outputs; /tp = split over tensor ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from parallel.collectives import Done, Handle
from parallel.groups import Axis
from parallel.kernels.table import Kernels
from parallel.shards import Box, Replica, Segment, Shard
from parallel.tensor.deferred import WeightGradient, WeightGradientQueue
from parallel.tensor.overlap import Overlap, Product, make_overlap
from parallel.tensor.parameter import ShardedParameter


@dataclass(frozen=True)
class Column:
    """One logical matrix `name` [rows, i] in a fused column-parallel weight.

    Each run of `replicas` consecutive tensor ranks holds the same rows (kv heads when there are fewer than ranks);
    `replica_axis` names the axis of such a run.
    """

    name: str
    rows: int
    replicas: int = 1
    replica_axis: str = ""


def column_shard(inputs: int, columns: list[Column], tp: Axis) -> Shard:
    """The place of a fused column-parallel weight: local [sum of local rows, i], one segment per logical matrix."""
    segments, start = [], 0
    for column in columns:
        rows = column.rows * column.replicas // tp.size
        assert rows * tp.size == column.rows * column.replicas, f"{column.name}: {column.rows} rows over {tp.size} ranks"
        offset = tp.rank // column.replicas * rows
        replica = None
        if column.replicas > 1:
            replica = Replica(column.replica_axis, tp.rank % column.replicas, column.replicas, partial_gradient=True)
        box, local = Box((offset, 0), (rows, inputs)), Box((start, 0), (rows, inputs))
        segments.append(Segment(column.name, (column.rows, inputs), box, local, replica))
        start += rows
    return Shard((start, inputs), tuple(segments))


def row_shard(name: str, inputs: int, outputs: int, tp: Axis) -> Shard:
    """The place of a row-parallel weight: local [o, i/tp] of [o, i]."""
    assert inputs % tp.size == 0, f"{name}: {inputs} inputs over {tp.size} ranks"
    local = (outputs, inputs // tp.size)
    box = Box((0, tp.rank * local[1]), local)
    return Shard(local, (Segment(name, (outputs, inputs), box, Box.whole(local)),))


class _LinearWeightGradient(WeightGradient):
    """wgrad of a linear: dW = dy^T x.

    x [s/tp, b, i] is gathered first where there is a `gather` (that of the rows of all ranks). dW is added in fp32 to the
    engine's main gradient where there is one.
    """

    def __init__(
        self, weight: ShardedParameter, x: Tensor, dy: Tensor, kernels: Kernels, gather: Overlap | None = None
    ) -> None:
        self.weight, self.x, self.dy, self.kernels, self.gather = weight, x, dy, kernels, gather
        self.gathered: Handle = Done()

    def fetch(self) -> None:
        if self.gather is not None:
            self.x, self.gathered = self.gather.start_gather(self.x)

    def compute(self) -> Tensor | None:
        self.gathered.wait()
        x, dy = self.x.flatten(0, -2), self.dy.flatten(0, -2)
        if self.weight.sink is None:
            return dy.t() @ x
        self.kernels.wgrad(self.weight.sink.main_grad, x, dy)
        self.weight.sink.ready()
        return None


class _ColumnLinear(torch.autograd.Function):
    """y = gather(x) W^T under sequence parallelism, else y = x W^T; gather is the identity where tp is 1.

    forward: y = all-gather(x) W^T            [s/tp, b, i] -> [s, b, o/tp]     (without sequence parallelism x is [s, b, i])
    dgrad:   dx = reduce-scatter(dy W)        (all-reduce without), behind wgrad; the all-gather of x is behind the dgrad GEMM
    wgrad:   dW = dy^T all-gather(x)          [o/tp, i], left to `queue` while that collects

    `overlap` says how the communication hides.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: ShardedParameter,
        kernels: Kernels,
        overlap: Overlap,
        queue: WeightGradientQueue | None,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.kernels, ctx.overlap, ctx.queue = weight, kernels, overlap, queue
        y, _ = overlap.gather_product(x, Product.fprop(kernels.fprop, weight))
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight, queue = ctx.weight, ctx.queue
        deferred = queue is not None and queue.collecting
        gradient = _LinearWeightGradient(weight, x, dy, ctx.kernels, ctx.overlap)
        if deferred:
            queue.put(gradient)
        else:
            gradient.fetch()
        dx, reduction = ctx.overlap.product_sum(dy, Product.dgrad(ctx.kernels.dgrad, weight))
        dw = None if deferred else gradient.compute()
        reduction.wait()
        return dx, dw, None, None, None


@dataclass
class _RowUse:
    """What the two nodes of one use of a row linear share. `dy` is left by the product's backward pass to the weight's."""

    weight: ShardedParameter
    kernels: Kernels
    overlap: Overlap
    queue: WeightGradientQueue | None
    dy: Tensor | None = None


class _RowInput(torch.autograd.Function):
    """The input of a row linear, kept for the weight gradient.

    A node of its own before the product, so that recomputation that has made again what was kept ends here, and does not
    multiply and send for an output that nobody needs.

    forward: y = x                            [s, b, i/tp]
    wgrad:   dW = all-gather(dy)^T x          [o, i/tp], left to `queue` while that collects
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: ShardedParameter, use: _RowUse) -> Tensor:
        ctx.save_for_backward(x)
        ctx.use = use
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, dx: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        use = ctx.use
        gradient, use.dy = _LinearWeightGradient(use.weight, x, use.dy, use.kernels), None
        if use.queue is not None and use.queue.collecting:
            use.queue.put(gradient)
            return dx, None, None
        return dx, gradient.compute(), None


class _RowProduct(torch.autograd.Function):
    """y = reduce-scatter(x W^T) under sequence parallelism, else y = all-reduce(x W^T).

    forward: y = reduce-scatter(x W^T)        [s, b, i/tp] -> [s/tp, b, o]     (without sequence parallelism y is [s, b, o])
    dgrad:   dx = all-gather(dy) W            (dy is whole without)

    `overlap` says how the communication hides.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, use: _RowUse) -> Tensor:
        ctx.use = use
        y, reduction = use.overlap.product_sum(x, Product.fprop(use.kernels.fprop, use.weight))
        reduction.wait()
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        use = ctx.use
        dx, use.dy = use.overlap.gather_product(dy, Product.dgrad(use.kernels.dgrad, use.weight))
        return dx, None


class ColumnParallelLinear(nn.Module):
    """y = x W^T, W split by rows over `tp`: x [s, b, i] (or [s/tp, b, i] under sequence parallelism) -> [s, b, o/tp].

    `queue`: where the weight gradient waits during the I of a split backward pass; None always computes it at once.
    `overlap`: a mode of `parallel.tensor.overlap`. Raises ConfigError where that cannot be had.
    """

    def __init__(
        self,
        weight: ShardedParameter,  # [o/tp, i], its shard made by `column_shard` or `vocabulary_shard`
        tp: Axis,
        sequence_parallel: bool,
        kernels: Kernels,
        queue: WeightGradientQueue | None = None,
        overlap: str = "backward",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.tp, self.sequence_parallel, self.kernels, self.queue = tp, sequence_parallel, kernels, queue
        self.overlap = make_overlap(overlap, tp, sequence_parallel, weight.device)

    def forward(self, x: Tensor) -> Tensor:  # [s/tp, b, i] -> [s, b, o/tp]
        return _ColumnLinear.apply(x, self.weight, self.kernels, self.overlap, self.queue)


class RowParallelLinear(nn.Module):
    """y = x W^T, W split by columns over `tp`: x [s, b, i/tp] -> [s, b, o], or [s/tp, b, o] under sequence parallelism.

    `queue` and `overlap` as in `ColumnParallelLinear`.
    """

    def __init__(
        self,
        weight: ShardedParameter,  # [o, i/tp], its shard made by `row_shard`
        tp: Axis,
        sequence_parallel: bool,
        kernels: Kernels,
        queue: WeightGradientQueue | None = None,
        overlap: str = "backward",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.tp, self.sequence_parallel, self.kernels, self.queue = tp, sequence_parallel, kernels, queue
        self.overlap = make_overlap(overlap, tp, sequence_parallel, weight.device)

    def forward(self, x: Tensor) -> Tensor:  # [s, b, i/tp] -> [s/tp, b, o]
        use = _RowUse(self.weight, self.kernels, self.overlap, self.queue)
        return _RowProduct.apply(_RowInput.apply(x, self.weight, use), use)
