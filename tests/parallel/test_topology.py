"""The rank grid, on worlds far beyond this machine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.topology import AXES, Coordinates, Topology


@st.composite
def topologies(draw):
    """Grids of up to 8192 ranks."""
    sizes, left = {}, 8192
    for axis in draw(st.permutations(AXES)):
        sizes[axis] = draw(st.integers(1, min(left, 64)))
        left //= sizes[axis]
    return Topology(**sizes)


axis_sets = st.lists(st.sampled_from(AXES), min_size=1, unique=True)


@settings(max_examples=60, deadline=None)
@given(topologies(), axis_sets)
def test_groups_partition_the_world_and_differ_only_along_their_axes(topology, axes):
    groups = topology.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    size = int(np.prod([getattr(topology, axis) for axis in axes]))
    for group in groups[:: max(len(groups) // 20, 1)]:
        assert len(group) == size and list(group) == sorted(group)
        places = [topology.coordinates(rank) for rank in group[:: max(size // 20, 1)]]
        for kept in set(AXES) - set(axes):
            assert len({getattr(place, kept) for place in places}) == 1


@settings(max_examples=60, deadline=None)
@given(topologies(), axis_sets, st.randoms(use_true_random=False))
def test_the_order_in_which_axes_are_named_does_not_matter(topology, axes, random):
    shuffled = random.sample(axes, len(axes))
    assert topology.groups(*axes) == topology.groups(*shuffled)


@settings(max_examples=60, deadline=None)
@given(topologies(), st.data())
def test_coordinates_and_rank_are_inverse(topology, data):
    rank = data.draw(st.integers(0, topology.world_size - 1))
    place = topology.coordinates(rank)
    assert topology.rank(place) == rank
    assert rank == ((place.pp * topology.dp + place.dp) * topology.cp + place.cp) * topology.tp + place.tp


@settings(max_examples=60, deadline=None)
@given(topologies())
def test_ranks_of_a_tensor_group_are_neighbours(topology):
    """So that tp, whose collectives are the most frequent, stays on a node."""
    for group in topology.groups("tp"):
        assert group == tuple(range(group[0], group[0] + topology.tp))


@settings(max_examples=60, deadline=None)
@given(topologies(), st.sampled_from(AXES), st.data())
def test_subgroups_cut_each_group_into_consecutive_runs(topology, axis, data):
    length = getattr(topology, axis)
    size = data.draw(st.sampled_from([n for n in range(1, length + 1) if length % n == 0]))
    runs = topology.subgroups(axis, size)
    assert all(len(run) == size for run in runs)
    per_group = length // size
    joined = [sum(runs[i : i + per_group], ()) for i in range(0, len(runs), per_group)]
    assert joined == topology.groups(axis)


def test_the_grid_of_eight_ranks_in_full():
    topology = Topology(pp=2, dp=2, tp=2)
    assert topology.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert topology.groups("dp") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert topology.groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert topology.groups("dp", "cp") == topology.groups("dp")
    assert topology.groups("dp", "tp") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert topology.coordinates(6) == Coordinates(pp=1, dp=1, cp=0, tp=0)
    assert str(topology) == "pp 2 x dp 2 x cp 1 x tp 2 = 8 ranks"


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_off_the_grid_has_no_place(rank):
    with pytest.raises(AssertionError, match="is not on a grid of 8"):
        Topology(dp=8).coordinates(rank)
