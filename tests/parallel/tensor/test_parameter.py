"""Initial values are a function of (seed, name, position): the same bits in every cut of a tensor."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.shards import Box, Segment, Shard
from parallel.tensor.parameter import _ALIGNED, ShardedParameter, initialize_normal, normal_box
from tests.parallel.building import CPU, whole

matrix_shapes = st.tuples(st.integers(1, 40), st.one_of(st.integers(1, 60), st.sampled_from([511, 512, 513, 1025])))


def full_values(shape, seed=3, name="w"):
    return normal_box(seed, name, shape, Box.whole(shape))


@st.composite
def matrix_and_box(draw):
    shape = draw(matrix_shapes)
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return shape, Box(offset, tuple(draw(st.integers(1, size - o)) for size, o in zip(shape, offset, strict=True)))


@settings(deadline=None)
@given(matrix_and_box())
def test_any_box_of_a_matrix_has_the_bits_of_the_whole(case):
    shape, box = case
    values = normal_box(3, "w", shape, box)
    assert values.shape == box.shape and values.dtype == torch.float32
    assert torch.equal(values, full_values(shape)[box.slices()])


@settings(deadline=None)
@given(st.integers(1, 2000), st.data())
def test_any_run_of_a_vector_has_the_bits_of_the_whole(length, data):
    start = data.draw(st.integers(0, length - 1))
    box = Box((start,), (data.draw(st.integers(1, length - start)),))
    assert torch.equal(normal_box(3, "w", (length,), box), full_values((length,))[box.slices()])


@pytest.mark.parametrize("edge", [_ALIGNED, 2 * _ALIGNED])
def test_runs_around_the_edges_of_blocks_have_the_bits_of_the_whole(edge):
    full = full_values((4 * _ALIGNED,))
    for start in (edge - 1, edge, edge + 1):
        for stop in (start + 1, start + 2, edge + _ALIGNED - 1, edge + _ALIGNED, edge + _ALIGNED + 1):
            box = Box((start,), (stop - start,))
            assert torch.equal(normal_box(3, "w", full.shape, box), full[start:stop]), (start, stop)


def test_a_box_far_into_a_huge_tensor_is_made_alone():
    """Row 10^6 of a matrix of 10^12 elements: the generator jumps there."""
    shape, row = (1_000_000, 1_000_000), 999_999
    near = normal_box(3, "w", shape, Box((row, 999_000), (1, 1000)))
    assert torch.equal(near[:, 100:200], normal_box(3, "w", shape, Box((row, 999_100), (1, 100))))
    assert near.std().item() == pytest.approx(1.0, abs=0.1)


def test_the_values_are_standard_normal_and_independent():
    values = full_values((1000, 1000)).double().flatten()
    n = len(values)
    assert values.mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(n))  # four standard errors each
    assert values.var().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / n))
    assert (values**3).mean().item() == pytest.approx(0.0, abs=4 * math.sqrt(15 / n))
    assert (values**4).mean().item() == pytest.approx(3.0, abs=4 * math.sqrt(96 / n))
    tail = (values.abs() > 3.0).double().mean().item()
    assert tail == pytest.approx(math.erfc(3 / math.sqrt(2)), rel=0.1)
    for lag in (1, 2, 4, 512, 1000):  # neighbours, words of one counter, blocks, rows
        assert (values[lag:] * values[:-lag]).mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(n))
    assert torch.isfinite(values).all() and len(values.unique()) > 0.95 * n


def test_names_and_seeds_give_other_values():
    streams = [full_values((4096,), seed, name) for seed in (0, 1) for name in ("layers.0.w", "layers.1.w")]
    correlations = np.corrcoef(np.stack(streams)) - np.eye(4)
    assert abs(correlations).max() < 4 / math.sqrt(4096)


def test_the_stream_is_fixed():
    """Checkpoints aside, a change here changes every model's start: it must be meant."""
    expected = [1.8143606185913086, -0.0011262845946475863, 0.36308547854423523, -0.14875121414661407]
    assert full_values((4,), seed=0, name="w").tolist() == pytest.approx(expected, rel=1e-6)  # libm may differ in a last bit


def test_partial_rows_of_other_than_matrices_are_refused():
    with pytest.raises(AssertionError, match="made for matrices only"):
        normal_box(0, "w", (2, 3, 4), Box((0, 0, 0), (2, 3, 2)))
    whole_rows = normal_box(0, "w", (2, 3, 4), Box((1, 0, 0), (1, 3, 4)))
    assert torch.equal(whole_rows, full_values((2, 3, 4), seed=0)[1:])


def fused_parameter():
    """a [6, 4] rows 2:4 and b [3, 4] whole, then one row of padding."""
    a = Segment("a", (6, 4), Box((2, 0), (2, 4)), Box((0, 0), (2, 4)))
    b = Segment("b", (3, 4), Box((0, 0), (3, 4)), Box((2, 0), (3, 4)))
    return ShardedParameter(Shard((6, 4), (a, b)), torch.float32, CPU)


def test_each_segment_gets_its_own_values_and_padding_stays_zero():
    parameter = fused_parameter()
    initialize_normal(parameter, seed=3, std={"a": 0.5, "b": 2.0})
    assert torch.equal(parameter[:2], full_values((6, 4), name="a")[2:4] * 0.5)
    assert torch.equal(parameter[2:5], full_values((3, 4), name="b") * 2.0)
    assert not parameter[5].any()
    initialize_normal(parameter, seed=3, std=1.0)
    assert torch.equal(parameter[2:5], full_values((3, 4), name="b"))


def test_a_bf16_parameter_is_the_fp32_one_rounded_once():
    parameter = ShardedParameter(whole("w", (8, 8)), torch.bfloat16, CPU)
    initialize_normal(parameter, seed=3, std=0.02)
    assert torch.equal(parameter, (full_values((8, 8)) * 0.02).bfloat16())


def test_a_new_parameter_is_zero_trainable_and_has_no_sink():
    parameter = fused_parameter()
    assert not parameter.any() and parameter.requires_grad and parameter.sink is None
    assert isinstance(parameter, torch.nn.Parameter)
