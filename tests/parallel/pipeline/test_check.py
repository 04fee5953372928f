"""The checker rejects what is not a schedule, naming the offending action; and costs what is, as by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.check import Costs, ScheduleError, check_schedule
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import SCHEDULES, Action, one_forward_one_backward


def schedule_of(*lists):
    """`schedule_of("F0 B0", "F0.1 B0.1")`: one list of actions per rank."""

    def action(text):
        micro_batch, _, chunk = text[1:].partition(".")
        return Action(text[0], int(micro_batch), int(chunk or 0))

    return [[action(text) for text in actions.split()] for actions in lists]


WRONG = {
    "a list missing": (["F0 B0 F1 B1"], "the schedule has 1 lists for 2 pp ranks"),
    "F dropped": (["F0 B0 F1 B1", "F0 B0 B1"], r"pp rank 1, action 2 \(B1\): runs before its forward pass"),
    "B dropped": (["F0 F1 B0 B1", "F0 B0 F1"], "pp rank 1: micro-batch 1 of chunk 0 is not finished"),
    "F and B dropped": (["F0 B0", "F0 B0 F1 B1"], "pp rank 0: micro-batch 1 of chunk 0 is not finished"),
    "F twice": (["F0 F1 F0 B0 B1", "F0 B0 F1 B1"], r"pp rank 0, action 2 \(F0\): is there twice"),
    "B twice": (["F0 F1 B0 B0 B1", "F0 B0 F1 B1"], r"pp rank 0, action 3 \(B0\): is there twice"),
    "B before F": (["B0 F0 F1 B1", "F0 B0 F1 B1"], r"pp rank 0, action 0 \(B0\): runs before its forward pass"),
    "another chunk": (["F0 F1 B0 B1", "F0 B0 F1.1"], r"pp rank 1, action 2 \(F1.1\): there are 2 micro-batches and 1 chunks"),
    "another micro-batch": (["F0 F1 B0 B1 F2", "F0 B0 F1 B1"], r"pp rank 0, action 4 \(F2\): there are 2 micro-batches"),
    "another kind": (["F0 X0", "F0 B0"], r"pp rank 0, action 1 \(X0\): there is no kind 'X'"),
    "B and I": (["F0 F1 B0 I0 B1", "F0 B0 F1 B1"], r"pp rank 0, action 3 \(I0\): the backward pass has run already"),
    "W after B": (["F0 F1 B0 W0 B1", "F0 B0 F1 B1"], r"pp rank 0, action 3 \(W0\): runs before its I"),
    "W before I": (["F0 F1 W0 I0 B1", "F0 B0 F1 B1"], r"pp rank 0, action 2 \(W0\): runs before its I"),
    "I without W": (["F0 F1 I0 B1", "F0 B0 F1 B1"], "pp rank 0: micro-batch 0 of chunk 0 is not finished"),
    "cyclic wait": (["F0 B0 F1 B1", "F0 F1 B0 B1"], "deadlock: pp rank 0 waits in B0; pp rank 1 waits in F1"),
    "F in another order": (["F0 F1 B0 B1", "F1 B1 F0 B0"], r"pp rank 0, action 2 \(B0\): needs B0 .* from pp rank 1 is B1"),
    "B in another order": (
        ["F0 F1 B1 B0", "F0 B0 F1 B1"],
        r"pp rank 0, action 2 \(B1\): needs B1 of stage 1, .* is B0 of stage 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_a_schedule_is_rejected_with_the_action(name):
    lists, message = WRONG[name]
    with pytest.raises(ScheduleError, match=message):
        check_schedule(schedule_of(*lists), Placement(2), 2)


def test_activations_in_another_order_are_rejected_with_the_action():
    """Nothing here waits in a circle, but NCCL would hand F0's activation to F1."""
    with pytest.raises(ScheduleError, match=r"pp rank 1, action 0 \(F1\): needs F1 of stage 0, .* pp rank 0 is F0 of stage 0"):
        check_schedule(schedule_of("F0 F1", "F1 F0"), Placement(2), 2, backward=False)


def test_a_backward_pass_among_forward_passes_alone_is_rejected():
    with pytest.raises(ScheduleError, match=r"pp rank 0, action 1 \(B0\): only forward passes are wanted"):
        check_schedule(schedule_of("F0 B0", "F0 B0"), Placement(2), 1, backward=False)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 16), st.integers(1, 24), st.data())
def test_any_schedule_with_one_action_dropped_or_doubled_is_rejected(name, pp, micro_batches, data):
    schedule = SCHEDULES[name](Placement(pp), micro_batches)
    rank = data.draw(st.integers(0, pp - 1))
    place = data.draw(st.integers(0, len(schedule[rank]) - 1))
    action = schedule[rank][place]
    doubled = [list(actions) for actions in schedule]
    doubled[rank].insert(data.draw(st.integers(place, len(schedule[rank]))), action)
    with pytest.raises(ScheduleError, match=rf"pp rank {rank}, action \d+ \({action}\): is there twice"):
        check_schedule(doubled, Placement(pp), micro_batches)
    del schedule[rank][place]
    with pytest.raises(ScheduleError, match=rf"pp rank {rank}(, action \d+ \(B{action.micro_batch}\)|: micro-batch)"):
        check_schedule(schedule, Placement(pp), micro_batches)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 16), st.integers(1, 24), st.data())
def test_any_schedule_with_a_forward_pass_behind_its_backward_pass_is_rejected(name, pp, micro_batches, data):
    schedule = SCHEDULES[name](Placement(pp), micro_batches)
    actions = schedule[data.draw(st.integers(0, pp - 1))]
    batch = data.draw(st.integers(0, micro_batches - 1))
    forward, backward = actions.index(Action("F", batch)), actions.index(Action("B", batch))
    actions[forward], actions[backward] = actions[backward], actions[forward]
    with pytest.raises(ScheduleError, match=rf"action {forward} \(B{batch}\): runs before its forward pass"):
        check_schedule(schedule, Placement(pp), micro_batches)


@given(st.integers(2, 12))
def test_ranks_that_wait_for_each_other_in_a_circle_are_all_named(pp):
    """The last rank wants F1 before it gives B0; every other rank wants B0 before it gives F1."""
    schedule = schedule_of(*["F0 B0 F1 B1"] * (pp - 1), "F0 F1 B0 B1")
    with pytest.raises(ScheduleError) as error:
        check_schedule(schedule, Placement(pp), 2)
    waits = [f"pp rank {rank} waits in B0" for rank in range(pp - 1)] + [f"pp rank {pp - 1} waits in F1"]
    assert str(error.value) == "deadlock: " + "; ".join(waits)


def test_spans_makespan_and_bubble_by_hand():
    """Two stages, two micro-batches, forward 1 s, backward 2 s, half a second to send."""
    schedule = one_forward_one_backward(Placement(2), 2)
    report = check_schedule(schedule, Placement(2), 2, Costs(forward=1.0, backward=2.0, send=0.5))
    times = [[(str(action), start, end) for action, start, end in spans] for spans in report.spans]
    assert times == [
        [("F0", 0.0, 1.0), ("F1", 1.0, 2.0), ("B0", 5.0, 7.0), ("B1", 8.0, 10.0)],
        [("F0", 1.5, 2.5), ("B0", 2.5, 4.5), ("F1", 4.5, 5.5), ("B1", 5.5, 7.5)],
    ]
    assert report.makespan_seconds == 10.0
    assert report.bubble == pytest.approx(1 - 12 / 20)
    assert report.peak_activations == [2, 1]


def test_a_split_backward_frees_the_activations_at_i_and_costs_both_parts():
    schedule = schedule_of("F0 I0 F1 I1 W0 W1")
    report = check_schedule(schedule, Placement(1), 2, Costs(forward=1.0, input_backward=2.0, weight_backward=4.0))
    assert report.peak_activations == [1] and report.makespan_seconds == 14.0 and report.bubble == 0.0


def test_the_input_gradient_alone_lets_the_stage_before_go_on():
    report = check_schedule(schedule_of("F0 B0", "F0 I0 W0"), Placement(2), 1, Costs(1.0, 2.0, 1.0, 5.0))
    assert report.spans[0][1][1:] == (3.0, 5.0)


@pytest.mark.parametrize(("kind", "start"), [("loop", 3.0), ("v", 2.5)])
def test_an_edge_inside_a_rank_sends_nothing(kind, start):
    """Stage 2 is on rank 0 in a loop, and on rank 1, which has stage 1 too, in a V."""
    placement = Placement(2, 2, kind)
    report = check_schedule(schedule_of("F0 F0.1", "F0 F0.1"), placement, 1, Costs(send=0.5), backward=False)
    _, stage_2_start, _ = report.spans[placement.rank(2)][1]
    assert stage_2_start == start
