"""Box arithmetic against brute force on index tensors: a global tensor whose elements are their own flat positions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.shards import Box, Piece, Replica, Segment, Shard, TensorBox, flat_span, range_boxes, range_pieces

sizes = st.integers(1, 7)
shapes = st.lists(sizes, min_size=1, max_size=4).map(tuple)


def index_tensor(shape):
    return np.arange(math.prod(shape)).reshape(shape)


@st.composite
def box_in(draw, shape):
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return Box(offset, tuple(draw(st.integers(1, size - o)) for o, size in zip(offset, shape, strict=True)))


@st.composite
def shape_and_boxes(draw):
    shape = draw(shapes)
    return shape, draw(box_in(shape)), draw(box_in(shape))


@st.composite
def shape_and_range(draw):
    shape = draw(shapes)
    start, stop = sorted((draw(st.integers(0, math.prod(shape))), draw(st.integers(0, math.prod(shape)))))
    return shape, start, stop


@given(shape_and_boxes())
def test_intersect_and_contains_are_those_of_the_element_sets(case):
    shape, a, b = case
    index = index_tensor(shape)
    in_a, in_b = set(index[a.slices()].ravel()), set(index[b.slices()].ravel())
    common = a.intersect(b)
    assert (set() if common is None else set(index[common.slices()].ravel())) == in_a & in_b
    assert a.contains(b) == (in_b <= in_a)
    assert a.numel == len(in_a)


@given(shape_and_boxes())
def test_shifted_moves_elements_with_the_origin(case):
    shape, a, b = case
    common = a.intersect(b)
    if common is None:
        return
    index = index_tensor(shape)
    local = common.shifted(a.offset, (0,) * len(shape))
    assert np.array_equal(index[a.slices()][local.slices()], index[common.slices()])
    assert local.shifted((0,) * len(shape), a.offset) == common


@given(shape_and_boxes())
def test_flat_span_is_the_smallest_range_and_tells_contiguous_boxes(case):
    shape, box, _ = case
    elements = index_tensor(shape)[box.slices()].ravel()
    start, stop = flat_span(shape, box)
    assert (start, stop) == (elements.min(), elements.max() + 1)
    assert (stop - start == box.numel) == (np.diff(elements) == 1).all()


@settings(max_examples=300)
@given(shape_and_range())
def test_range_boxes_are_the_range_in_order(case):
    shape, start, stop = case
    index = index_tensor(shape)
    boxes = range_boxes(shape, start, stop)
    elements = [index[box.slices()].ravel() for box, _ in boxes]
    assert np.array_equal(np.concatenate([*elements, np.empty(0, int)]), np.arange(start, stop))
    assert [flat for _, flat in boxes] == [part[0] for part in elements]
    assert len(boxes) <= 2 * len(shape) - 1


def test_range_boxes_of_a_scalar_and_bounds():
    assert range_boxes((), 0, 1) == [(Box((), ()), 0)]
    assert range_boxes((), 0, 0) == []
    assert range_boxes((0, 5), 0, 0) == []
    with pytest.raises(AssertionError, match="leaves a tensor"):
        range_boxes((3, 4), 5, 13)


def test_the_bound_on_the_number_of_boxes_is_reached():
    assert [len(range_boxes((4,) * dims, 1, 4**dims - 1)) for dims in (1, 2, 3, 4)] == [1, 3, 5, 7]


def part(total, parts, index):
    """The index-th of `parts` nearly even parts of range(total)."""
    return index * total // parts, (index + 1) * total // parts


@st.composite
def runtime_parameters(draw):
    """One rank's parameter of a kind that the model has: (shard, {name: global shape})."""
    kind = draw(st.sampled_from(["fused", "vocabulary", "row", "replicated"]))
    tp = draw(st.integers(1, 4))
    rank = draw(st.integers(0, tp - 1))
    width = draw(st.integers(1, 6))
    if kind == "fused":  # q | k | v: three row blocks, of different sizes, one after the other
        segments, rows = [], 0
        for name in "qkv":
            total = draw(st.integers(tp, 9))
            low, high = part(total, tp, rank)
            if low < high:
                box = Box((low, 0), (high - low, width))
                segments.append(Segment(name, (total, width), box, Box((rows, 0), box.shape)))
            rows += high - low
        return Shard((max(rows, 1), width), tuple(segments))
    if kind == "vocabulary":  # rows padded to a multiple of tp; the last ranks may hold nothing but padding
        vocabulary = draw(st.integers(1, 11))
        rows = -(-vocabulary // tp)
        low, high = min(rank * rows, vocabulary), min((rank + 1) * rows, vocabulary)
        box = Box((low, 0), (high - low, width))
        segments = (Segment("embedding", (vocabulary, width), box, Box((0, 0), box.shape)),) if high > low else ()
        return Shard((rows, width), segments)
    if kind == "row":  # columns of the global tensor
        total = draw(st.integers(tp, 9))
        low, high = part(total, tp, rank)
        shape = (width, high - low)
        return Shard(shape, (Segment("wo", (width, total), Box((0, low), shape), Box.whole(shape)),))
    whole = Box.whole((width,))
    return Shard((width,), (Segment("norm", (width,), whole, whole, Replica("tp", rank, tp, True)),))


@settings(max_examples=300)
@given(runtime_parameters(), st.data())
def test_range_pieces_of_any_cut_are_every_stored_element_once(shard, data):
    """Cut the local tensor into ragged ranges, as data parallel ranks do; follow each piece to the global tensors."""
    total = math.prod(shard.shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    numbers = {s.name: 1000 * k + 1 + index_tensor(s.global_shape) for k, s in enumerate(shard.segments)}
    local = np.zeros(shard.shape, int)  # 0 = padding
    for segment in shard.segments:
        local[segment.local.slices()] = numbers[segment.name][segment.box.slices()]
    found = np.zeros(total, int)
    for start, stop in zip([0, *cuts], [*cuts, total], strict=True):
        for piece in range_pieces(shard, start, stop):
            assert start <= piece.start and piece.start + piece.box.numel <= stop
            assert piece.segment.box.contains(piece.box)
            values = numbers[piece.segment.name][piece.box.slices()].ravel()
            assert not found[piece.start : piece.start + piece.box.numel].any(), "an element twice"
            found[piece.start : piece.start + piece.box.numel] = values
    assert np.array_equal(found, local.ravel())


def test_a_range_over_padding_yields_nothing():
    shard = Shard((4, 3), (Segment("embedding", (9, 3), Box((8, 0), (1, 3)), Box((0, 0), (1, 3))),))
    assert list(range_pieces(shard, 3, 12)) == []
    assert list(range_pieces(shard, 1, 12)) == [Piece(shard.segments[0], Box((8, 1), (1, 2)), 1)]


def test_replica_axes_are_named_once():
    box = Box.whole((2,))
    replica = Replica("tp", 0, 2, False)
    shard = Shard((4,), tuple(Segment(n, (2,), box, Box((o,), (2,)), replica) for n, o in (("a", 0), ("b", 2))))
    assert shard.replica_axes == ("tp",)


def test_wrong_segments_and_tensor_boxes_are_refused():
    with pytest.raises(AssertionError, match="differ in shape"):
        Segment("w", (4, 4), Box((0, 0), (2, 4)), Box((0, 0), (4, 2)))
    with pytest.raises(AssertionError, match="leaves"):
        Segment("w", (4, 4), Box((3, 0), (2, 4)), Box((0, 0), (2, 4)))
    with pytest.raises(AssertionError, match="tensor"):
        TensorBox("w", (4, 4), Box((0, 0), (2, 4)), torch.zeros(4, 2))
