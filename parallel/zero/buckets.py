"""Buckets: parameters laid out in contiguous buffers, reduced and gathered as one message.

A bucket never mixes weight-decay classes, nor parameters of different replica axes. Parameters come in the reverse of their
order in the module, which is about the order in which a backward pass finishes their gradients. Parameters with replicated
segments have a bucket of their own per kind, after the others: their gradients are summed over the replica axes before
the data-parallel reduction, which happens at the end of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.collectives import Handle, start_all_gather, start_narrow_all_reduce, start_reduce_scatter
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


@dataclass(frozen=True)
class Sharding:
    """How gradients become shards of the global batch's.

    They are scattered over `shard_axis`, and the shards added up over `copies_axis`. Micro-batches add up in `gradient_dtype`,
    messages are in `wire_dtype`, sums over ranks in fp32. `every_pass` (ZeRO stage 2): a bucket leaves in every backward pass
    and adds to its shard; whole gradients are there while it fills. Buckets with replicas leave once a step all the same.
    """

    shard_axis: Axis
    copies_axis: Axis
    gradient_dtype: torch.dtype = torch.float32
    wire_dtype: torch.dtype = torch.float32
    every_pass: bool = False

    @property
    def holds_buffers(self) -> bool:
        """Whether a bucket under way holds more memory than between steps (gloo's messages always do, on the host)."""
        return self.every_pass or self.wire_dtype != self.gradient_dtype


@dataclass(frozen=True)
class Scatter:
    """A reduce-scatter under way: what is sent, and where the sum comes to be. Both stay until `handle` is done."""

    sent: Tensor
    reduced: Tensor
    handle: Handle


class Sink:
    """Collects one parameter's gradient in its bucket's buffer (a `GradientSink`)."""

    def __init__(self, bucket: Bucket, parameter: ShardedParameter, offset: int) -> None:
        self.bucket, self.parameter, self.offset, self.shape = bucket, parameter, offset, parameter.shape
        parameter.register_post_accumulate_grad_hook(self._fold)

    @property
    def main_grad(self) -> Tensor:
        """The parameter's place in the bucket's buffer, which the first gradient of a bucket brings into being."""
        return self.bucket.main_grad[self.offset : self.offset + self.shape.numel()].view(self.shape)

    def ready(self) -> None:
        if self.bucket.inspect is not None:
            self.bucket.inspect(self.parameter)
        self.bucket.gradient_ready()

    def _fold(self, parameter: Tensor) -> None:
        """After autograd has made `.grad` (norm weights, embeddings): add it to the main gradient and drop it.

        Autograd calls this for linears too, whose gradient is None because they have told the sink themselves.
        """
        if parameter.grad is None:
            return
        self.main_grad.add_(parameter.grad)
        parameter.grad = None
        self.ready()


class Bucket:
    """Some parameters of one chunk in two flat buffers: `weights` (model dtype) and `main_grad`.

    This rank updates the flat range [`start`, `stop`): its 1/size part over the shard axis, or all of it where that has size 1.
    `local_weights` is that range of the weights, `master_grad` (fp32) the reduced gradient of it. With the last gradient that
    is expected, `leave` is called, which is to start the reduction.
    """

    def __init__(
        self,
        parameters: Sequence[ShardedParameter],
        bucket_class: BucketClass,
        sharding: Sharding,
        leave: Callable[[Bucket], None],
    ) -> None:
        self.parameters, self.bucket_class, self.sharding, self._leave = list(parameters), bucket_class, sharding, leave
        self.every_pass = sharding.every_pass and not bucket_class.replica_axes
        self.offsets, end = [], 0
        for parameter in self.parameters:
            self.offsets.append(end)
            end += _round_up(parameter.numel(), ALIGNMENT)
        shard_axis = sharding.shard_axis
        self.size = _round_up(end, ALIGNMENT * shard_axis.size * sharding.copies_axis.size)
        shard = self.size // shard_axis.size
        self.start, self.stop = shard_axis.rank * shard, (shard_axis.rank + 1) * shard
        self.weights = self._lay_out()
        self.local_weights = self.weights[self.start : self.stop]
        self._main_grad: Tensor | None = None
        # Whether the shard is a buffer of its own, to which what leaves is added. Otherwise it lies in that of the whole
        # gradients, where bf16 ones have no room for it if they are not split.
        self._adds_up = self.every_pass or (shard_axis.size == 1 and sharding.gradient_dtype != torch.float32)
        self.master_grad = self._place_for_shard()
        self.uses = sum(parameter.shard.uses for parameter in self.parameters)
        self.expected_gradients = 0  # still to come before the bucket leaves; below 0 where nobody counts
        self.expected_departures = 0
        self.has_left = False  # for the last time in this step
        self._scatter: Scatter | None = None
        self._copies_sum: Handle | None = None
        self.gather: Handle | None = None  # of the weights' all-gather under way
        self.inspect: Callable[[ShardedParameter], None] | None = None  # called before a gradient counts as ready

    def _lay_out(self) -> Tensor:
        """Move the parameters into one buffer [size], and give them their sinks."""
        weights = torch.zeros(self.size, dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            view = weights[offset : offset + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.sink = Sink(self, parameter, offset)
        return weights

    def _place_for_shard(self) -> Tensor:
        size = self.stop - self.start
        if self._adds_up:
            return torch.zeros(size, dtype=torch.float32, device=self.weights.device)
        if self.sharding.gradient_dtype == torch.float32:
            return self.main_grad[self.start : self.stop]
        return self.main_grad.view(torch.float32)[:size]  # over the bf16 gradients, which have been sent by then

    @property
    def main_grad(self) -> Tensor:
        """The whole gradients [size] of this rank's micro-batches, until they leave."""
        if self._main_grad is None:
            self._main_grad = self.new_main_grad()
        return self._main_grad

    def new_main_grad(self) -> Tensor:
        """The buffer of the whole gradients [size], all zero."""
        return torch.zeros(self.size, dtype=self.sharding.gradient_dtype, device=self.weights.device)

    @property
    def buffer_bytes(self) -> int:
        """Weights and gradients that this rank holds between steps."""
        whole = 0 if self.every_pass else self.main_grad.nbytes
        return self.weights.nbytes + whole + (self.master_grad.nbytes if self._adds_up else 0)

    # ---- reduction of the gradients -------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Clear the gradients."""
        if self._main_grad is not None:
            self._main_grad.zero_()
        if self._adds_up:
            self.master_grad.zero_()
        self.expected_gradients, self.expected_departures, self.has_left = 0, 0, False

    def expect_passes(self, count: int) -> None:
        """Leave with the last gradient of `count` backward passes, or of each of them."""
        self.expected_departures = count if self.every_pass else 1
        self.expected_gradients = self.uses * count // self.expected_departures

    def gradient_ready(self) -> None:
        """One use of one parameter has added its gradient. The last one that is expected lets the bucket leave."""
        assert not self.has_left, "a gradient came after its bucket had left"
        self.expected_gradients -= 1
        if self.expected_gradients == 0:
            self.expected_departures -= 1
            self.expected_gradients = self.uses  # of the next pass
            self.has_left = self.expected_departures == 0
            self._leave(self)

    def start_reduction(self) -> None:
        """Scatter the gradients over the shard axis, added up; sum shards over their copies where nothing is scattered."""
        sharding, gradients = self.sharding, self.main_grad
        if sharding.shard_axis.size > 1:
            gradients = gradients.to(sharding.wire_dtype)
        out = torch.empty_like(self.master_grad) if self._adds_up else self.master_grad
        self._scatter = Scatter(gradients, *start_reduce_scatter(gradients, sharding.shard_axis, out=out))
        if self.every_pass:
            self._main_grad = None
        if sharding.shard_axis.size == 1:
            self.start_copies_sum()

    def _finish_scatter(self) -> None:
        if self._scatter is not None:
            self._scatter.handle.wait()
            if self._adds_up:
                self.master_grad.add_(self._scatter.reduced)
            self._scatter = None

    def start_copies_sum(self) -> None:
        """The second half of a reduction, where shards have copies: their sum, once the step's gradients are complete."""
        axis = self.sharding.copies_axis
        if axis.size > 1 and self.has_left and self._copies_sum is None:
            self._finish_scatter()
            self._copies_sum = start_narrow_all_reduce(self.master_grad, axis, self.sharding.wire_dtype)

    def wait_reduction(self) -> None:
        """Wait for the reduction under way, both halves of it."""
        self._finish_scatter()
        self.start_copies_sum()
        if self._copies_sum is not None:
            self._copies_sum.wait()
            self._copies_sum = None

    # ---- gathering of the weights ---------------------------------------------------------------------------------------

    def start_gather(self) -> None:
        """Fetch the other ranks' shards of the weights, and send them this one's."""
        _, self.gather = start_all_gather(self.local_weights, self.sharding.shard_axis, out=self.weights)

    def wait_gather(self) -> None:
        if self.gather is not None:
            self.gather.wait()
            self.gather = None

    # ---- what the shard is ----------------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[tuple[Piece, slice]]:
        """Parts of this rank's shard in named global tensors, each with its place in the shard (`master_grad[place]`)."""
        return self.pieces_of(self.sharding.shard_axis.rank)

    def pieces_of(self, shard_rank: int) -> Iterator[tuple[Piece, slice]]:
        """The same of the shard that another rank of the shard axis has."""
        size = self.stop - self.start
        start, stop = shard_rank * size, (shard_rank + 1) * size
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            low, high = max(start - offset, 0), min(stop - offset, parameter.numel())
            for piece in range_pieces(parameter.shard, low, high):
                first = offset + piece.start - start
                yield piece, slice(first, first + piece.box.numel)


def make_buckets(
    parameters: Sequence[ShardedParameter], bucket_size: int, sharding: Sharding, leave: Callable[[Bucket], None]
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
    return [Bucket(members, key, sharding, leave) for key, members in groups]
