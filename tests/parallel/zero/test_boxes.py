"""What each rank writes of its state: every element once, whoever holds copies, and large copies shared evenly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.shards import Box, Replica, Segment, Shard, range_pieces
from parallel.zero.boxes import SHARED_ELEMENTS, state_boxes


class Part:
    """Elements [low, high) of a parameter of one segment."""

    def __init__(self, segment: Segment, low: int, high: int) -> None:
        self.shard, self.low, self.high = Shard(segment.local.shape, (segment,)), low, high

    def pieces(self):
        for piece in range_pieces(self.shard, self.low, self.high):
            yield piece, slice(piece.start - self.low, piece.start - self.low + piece.box.numel)


def written(name: str, box: Box, whole: torch.Tensor, copies: int, data_copies: int, cuts: list[list[int]]) -> list[int]:
    """Checks what the ranks write of `box`; each copy is cut at other places among its ranks. Elements written, by copy."""
    found, counts = torch.zeros_like(whole), torch.zeros_like(whole)
    values, sizes = whole[box.slices()].reshape(-1), []
    for copy in range(copies):
        replica = Replica("tp", copy, copies, partial_gradient=False) if copies > 1 else None
        segment = Segment(name, tuple(whole.shape), box, Box.whole(box.shape), replica)
        edges = [0, *sorted(cuts[copy % len(cuts)]), box.numel]
        for data_copy in range(data_copies):
            sizes.append(0)
            for low, high in zip(edges, edges[1:], strict=False):
                for item in state_boxes([Part(segment, low, high)], [values[low:high]], "m/", (data_copy, data_copies)):
                    assert item.name == f"m/{name}" and item.global_shape == tuple(whole.shape)
                    found[item.box.slices()] += item.tensor
                    counts[item.box.slices()] += 1
                    sizes[-1] += item.box.numel
    assert (counts[box.slices()] == 1).all() and counts.sum() == box.numel
    assert torch.equal(found[box.slices()], whole[box.slices()])
    return sizes


@given(st.data())
def test_every_element_is_written_once_wherever_the_copies_are_cut(data):
    rows, columns = data.draw(st.integers(1, 300)), data.draw(st.sampled_from([None, 7, 300]))
    shape = (rows,) if columns is None else (rows, columns)
    whole = torch.arange(1.0, math.prod(shape) + 1).view(shape)
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    box = Box(offset, tuple(data.draw(st.integers(1, size - o)) for size, o in zip(shape, offset, strict=True)))
    copies, data_copies = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2, 4]))
    cuts = data.draw(st.lists(st.lists(st.integers(0, box.numel), max_size=3), min_size=copies, max_size=copies))
    written("w", box, whole, copies, data_copies, cuts)


@pytest.mark.parametrize(("copies", "data_copies"), [(1, 4), (2, 1), (2, 3)])
def test_copies_share_what_is_large(copies, data_copies):
    whole = torch.arange(float(SHARED_ELEMENTS * 8)).view(512, -1)
    sizes = written("w", Box.whole((512, 256)), whole, copies, data_copies, [[1000], [70_000]])
    assert max(sizes) - min(sizes) <= 1 and len(sizes) == copies * data_copies


def test_small_ones_are_spread_over_the_copies_by_name():
    whole = torch.arange(10.0)
    sizes = [written(f"layers.{layer}.norm", Box.whole((10,)), whole, 2, 2, [[3]]) for layer in range(40)]
    assert all(sorted(one) == [0, 0, 0, 10] for one in sizes)
    assert all(sum(one[copy] for one in sizes) > 0 for copy in range(4))


def test_without_a_copy_number_everything_is_there():
    segment = Segment("w", (4, 6), Box.whole((4, 6)), Box.whole((4, 6)), Replica("tp", 1, 2, partial_gradient=False))
    flat = torch.arange(17.0)
    boxes = list(state_boxes([Part(segment, 3, 20)], [flat]))
    assert sum(item.box.numel for item in boxes) == 17 and all(item.tensor._base is flat for item in boxes)
