"""Where a runtime tensor lies in the model's named global tensors.

A *box* is a rectangle in a tensor. A runtime parameter (one rank's part, possibly several logical tensors fused, possibly
padded) is a list of *segments*: this box of my local tensor is that box of the global tensor of that name. A flat range of a
local tensor, which is what a sharded optimizer owns, is a few boxes again. Initial values, checkpoints, gradient norms and
converters all read segments; nobody matches parameter names by pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import add, ge, le, sub

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangle in a tensor: elements `offset[d] <= index[d] < offset[d] + shape[d]` in each dim d."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """The box that covers a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(map(add, self.offset, self.shape))

    def slices(self) -> tuple[slice, ...]:
        """Index with it to view the box: `tensor[box.slices()]`."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None where the two do not meet."""
        low = tuple(map(max, self.offset, other.offset))
        shape = tuple(map(sub, map(min, self.end, other.end), low))
        return Box(low, shape) if min(shape, default=1) > 0 else None

    def shifted(self, origin: tuple[int, ...], target: tuple[int, ...]) -> Box:
        """The same box after `origin` moved to `target` (from local to global coordinates, or back)."""
        return Box(tuple(o - a + b for o, a, b in zip(self.offset, origin, target, strict=True)), self.shape)

    def contains(self, other: Box) -> bool:
        """Whether `other` lies inside this box."""
        return all(map(le, self.offset, other.offset)) and all(map(ge, self.end, other.end))


@dataclass(frozen=True)
class Replica:
    """Ranks of the axis named `axis` hold equal copies of a segment.

    `partial_gradient`: each copy's gradient is only its rank's part, so they are summed over the axis once per step
    (otherwise every copy computes the whole gradient). `index` 0 writes the segment to checkpoints; the global
    gradient norm counts each copy 1/size.
    """

    axis: str
    index: int
    size: int
    partial_gradient: bool


@dataclass(frozen=True)
class Segment:
    """`local` (a box of the runtime tensor) holds `box` of the global tensor `name` of shape `global_shape`."""

    name: str
    global_shape: tuple[int, ...]
    box: Box
    local: Box
    replica: Replica | None = None

    def __post_init__(self) -> None:
        assert self.box.shape == self.local.shape, f"{self.name}: global {self.box} and local {self.local} differ in shape"
        assert Box.whole(self.global_shape).contains(self.box), f"{self.name}: {self.box} leaves {self.global_shape}"


@dataclass(frozen=True)
class Shard:
    """The place of one runtime parameter: its local shape and its segments.

    Elements of the local tensor that no segment covers are padding (vocabulary rows): zero, never trained, never stored.
    `decay`: whether weight decay applies. `uses`: how often one backward pass adds to its gradient (2 for a tied head
    on the rank of the embedding).
    """

    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    decay: bool = True
    uses: int = 1

    @property
    def replica_axes(self) -> tuple[str, ...]:
        """Names of the axes over which some segment is replicated, sorted."""
        return tuple(sorted({s.replica.axis for s in self.segments if s.replica}))


@dataclass(frozen=True)
class TensorBox:
    """A tensor (or view) that holds `box` of the global tensor `name`: what checkpoints read and write."""

    name: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: Tensor

    def __post_init__(self) -> None:
        assert self.tensor.shape == self.box.shape, f"{self.name}: tensor {tuple(self.tensor.shape)}, box {self.box.shape}"


def range_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[Box, int]]:
    """Cut the flat range [start, stop) of a row-major tensor into at most `2 * len(shape) - 1` boxes (a scalar: one).

    Returns (box, flat position of the box's first element) in flat order. Each box is contiguous in memory.
    """
    assert 0 <= start and stop <= math.prod(shape), f"range [{start}, {stop}) leaves a tensor of shape {shape}"
    if start >= stop:
        return []
    if not shape:
        return [(Box((), ()), 0)]
    if len(shape) == 1:
        return [(Box((start,), (stop - start,)), start)]
    row_size = math.prod(shape[1:])
    first_row, first_col = divmod(start, row_size)
    last_row, last_col = divmod(stop, row_size)

    def in_row(row: int, low: int, high: int) -> list[tuple[Box, int]]:
        return [
            (Box((row, *box.offset), (1, *box.shape)), row * row_size + flat)
            for box, flat in range_boxes(shape[1:], low, high)
        ]

    if first_row == last_row:
        return in_row(first_row, first_col, last_col)
    boxes = []
    if first_col:
        boxes += in_row(first_row, first_col, row_size)
        first_row += 1
    if last_row > first_row:
        whole_rows = Box((first_row,) + (0,) * (len(shape) - 1), (last_row - first_row, *shape[1:]))
        boxes.append((whole_rows, first_row * row_size))
    if last_col:
        boxes += in_row(last_row, 0, last_col)
    return boxes


def flat_span(shape: tuple[int, ...], box: Box) -> tuple[int, int]:
    """The smallest flat range [start, stop) of a row-major tensor of `shape` that contains all of `box` (not empty).

    The box is contiguous in memory exactly where `stop - start == box.numel`.
    """
    first = last = 0
    for size, offset, count in zip(shape, box.offset, box.shape, strict=True):
        first = first * size + offset
        last = last * size + offset + count - 1
    return first, last + 1


@dataclass(frozen=True)
class Piece:
    """Part of a flat range of a runtime tensor.

    Elements [start, start + box.numel) of the flattened local tensor are `box` of the segment's global tensor.
    """

    segment: Segment
    box: Box
    start: int


def range_pieces(shard: Shard, start: int, stop: int) -> Iterator[Piece]:
    """The parts of the flat range [start, stop) of a parameter's local tensor that lie in named global tensors.

    Padding yields nothing. A segment spans all of the local tensor's trailing dims, so each piece is contiguous.
    """
    for box, _ in range_boxes(shard.shape, start, stop):
        for segment in shard.segments:
            assert segment.local.shape[1:] == shard.shape[1:], f"{segment.name}: a segment must span whole rows"
            common = box.intersect(segment.local)
            if common is not None:
                flat, _ = flat_span(shard.shape, common)
                yield Piece(segment, common.shifted(segment.local.offset, segment.box.offset), flat)
