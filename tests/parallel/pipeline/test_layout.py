"""Placements of stages and splits of layers, on pipelines far beyond this machine."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError
from parallel.pipeline.layout import Placement, balance_layers, split_layers

placements = st.builds(Placement, st.integers(1, 128), st.integers(1, 8), st.sampled_from(["loop", "v"]))


@settings(deadline=None)
@given(placements)
def test_a_placement_and_its_inverse(placement):
    places = [(placement.rank(stage), placement.chunk(stage)) for stage in range(placement.num_stages)]
    assert len(set(places)) == placement.num_stages == placement.pp * placement.chunks
    for stage, (rank, chunk) in enumerate(places):
        assert 0 <= rank < placement.pp and 0 <= chunk < placement.chunks
        assert placement.stage(rank, chunk) == stage


@settings(deadline=None)
@given(placements)
def test_a_ranks_chunks_are_in_the_order_of_the_layers(placement):
    for rank in (0, placement.pp - 1):
        stages = [placement.stage(rank, chunk) for chunk in range(placement.chunks)]
        assert stages == sorted(stages)


@settings(deadline=None)
@given(st.integers(1, 128), st.integers(1, 8))
def test_a_loop_goes_around_and_a_v_turns(pp, chunks):
    loop, v = Placement(pp, chunks, "loop"), Placement(pp, chunks, "v")
    for stage in range(pp * chunks - 1):
        assert loop.rank(stage + 1) == (loop.rank(stage) + 1) % pp
        assert abs(v.rank(stage + 1) - v.rank(stage)) <= 1
        turns = (stage + 1) % pp == 0
        assert not turns or v.rank(stage + 1) == v.rank(stage)


def test_the_ends_where_a_tied_embedding_lives():
    assert Placement(4).embedding_ranks == (0, 3)
    assert Placement(4, 2, "loop").embedding_ranks == (0, 3)
    assert Placement(4, 2, "v").embedding_ranks == (0, 0)
    assert Placement(1, 3).embedding_ranks == (0, 0)


def test_a_placement_of_another_kind_is_refused():
    with pytest.raises(AssertionError, match="zigzag"):
        Placement(2, 2, "zigzag")


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 128))
def test_layers_split_evenly_with_the_remainder_in_the_middle(num_layers, num_stages):
    if num_layers < num_stages:
        return
    stages = split_layers(num_layers, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    counts = [len(stage) for stage in stages]
    assert len(counts) == num_stages and max(counts) - min(counts) <= 1
    longer = [stage for stage, count in enumerate(counts) if count > min(counts)]
    if longer:
        assert longer == list(range(longer[0], longer[-1] + 1))
        before, after = longer[0], num_stages - 1 - longer[-1]
        assert 0 <= after - before <= 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=64))
def test_the_wanted_numbers_of_layers_are_kept(counts):
    for wanted in (counts, tuple(counts)):
        stages = split_layers(sum(counts), len(counts), wanted)
        assert [len(stage) for stage in stages] == counts
        assert [layer for stage in stages for layer in stage] == list(range(sum(counts)))


def test_more_stages_than_layers_is_an_error_with_the_numbers():
    with pytest.raises(ConfigError) as error:
        split_layers(3, 4)
    assert str(error.value) == (
        "model.num_layers = 3 is less than the 4 pipeline stages (parallel.pp x parallel.chunks): "
        "set parallel.pp or parallel.chunks so that there are at most 3 stages"
    )


@pytest.mark.parametrize(("wanted", "count", "total"), [((2, 2), 2, 4), ((4, 4, 0), 3, 8), ((1, 2, 4), 3, 7)])
def test_wanted_numbers_that_do_not_fit_are_an_error_with_the_numbers(wanted, count, total):
    with pytest.raises(ConfigError) as error:
        split_layers(8, 3, wanted)
    assert str(error.value) == (
        f"parallel.layers_per_stage = {list(wanted)} must be 3 numbers of at least 1 (parallel.pp x parallel.chunks) "
        f"that sum to model.num_layers = 8; they are {count} and sum to {total}"
    )


def rank_costs(counts, placement, embedding, head):
    costs = [float(count) for count in counts]
    costs[0] += embedding
    costs[-1] += head
    return [sum(costs[placement.stage(rank, chunk)] for chunk in range(placement.chunks)) for rank in range(placement.pp)]


ends = st.integers(0, 12).map(lambda quarters: quarters / 4)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([(2, 1), (3, 1), (4, 1), (2, 2), (3, 2)]), st.sampled_from(["loop", "v"]), st.integers(0, 6), ends, ends)
def test_no_other_numbers_of_layers_make_the_slowest_rank_faster(sizes, kind, more, embedding, head):
    """Against every list of numbers there is."""
    placement = Placement(*sizes, kind)
    num_layers = placement.num_stages + more
    counts = balance_layers(num_layers, placement, embedding, head)
    assert sum(counts) == num_layers and min(counts) >= 1
    every = product(range(1, more + 2), repeat=placement.num_stages)
    best = min(max(rank_costs(one, placement, embedding, head)) for one in every if sum(one) == num_layers)
    assert max(rank_costs(counts, placement, embedding, head)) == best


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 8), st.sampled_from(["loop", "v"]), st.integers(0, 200), ends, ends)
def test_balanced_ranks_differ_by_less_than_a_layer_where_the_ends_leave_room(pp, chunks, kind, more, embedding, head):
    placement = Placement(pp, chunks, kind)
    counts = balance_layers(placement.num_stages + more, placement, embedding, head)
    assert min(counts) >= 1 and sum(counts) == placement.num_stages + more
    costs = rank_costs(counts, placement, embedding, head)
    grown = [cost for rank, cost in enumerate(costs) if any(counts[placement.stage(rank, c)] > 1 for c in range(chunks))]
    assert not grown or max(grown) - min(costs) <= 1.0


def test_the_first_and_last_stages_get_fewer_layers_by_what_the_embedding_and_the_head_cost():
    assert balance_layers(32, Placement(4)) == [8, 8, 8, 8]
    assert balance_layers(32, Placement(4), embedding=1.0, head=3.0) == [8, 9, 9, 6]
    assert balance_layers(32, Placement(4, 2, "v"), embedding=1.0, head=3.0) == [4, 5, 5, 5, 4, 4, 4, 1]


def test_numbers_that_count_the_ends_are_taken_as_wanted_numbers():
    counts = balance_layers(32, Placement(4), head=3.0)
    assert [len(stage) for stage in split_layers(32, 4, counts)] == counts
