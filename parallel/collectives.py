"""Thin wrappers of the collectives: a short cut for axes of size 1, a ledger of bytes, and a breadcrumb of the last call.

Reductions are sums. Gathers and scatters run along dim 0 (the sequence of an activation, a flat buffer). The `start_*`
functions return (result, handle): the result may be read after `handle.wait()`, which on a GPU makes the current stream
wait and never the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from parallel.errors import LostContactError
from parallel.groups import Axis
from parallel.waiting import ClockedHandle, GlooMessage, Handle

# torch 2.13 renamed them and warns about the old names; 2.11 has only the old ones.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

LARGE_BYTES = 1 << 20  # of a part of a gather, from which on messages of two ranks are cheaper than gloo's collective


# What gloo says where the other side is gone or silent; NCCL's errors have a type of their own.
GLOO_COMPLAINTS = ("Connection closed", "Connection reset", "Timed out waiting", "pair closure", "Broken pipe")


class Done:
    """The handle of a collective that had nothing to do."""

    def wait(self) -> None:
        return None


class All:
    """Several handles as one."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.handles = handles

    def wait(self) -> None:
        for handle in self.handles:
            handle.wait()


def _range(kind: str, axis: Axis) -> AbstractContextManager:
    """A range of this name in a profile, where one is being made; entering one costs more than a Python call."""
    return record_function(f"{kind}/{axis.name}") if torch.autograd._profiler_enabled() else nullcontext()


def _size_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_gloo(tensor: Tensor, axis: Axis) -> bool:
    """Whether gloo moves the tensor from one member to another (it sends none from a GPU)."""
    return not tensor.is_cuda and dist.get_backend(axis.group) == "gloo"


def start_all_reduce(tensor: Tensor, axis: Axis, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Handle:
    """Reduce `tensor` (contiguous) in place over the axis."""
    if axis.size == 1:
        return Done()
    assert tensor.is_contiguous()
    axis.record("all_reduce", 2 * _size_bytes(tensor) * (axis.size - 1) // axis.size)
    with _range("all_reduce", axis):
        return axis.clocked(dist.all_reduce(tensor, op=op, group=axis.group, async_op=True))


def all_reduce(tensor: Tensor, axis: Axis, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over the axis and return the tensor."""
    start_all_reduce(tensor, axis, op).wait()
    return tensor


def start_all_gather(tensor: Tensor, axis: Axis, out: Tensor | None = None) -> tuple[Tensor, Handle]:
    """Concatenate the members' tensors along dim 0: [n, ...] -> [size * n, ...].

    `out` may be the buffer of which `tensor` is this rank's part.
    """
    if axis.size == 1:
        return tensor, Done()
    tensor = tensor.contiguous()
    if out is None:
        out = tensor.new_empty((axis.size * tensor.shape[0], *tensor.shape[1:]))
    axis.record("all_gather", _size_bytes(tensor) * (axis.size - 1))
    with _range("all_gather", axis):
        if _size_bytes(tensor) >= LARGE_BYTES and _is_gloo(tensor, axis):
            parts = out.view(axis.size, *tensor.shape)  # gloo's own all-gather copies everything once more
            return out, _start_all_to_all(parts, tensor.expand_as(parts), axis)
        return out, axis.clocked(_all_gather_into(out, tensor, group=axis.group, async_op=True))


def all_gather(tensor: Tensor, axis: Axis) -> Tensor:
    """[n, ...] -> [size * n, ...]."""
    out, handle = start_all_gather(tensor, axis)
    handle.wait()
    return out


class SumOfPieces:
    """The handle of a reduce-scatter by all-to-all: when the pieces [size, ...] are there, `wait` adds them up in rank order.

    The sum is rounded once, to the dtype of `out`; on a GPU it is made on the current stream.
    """

    def __init__(self, exchange: Handle, pieces: Tensor, out: Tensor) -> None:
        self.exchange, self.pieces, self.out = exchange, pieces, out

    def wait(self) -> None:
        self.exchange.wait()
        torch.sum(self.pieces, dim=0, dtype=self.out.dtype, out=self.out)


def start_reduce_scatter(tensor: Tensor, axis: Axis, out: Tensor | None = None) -> tuple[Tensor, Handle]:
    """Sum over the axis and keep this rank's part of dim 0: [size * n, ...] -> [n, ...].

    `out` may be this rank's part of `tensor` itself, or of a wider dtype: sums are made in its dtype, what travels has that of
    `tensor`. That is more than a backend's reduce-scatter can do, and gloo's moves a whole all-reduce: in both cases the pieces
    are exchanged all-to-all and added up here, for the same bytes as a ring's.
    """
    if axis.size == 1:
        return tensor, Done()
    tensor = tensor.contiguous()
    assert tensor.shape[0] % axis.size == 0, f"dim 0 of {tuple(tensor.shape)} does not split over {axis.size} ranks"
    if out is None:
        out = tensor.new_empty((tensor.shape[0] // axis.size, *tensor.shape[1:]))
    axis.record("reduce_scatter", _size_bytes(tensor) // axis.size * (axis.size - 1))
    with _range("reduce_scatter", axis):
        if out.dtype == tensor.dtype and dist.get_backend(axis.group) != "gloo":
            return out, axis.clocked(_reduce_scatter_into(out, tensor, group=axis.group, async_op=True))
        pieces = torch.empty_like(tensor)
        exchange = _start_all_to_all(pieces.view(axis.size, *out.shape), tensor.view(axis.size, *out.shape), axis)
        return out, SumOfPieces(exchange, pieces.view(axis.size, *out.shape), out)


def _start_all_to_all(out: Tensor, tensor: Tensor, axis: Axis) -> Handle:  # [size, ...] twice
    """Send part i to member i. gloo's own all-to-all sends before it receives, so that a slow link goes one way at a time."""
    if not _is_gloo(tensor, axis):
        return axis.clocked(dist.all_to_all_single(out, tensor, group=axis.group, async_op=True))
    messages = []
    for shift in range(1, axis.size):
        target, source = ((axis.rank + step) % axis.size for step in (-shift, shift))
        messages += _exchange(tensor[target], out[source], axis, target, source)
    if out[axis.rank].data_ptr() != tensor[axis.rank].data_ptr():
        out[axis.rank] = tensor[axis.rank]
    return axis.clocked(All(messages))


def _exchange(tensor: Tensor, out: Tensor, axis: Axis, target: int, source: int) -> list[Handle]:
    """The receive comes first: gloo announces it on the connection that the sent bytes would hold up."""
    receive = dist.P2POp(dist.irecv, out, axis.ranks[source], axis.group)
    send = dist.P2POp(dist.isend, tensor, axis.ranks[target], axis.group)
    return [_message(work, tensor, axis) for work in dist.batch_isend_irecv([receive, send])]


def _message(work: dist.Work | None, tensor: Tensor, axis: Axis) -> GlooMessage | dist.Work:
    """The handle of a message."""
    assert work is not None
    return work if tensor.is_cuda else GlooMessage(work, axis.ledger.clock)


def reduce_scatter(tensor: Tensor, axis: Axis) -> Tensor:
    """[size * n, ...] -> [n, ...], summed."""
    out, handle = start_reduce_scatter(tensor, axis)
    handle.wait()
    return out


class _GatherOfSums:
    """The handle of an all-reduce in narrow numbers: `wait` gathers the sums, rounded to `dtype`, once they are there."""

    def __init__(self, sums: Tensor, scatter: Handle, whole: Tensor, axis: Axis, dtype: torch.dtype) -> None:
        self.sums, self.scatter, self.whole, self.axis, self.dtype = sums, scatter, whole, axis, dtype

    def wait(self) -> None:
        self.scatter.wait()
        self.whole.copy_(all_gather(self.sums.to(self.dtype), self.axis))


def start_narrow_all_reduce(tensor: Tensor, axis: Axis, dtype: torch.dtype) -> Handle:
    """Sum `tensor` (contiguous) in place over the axis, by messages in `dtype`. Sums are made in the tensor's own dtype and
    rounded once, so all members get the same ones. Dim 0 must split over the axis."""
    if axis.size == 1 or dtype == tensor.dtype:
        return start_all_reduce(tensor, axis)
    sums = tensor.new_empty((tensor.shape[0] // axis.size, *tensor.shape[1:]))
    _, scatter = start_reduce_scatter(tensor.to(dtype), axis, out=sums)
    return _GatherOfSums(sums, scatter, tensor, axis, dtype)


def start_broadcast(tensor: Tensor, axis: Axis, source: int) -> Handle:
    """Overwrite `tensor` on every member by that of the member with index `source`."""
    if axis.size == 1:
        return Done()
    axis.record("broadcast", _size_bytes(tensor) if axis.rank == source else 0)
    with _range("broadcast", axis):
        return axis.clocked(dist.broadcast(tensor, src=axis.ranks[source], group=axis.group, async_op=True))


def broadcast(tensor: Tensor, axis: Axis, source: int) -> Tensor:
    """Overwrite `tensor` on every member by that of the member with index `source`, and return it."""
    start_broadcast(tensor, axis, source).wait()
    return tensor


def start_send(tensor: Tensor, axis: Axis, peer: int, tag: int) -> ClockedHandle:
    """Send to the member with index `peer`. Keep the handle and leave the tensor unchanged until it completes.

    Sends with gloo are rendezvous: they complete after the peer has posted its receive. NCCL ignores tags, so the messages of
    one direction between two members must be posted in the same order on both.
    """
    axis.record("send", _size_bytes(tensor))
    return axis.clocked(_message(dist.isend(tensor, dst=axis.ranks[peer], group=axis.group, tag=tag), tensor, axis))


def start_receive(tensor: Tensor, axis: Axis, peer: int, tag: int) -> ClockedHandle:
    """Receive into `tensor` from the member with index `peer`."""
    axis.record("receive", 0)
    return axis.clocked(_message(dist.irecv(tensor, src=axis.ranks[peer], group=axis.group, tag=tag), tensor, axis))


def start_exchange(tensor: Tensor, out: Tensor, axis: Axis, shift: int) -> Handle:
    """Send `tensor` to the member `shift` places before this one, and receive into `out` from that `shift` places after it.

    Places are counted round the axis, tensors are contiguous. All members call it together, like a collective.
    """
    assert tensor.is_contiguous() and out.is_contiguous()
    target, source = ((axis.rank + step) % axis.size for step in (-shift, shift))
    axis.record("exchange", _size_bytes(tensor))
    with _range("exchange", axis):
        return axis.clocked(All(_exchange(tensor, out, axis, target, source)))


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """The members' values (small, of any type), in the order of the axis. Slow: for what happens once or hardly ever."""
    if axis.size == 1:
        return [value]
    axis.record("all_gather", 0)
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


@contextmanager
def contact_kept(world: Axis) -> Iterator[None]:
    """Inside this context the end or silence of another rank is a LostContactError, which names this rank's latest call."""
    try:
        yield
    except RuntimeError as error:  # DistError is one
        if not isinstance(error, dist.DistError) and not any(complaint in str(error) for complaint in GLOO_COMPLAINTS):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostContactError(
            f"rank {world.rank} has lost another rank in {world.ledger.last}, or before it: {reason}. That one has died or "
            "does not answer; its own log says why. Start the same command again to go on from the newest checkpoint"
        ) from error


def barrier(axis: Axis, device: torch.device) -> None:
    """Return after every member has called it."""
    all_reduce(torch.zeros(1, device=device), axis)
