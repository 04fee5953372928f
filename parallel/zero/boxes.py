"""An engine's state as boxes of named global tensors, for saving and loading."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

from parallel.shards import Box, Piece, Segment, TensorBox, range_boxes

SHARED_ELEMENTS = 16_384  # 64 KiB of fp32: copies share the writing of what gives each of them as much


class Flat(Protocol):
    """A bucket or partition: its flat tensors hold pieces of global tensors."""

    def pieces(self) -> Iterator[tuple[Piece, slice]]: ...


def state_boxes(
    parts: Iterable[Flat], flats: Iterable[Tensor], prefix: str = "", data_copy: tuple[int, int] | None = None
) -> Iterator[TensorBox]:
    """The boxes of one flat tensor per part, each a view of it, named `prefix` + the segment's name.

    Without `data_copy`, everything that is there. With it, what this rank is to write: each element comes from exactly one of
    the ranks that hold it. It says which of how many copies among the data ranks these parts are; of copies among tensor and
    pipeline ranks the segments know.
    """
    for part, flat in zip(parts, flats, strict=True):
        for piece, place in part.pieces():
            values, segment = flat[place].view(piece.box.shape), piece.segment
            if data_copy is None or (segment.replica is None and data_copy[1] == 1):  # no other rank has it
                yield TensorBox(prefix + segment.name, segment.global_shape, piece.box, values)
                continue
            for share in _share(segment, *data_copy):
                box = piece.box.intersect(share)
                if box is not None:
                    inside = box.shifted(piece.box.offset, (0,) * len(box.offset))
                    yield TensorBox(prefix + segment.name, segment.global_shape, box, values[inside.slices()])


def _share(segment: Segment, index: int, copies: int) -> list[Box]:
    """What this rank writes of a segment: a flat range of a large one; of small ones, every copy some."""
    replica = segment.replica
    if replica is not None:
        index, copies = replica.index * copies + index, replica.size * copies
    count = segment.box.numel
    if count < SHARED_ELEMENTS * copies:
        return [segment.box] if zlib.crc32(segment.name.encode()) % copies == index else []
    ranges = range_boxes(segment.box.shape, count * index // copies, count * (index + 1) // copies)
    return [box.shifted((0,) * len(box.offset), segment.box.offset) for box, _ in ranges]
