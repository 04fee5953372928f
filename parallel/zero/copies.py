"""What an engine holds that other ranks hold too, for the audit of replicas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from parallel.groups import Axis, ProcessGroups
from parallel.replica_audit import Replicated, Rounded
from parallel.shards import Segment
from parallel.tensor.parameter import ShardedParameter
from parallel.zero.boxes import Flat


def weight_copies(parameters: Iterable[ShardedParameter], groups: ProcessGroups) -> Iterator[Replicated]:
    """The model's weights: the same on all data ranks, replicated segments on their axes besides."""
    for parameter in parameters:
        for segment in parameter.shard.segments:
            axes = _axes(segment, groups, groups.data)
            if axes:
                yield Replicated(segment.name, segment.box, parameter.detach()[segment.local.slices()], axes)


def state_copies(kind: str, part: Flat, flat: Tensor, groups: ProcessGroups, copies: Axis) -> Iterator[Replicated]:
    """A part's state of a `kind`, flat, as KIND/NAME: the same along `copies`, replicated segments on their axes besides."""
    for piece, place in part.pieces():
        axes = _axes(piece.segment, groups, copies)
        if axes:
            yield Replicated(f"{kind}/{piece.segment.name}", piece.box, flat.detach()[place], axes)


def roundings(part: Flat, weights: Tensor, master: Tensor) -> Iterator[Rounded]:
    """A part's weights in the model's dtype, and its fp32 masters, both flat."""
    for piece, place in part.pieces():
        yield Rounded(piece.segment.name, piece.box, weights.detach()[place], master.detach()[place])


def _axes(segment: Segment, groups: ProcessGroups, data: Axis) -> tuple[Axis, ...]:
    """Along which axes the segment has copies, if it has on the data ranks of `data`."""
    axes = [data] if segment.replica is None else [data, groups.axis(segment.replica.axis)]
    return tuple(axis for axis in axes if axis.size > 1)
