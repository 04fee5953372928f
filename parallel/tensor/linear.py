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

from parallel.collectives import Done, Handle, start_all_gather, start_all_reduce, start_reduce_scatter
from parallel.groups import Axis
from parallel.kernels.table import Kernels
from parallel.shards import Box, Replica, Segment, Shard
from parallel.tensor.deferred import WeightGradient, WeightGradientQueue
from parallel.tensor.mappings import reduce_from_tensor, scatter_sequence
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

    x [s/tp, b, i] is gathered over `gather` first where that is not None. dW is added in fp32 to the engine's main gradient
    where there is one.
    """

    def __init__(self, weight: ShardedParameter, x: Tensor, dy: Tensor, gather: Axis | None, kernels: Kernels) -> None:
        self.weight, self.x, self.dy, self.gather, self.kernels = weight, x, dy, gather, kernels
        self.gathered: Handle = Done()

    def fetch(self) -> None:
        if self.gather is not None:
            self.x, self.gathered = start_all_gather(self.x, self.gather)

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
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: ShardedParameter,
        tp: Axis,
        sequence_parallel: bool,
        kernels: Kernels,
        queue: WeightGradientQueue | None,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.tp, ctx.sequence_parallel, ctx.kernels, ctx.queue = weight, tp, sequence_parallel, kernels, queue
        if sequence_parallel:
            x, gather = start_all_gather(x, tp)
            gather.wait()
        return kernels.fprop(x, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        tp, weight, queue = ctx.tp, ctx.weight, ctx.queue
        deferred = queue is not None and queue.collecting
        gradient = _LinearWeightGradient(weight, x, dy, tp if ctx.sequence_parallel else None, ctx.kernels)
        if deferred:
            queue.put(gradient)
        else:
            gradient.fetch()
        dx = ctx.kernels.dgrad(dy, weight)
        if ctx.sequence_parallel:
            dx, reduction = start_reduce_scatter(dx, tp)
        else:
            reduction = start_all_reduce(dx, tp)
        dw = None if deferred else gradient.compute()
        reduction.wait()
        return dx, dw, None, None, None, None


class _LocalLinear(torch.autograd.Function):
    """y = x W^T with the weight gradient written to the engine's sink.

    forward: y = x W^T      [s, b, i/tp] -> [s, b, o], partial sums
    dgrad:   dx = dy W
    wgrad:   dW = dy^T x    [o, i/tp], left to `queue` while that collects
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: ShardedParameter, kernels: Kernels, queue: WeightGradientQueue | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.kernels, ctx.queue = weight, kernels, queue
        return kernels.fprop(x, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        queue = ctx.queue
        gradient = _LinearWeightGradient(ctx.weight, x, dy, None, ctx.kernels)
        dx = ctx.kernels.dgrad(dy, ctx.weight)
        if queue is not None and queue.collecting:
            queue.put(gradient)
            return dx, None, None, None
        return dx, gradient.compute(), None, None


class ColumnParallelLinear(nn.Module):
    """y = x W^T, W split by rows over `tp`: x [s, b, i] (or [s/tp, b, i] under sequence parallelism) -> [s, b, o/tp].

    `queue`: where the weight gradient waits during the I of a split backward pass; None always computes it at once.
    """

    def __init__(
        self,
        weight: ShardedParameter,  # [o/tp, i], its shard made by `column_shard` or `vocabulary_shard`
        tp: Axis,
        sequence_parallel: bool,
        kernels: Kernels,
        queue: WeightGradientQueue | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.tp, self.sequence_parallel, self.kernels, self.queue = tp, sequence_parallel, kernels, queue

    def forward(self, x: Tensor) -> Tensor:  # [s/tp, b, i] -> [s, b, o/tp]
        return _ColumnLinear.apply(x, self.weight, self.tp, self.sequence_parallel, self.kernels, self.queue)


class RowParallelLinear(nn.Module):
    """y = x W^T, W split by columns over `tp`: x [s, b, i/tp] -> [s, b, o], or [s/tp, b, o] under sequence parallelism.

    `queue` as in `ColumnParallelLinear`.
    """

    def __init__(
        self,
        weight: ShardedParameter,  # [o, i/tp], its shard made by `row_shard`
        tp: Axis,
        sequence_parallel: bool,
        kernels: Kernels,
        queue: WeightGradientQueue | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.tp, self.sequence_parallel, self.kernels, self.queue = tp, sequence_parallel, kernels, queue

    def forward(self, x: Tensor) -> Tensor:  # [s, b, i/tp] -> [s/tp, b, o]
        y = _LocalLinear.apply(x, self.weight, self.kernels, self.queue)
        return scatter_sequence(y, self.tp) if self.sequence_parallel else reduce_from_tensor(y, self.tp)
