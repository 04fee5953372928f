"""Buckets: parameters laid out in contiguous buffers, reduced and gathered as one message.

A bucket never mixes weight-decay classes, nor parameters of different replica axes. Parameters come in the reverse of their
order in the module, which is about the order in which a backward pass finishes their gradients. Parameters with replicated
segments have a bucket of their own per kind, after the others: their gradients are summed over the replica axes before
the data-parallel reduction, which happens at the end of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.collectives import Handle, start_all_gather, start_all_reduce, start_reduce_scatter
from parallel.groups import Axis
from parallel.shards import Piece, range_pieces
from parallel.tensor.parameter import ShardedParameter

ALIGNMENT = 64  # elements: 256 bytes of fp32. Parameters and shards start at multiples of it


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class BucketClass:
    """What all parameters of one bucket have in common."""

    decay: bool
    replica_axes: tuple[str, ...]


class Sink:
    """Collects one parameter's gradient in its bucket's fp32 buffer (a `GradientSink`)."""

    def __init__(self, bucket: Bucket, parameter: ShardedParameter, main_grad: Tensor) -> None:
        self.bucket, self.main_grad, self.uses = bucket, main_grad, parameter.shard.uses
        parameter.register_post_accumulate_grad_hook(self._fold)

    def ready(self) -> None:
        self.bucket.gradient_ready()

    def _fold(self, parameter: Tensor) -> None:
        """After autograd has made `.grad` (norm weights, embeddings): add it in fp32 and drop it.

        Autograd calls this for linears too, whose gradient is None because they have told the sink themselves.
        """
        if parameter.grad is None:
            return
        self.main_grad.add_(parameter.grad)
        parameter.grad = None
        self.ready()


class Bucket:
    """Some parameters of one chunk in two flat buffers: `weights` (model dtype) and `main_grad` (fp32).

    This rank updates the flat range [`start`, `stop`): its 1/size part over `shard_axis`, or all of it where that has size 1.
    `master` is that range of the weights in fp32: a view of `weights` where they are fp32 already.
    """

    def __init__(
        self,
        parameters: Sequence[ShardedParameter],
        bucket_class: BucketClass,
        shard_axis: Axis,
        data_axis: Axis,
    ) -> None:
        self.parameters, self.bucket_class = list(parameters), bucket_class
        self.shard_axis, self.data_axis = shard_axis, data_axis
        self.offsets, end = [], 0
        for parameter in self.parameters:
            self.offsets.append(end)
            end += _round_up(parameter.numel(), ALIGNMENT)
        self.size = _round_up(end, ALIGNMENT * shard_axis.size)
        shard = self.size // shard_axis.size
        self.start, self.stop = shard_axis.rank * shard, (shard_axis.rank + 1) * shard
        self._allocate()
        self.uses = sum(parameter.shard.uses for parameter in self.parameters)
        self.expected_gradients = 0  # still to come before the bucket leaves; below 0 where nobody counts
        self.has_left = False  # its reduction was started in this step
        self.reduction: Handle | None = None  # of the reduction under way
        self.gather: Handle | None = None  # of the weights' all-gather under way

    def _allocate(self) -> None:
        dtype, device = self.parameters[0].dtype, self.parameters[0].device
        self.weights = torch.zeros(self.size, dtype=dtype, device=device)
        self.main_grad = torch.zeros(self.size, dtype=torch.float32, device=device)
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            view = self.weights[offset : offset + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.sink = Sink(self, parameter, self.main_grad[offset : offset + parameter.numel()].view(parameter.shape))
        local = self.weights[self.start : self.stop]
        self.master = local if dtype == torch.float32 else local.float()
        self.master_grad = self.main_grad[self.start : self.stop]

    # ---- reduction of the gradients -------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Clear the gradients."""
        self.main_grad.zero_()
        self.expected_gradients, self.has_left = 0, False

    def expect_passes(self, count: int) -> None:
        """Leave with the last gradient of `count` backward passes."""
        self.expected_gradients = self.uses * count

    def gradient_ready(self) -> None:
        """One use of one parameter has added its gradient. The last one that is expected starts the reduction."""
        assert not self.has_left, "a gradient came after its bucket had left"
        self.expected_gradients -= 1
        if self.expected_gradients == 0:
            self.start_reduction()

    def start_reduction(self) -> None:
        """Sum the gradients over the data axis: reduce-scatter to the shards, or all-reduce where nothing is sharded."""
        self.has_left = True
        if self.shard_axis.size > 1:
            _, self.reduction = start_reduce_scatter(self.main_grad, self.shard_axis, out=self.master_grad)
        else:
            self.reduction = start_all_reduce(self.main_grad, self.data_axis)

    def wait_reduction(self) -> None:
        if self.reduction is not None:
            self.reduction.wait()
            self.reduction = None

    # ---- gathering of the weights ---------------------------------------------------------------------------------------

    def start_gather(self) -> None:
        """Write the updated shard into the weights and fetch the others'."""

        local = self.weights[self.start : self.stop]
        if local.dtype != torch.float32:
            local.copy_(self.master)
        _, self.gather = start_all_gather(local, self.shard_axis, out=self.weights)

    def wait_gather(self) -> None:
        if self.gather is not None:
            self.gather.wait()
            self.gather = None

    # ---- what the shard is ----------------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[tuple[Piece, slice]]:
        """Parts of this rank's shard in named global tensors, each with its place in the shard (`master[place]`)."""
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            low = max(self.start - offset, 0)
            high = min(self.stop - offset, parameter.numel())
            for piece in range_pieces(parameter.shard, low, high):
                first = offset + piece.start - self.start
                yield piece, slice(first, first + piece.box.numel)


def make_buckets(
    parameters: Sequence[ShardedParameter], bucket_size: int, shard_axis: Axis, data_axis: Axis
) -> list[Bucket]:
    """Lay out one chunk's parameters (in module order) in buckets of about `bucket_size` elements.

    Order: the plain ones as a backward pass fills them, then one per kind of replica, in a fixed order on every rank.
    """
    classes: dict[BucketClass, list[ShardedParameter]] = {}
    for parameter in reversed(list(parameters)):
        key = BucketClass(parameter.shard.decay, parameter.shard.replica_axes)
        classes.setdefault(key, []).append(parameter)
    groups: list[tuple[BucketClass, list[ShardedParameter]]] = []
    for key in sorted(classes, key=lambda c: (c.replica_axes, not c.decay)):
        current: list[ShardedParameter] = []
        for parameter in classes[key]:
            current.append(parameter)
            if not key.replica_axes and sum(p.numel() for p in current) >= bucket_size:
                groups.append((key, current))
                current = []
        if current:
            groups.append((key, current))
    return [Bucket(members, key, shard_axis, data_axis) for key, members in groups]
