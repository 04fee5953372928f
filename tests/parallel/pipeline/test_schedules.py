"""Every schedule of the table, proved and costed by the checker over sizes far beyond this machine."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.check import Costs, check_schedule
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import SCHEDULES, Action, forward_only, gpipe, one_forward_one_backward


@st.composite
def sizes(draw):
    """(pp, micro-batches): up to 64 and 512, with at most a few thousand actions."""
    pp = draw(st.integers(1, 64))
    return pp, draw(st.integers(1, min(512, 2000 // pp)))


costs = st.builds(Costs, forward=st.integers(1, 5).map(float), backward=st.integers(1, 9).map(float))


@settings(max_examples=25, deadline=None)
@given(sizes(), st.sampled_from(sorted(SCHEDULES)), costs)
def test_every_schedule_is_valid_and_has_the_bubble_of_its_paper(case, name, costs):
    """(pp - 1) / (m + pp - 1) for stages of equal cost. Source: Narayanan et al. 2021, section 2.2."""
    pp, micro_batches = case
    report = check_schedule(SCHEDULES[name](Placement(pp), micro_batches), Placement(pp), micro_batches, costs)
    expected = (pp - 1) / (micro_batches + pp - 1)
    assert report.bubble == pytest.approx(expected, abs=1e-9)
    assert report.makespan_seconds == (micro_batches + pp - 1) * (costs.forward + costs.backward)


@settings(max_examples=25, deadline=None)
@given(sizes())
def test_1f1b_keeps_no_more_activations_than_stages_behind_it(case):
    pp, micro_batches = case
    report = check_schedule(one_forward_one_backward(Placement(pp), micro_batches), Placement(pp), micro_batches)
    assert report.peak_activations == [min(pp - rank, micro_batches) for rank in range(pp)]


@settings(max_examples=20, deadline=None)
@given(sizes())
def test_gpipe_keeps_them_all(case):
    pp, micro_batches = case
    report = check_schedule(gpipe(Placement(pp), micro_batches), Placement(pp), micro_batches)
    assert report.peak_activations == [micro_batches] * pp


@settings(max_examples=25, deadline=None)
@given(sizes(), st.sampled_from(sorted(SCHEDULES)))
def test_backward_passes_run_in_the_order_of_the_micro_batches(case, name):
    """So that gradients add up in the same order in every schedule, and pipelining changes no bit."""
    pp, micro_batches = case
    for actions in SCHEDULES[name](Placement(pp), micro_batches):
        for kind in "FB":
            assert [action.micro_batch for action in actions if action.kind == kind] == list(range(micro_batches))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 32), st.sampled_from(["loop", "v"]))
def test_forward_passes_alone_run_in_any_placement(pp, chunks, micro_batches, kind):
    placement = Placement(pp, chunks, kind)
    report = check_schedule(forward_only(placement, micro_batches), placement, micro_batches, backward=False)
    assert all(len(spans) == chunks * micro_batches for spans in report.spans)


def test_1f1b_of_three_stages_and_four_micro_batches_as_the_paper_draws_it():
    lists = [" ".join(map(str, actions)) for actions in one_forward_one_backward(Placement(3), 4)]
    assert lists == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]


def test_an_action_prints_its_chunk_where_it_is_not_the_first():
    assert [str(Action("F", 3)), str(Action("B", 12, 2))] == ["F3", "B12.2"]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_one_chunk_per_rank(schedule):
    with pytest.raises(AssertionError, match="one chunk per rank"):
        schedule(Placement(2, 2), 4)
