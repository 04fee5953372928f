"""The checker rejects what is not a schedule, naming the offending action; and costs what is, as by hand."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parallel.pipeline.check import Costs, ScheduleError, check_schedule
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import SCHEDULES, Action, one_forward_one_backward

kinds = st.sampled_from(list(SCHEDULES.values()))


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


def draw_schedule(kind, data):
    """A schedule of the table in some size, with its placement and its number of micro-batches."""
    pp = data.draw(st.integers(2, 8))
    micro_batches = data.draw(st.integers(kind.min_micro_batches_per_rank * pp or 1, 20))
    placement = kind.placement(pp, data.draw(st.integers(kind.min_chunks, kind.max_chunks or 4)))
    return kind(placement, micro_batches), placement, micro_batches


@settings(max_examples=60, deadline=None)
@given(kinds, st.data())
def test_any_schedule_with_one_action_dropped_or_doubled_is_rejected(kind, data):
    schedule, placement, micro_batches = draw_schedule(kind, data)
    rank = data.draw(st.integers(0, placement.pp - 1))
    place = data.draw(st.integers(0, len(schedule[rank]) - 1))
    action = schedule[rank][place]
    doubled = [list(actions) for actions in schedule]
    doubled[rank].insert(data.draw(st.integers(place, len(schedule[rank]))), action)
    with pytest.raises(ScheduleError, match=rf"pp rank {rank}, action \d+ \({re.escape(str(action))}\): is there twice"):
        check_schedule(doubled, placement, micro_batches)
    del schedule[rank][place]
    pair = f"{action.micro_batch}" + (f".{action.chunk}" if action.chunk else "")
    named = rf"action \d+ \([BIW]{re.escape(pair)}\)|: micro-batch {action.micro_batch} of chunk {action.chunk} is not finished"
    with pytest.raises(ScheduleError, match=rf"pp rank {rank}(, )?({named})"):
        check_schedule(schedule, placement, micro_batches)


@settings(max_examples=60, deadline=None)
@given(kinds, st.data())
def test_any_schedule_with_two_passes_of_a_micro_batch_in_each_others_place_is_rejected(kind, data):
    schedule, placement, micro_batches = draw_schedule(kind, data)
    actions = schedule[data.draw(st.integers(0, placement.pp - 1))]
    before = data.draw(st.sampled_from([action for action in actions if action.kind in "FI"]))
    after = next(action for action in reversed(actions) if action[1:] == before[1:])
    first, second = actions.index(before), actions.index(after)
    actions[first], actions[second] = after, before
    with pytest.raises(ScheduleError, match=rf"action {first} \({re.escape(str(after))}\): runs before its "):
        check_schedule(schedule, placement, micro_batches)


@settings(max_examples=60, deadline=None)
@given(kinds, st.data())
def test_any_schedule_with_two_micro_batches_exchanged_on_one_rank_is_rejected(kind, data):
    """Complete, and each micro-batch's own passes are in order; but messages or gradients are not."""
    schedule, placement, micro_batches = draw_schedule(kind, data)
    assume(micro_batches > 1)
    rank = data.draw(st.integers(0, placement.pp - 1))
    first = data.draw(st.integers(0, micro_batches - 2))
    other = {first: first + 1, first + 1: first}
    schedule[rank] = [
        action._replace(micro_batch=other.get(action.micro_batch, action.micro_batch)) for action in schedule[rank]
    ]
    with pytest.raises(ScheduleError, match=r"pp rank \d+, action \d+ .* needs [FB]\d+ of stage"):
        check_schedule(schedule, placement, micro_batches)


@settings(deadline=None)
@given(st.integers(2, 12))
def test_ranks_that_wait_for_each_other_in_a_circle_are_all_named(pp):
    """The last rank wants F1 before it gives B0; every other rank wants B0 before it gives F1."""
    schedule = schedule_of(*["F0 B0 F1 B1"] * (pp - 1), "F0 F1 B0 B1")
    with pytest.raises(ScheduleError) as error:
        check_schedule(schedule, Placement(pp), 2)
    waits = [f"pp rank {rank} waits in B0" for rank in range(pp - 1)] + [f"pp rank {pp - 1} waits in F1"]
    assert str(error.value) == "deadlock: " + "; ".join(waits)


def test_gradients_in_another_order_are_rejected_with_the_action():
    """Valid otherwise; but sums in another order have other last bits."""
    with pytest.raises(
        ScheduleError, match=r"pp rank 1, action 4 \(W1\): adds to the gradients of chunk 0 before micro-batch 0"
    ):
        check_schedule(schedule_of("F0 F1 I0 I1 W0 W1", "F0 I0 F1 I1 W1 W0"), Placement(2), 2)
    with pytest.raises(
        ScheduleError, match=r"pp rank 0, action 2 \(B1\): adds to the gradients of chunk 0 before micro-batch 0"
    ):
        check_schedule(schedule_of("F0 F1 B1 B0"), Placement(1), 2)
    with pytest.raises(
        ScheduleError, match=r"pp rank 0, action 3 \(B1\): adds to the gradients of chunk 0 before micro-batch 0"
    ):
        check_schedule(schedule_of("F0 F1 I0 B1 W0"), Placement(1), 2)


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
    assert report.idle_seconds == [4.0, 0.0]


def test_costs_may_differ_from_stage_to_stage():
    """Rank 1 has stages 1 and 2 of a V; rank 0 waits for both."""
    costs = Costs(forward=[1.0, 2.0, 3.0, 4.0], backward=[8.0, 7.0, 6.0, 5.0])
    report = check_schedule(schedule_of(*["F0 F0.1 B0.1 B0"] * 2), Placement(2, 2, "v"), 1, costs)
    times = [[(start, end) for _, start, end in spans] for spans in report.spans]
    assert times == [[(0, 1), (6, 10), (10, 15), (28, 36)], [(1, 3), (3, 6), (15, 21), (21, 28)]]
    assert report.idle_seconds == [18, 9]
    with pytest.raises(AssertionError, match="3 costs for 2 stages"):
        check_schedule(schedule_of("F0 B0", "F0 B0"), Placement(2), 1, Costs(forward=[1.0, 1.0, 1.0]))


def test_a_receive_posted_late_and_a_lane_that_is_taken_delay_a_message():
    """F0 and F1 are made at 1 and 2 and travel for 4 s each, one after the other: F1 can't leave before F0 is there."""
    schedule, placement = schedule_of("F0 F1", "F0 F1"), Placement(2)

    def starts(receives_ahead):
        costs = Costs(send=4.0, receives_ahead=receives_ahead)
        return [start for _, start, _ in check_schedule(schedule, placement, 2, costs, backward=False).spans[1]]

    assert starts(1) == [5.0, 9.0]  # F1 leaves when F0 has arrived, while F0 runs
    assert starts(0) == [5.0, 10.0]  # F1's receive is posted after F0 has run


def test_blocking_sends_make_ranks_wait_for_their_messages():
    """Half a second per message: a rank that may go on overlaps it with the next forward pass."""
    schedule, placement = schedule_of("F0 F1 F2", "F0 F1 F2"), Placement(2)

    def ends(blocking_sends):
        costs = Costs(send=0.5, blocking_sends=blocking_sends)
        return [[end for *_, end in spans] for spans in check_schedule(schedule, placement, 3, costs, backward=False).spans]

    assert ends(False) == [[1.0, 2.0, 3.0], [2.5, 3.5, 4.5]]
    assert ends(True) == [[1.0, 2.5, 4.0], [2.5, 4.0, 5.5]]


def test_blocking_sends_make_ranks_wait_for_their_receivers():
    """Rank 1 is slow; rank 0 can't give F2 before rank 1 has come for F1, and posted the receive of F2."""
    costs = Costs(forward=[1.0, 10.0], blocking_sends=True)
    spans = check_schedule(schedule_of(*["F0 F1 F2 F3"] * 2), Placement(2), 4, costs, backward=False).spans
    assert [end for *_, end in spans[0]] == [1.0, 2.0, 3.0, 12.0]
    assert [end for *_, end in spans[1]] == [11.0, 21.0, 31.0, 41.0]


def test_blocking_sends_without_receives_posted_ahead_wait_in_a_circle():
    """Rank 0 offers F1 while rank 1 offers B0, and neither takes: the deadlock that Megatron's fused send-receive avoids."""
    schedule = one_forward_one_backward(Placement(2), 2)
    costs = Costs(receives_ahead=0)
    assert check_schedule(schedule, Placement(2), 2, costs).makespan_seconds == 9.0
    with pytest.raises(
        ScheduleError, match="deadlock: pp rank 0 waits to send what F1 made; pp rank 1 waits to send what B0 made"
    ):
        check_schedule(schedule, Placement(2), 2, replace(costs, blocking_sends=True))


def test_memory_is_the_activations_up_to_the_backward_pass_and_the_queue_up_to_w():
    """Two micro-batches of 10, of which an I leaves 3: 20, 13 + 10, ..."""
    costs = Costs(activation=10.0, queued=3.0)
    for actions, peak in (
        ("F0 F1 B0 B1", 20.0),
        ("F0 I0 W0 F1 I1 W1", 10.0),
        ("F0 I0 F1 I1 W0 W1", 13.0),
        ("F0 F1 I0 F2 I1 I2 W0 W1 W2", 23.0),
    ):
        assert check_schedule(schedule_of(actions), Placement(1), actions.count("F"), costs).peak_memory == [peak]
    per_stage = replace(costs, activation=[10.0, 1.0], queued=[3.0, 0.5])
    report = check_schedule(schedule_of("F0 F0.1 I0.1 I0 W0.1 W0"), Placement(1, 2), 1, per_stage)
    assert report.peak_memory == [11.0] and report.peak_activations == [2]


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
