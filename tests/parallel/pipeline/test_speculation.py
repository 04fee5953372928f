"""What a step can begin with before the weights are validated: closed, as long as can be, and nothing lost on the way."""

from collections import defaultdict

import pytest
from hypothesis import given, settings

from parallel.pipeline.layout import Placement
from parallel.pipeline.p2p import received, sent
from parallel.pipeline.schedules import SCHEDULES, Action
from parallel.pipeline.speculation import speculative_lengths, speculative_start
from tests.parallel.pipeline.test_schedules import cases


def runs_alone(schedule, placement, lengths):
    """Whether the first `lengths` actions of all ranks can all run; and the messages under way then, to each rank."""
    places = [0] * placement.pp
    under_way = defaultdict(dict)  # (a dict keeps the order of sending)
    going_on = True
    while going_on:
        going_on = False
        for rank, actions in enumerate(schedule):
            while places[rank] < lengths[rank]:
                action = actions[places[rank]]
                needed = received(action, rank, placement)
                if needed is not None and needed not in under_way[rank]:
                    break
                if needed is not None:
                    del under_way[rank][needed]
                made = sent(action, rank, placement)
                if made is not None:
                    under_way[made[1]][made[0]] = True
                places[rank] += 1
                going_on = True
    return places == lengths, under_way


def by_source(messages, placement):
    """Lane by lane, in order."""
    lanes = defaultdict(list)
    for message in messages:
        lanes[placement.rank(message.stage)].append(message)
    return lanes


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_cut_needs_nothing_behind_it_and_could_not_be_later(case):
    kind, placement, micro_batches = case
    schedule = kind(placement, micro_batches)
    lengths = speculative_lengths(schedule, placement)
    complete, under_way = runs_alone(schedule, placement, lengths)
    assert complete
    leading = [next(i for i, action in enumerate(actions) if action.kind != "F") for actions in schedule]
    assert all(short <= long for short, long in zip(lengths, leading, strict=True))
    assert runs_alone(schedule, placement, leading)[0] == (lengths == leading)
    for rank in {0, placement.pp // 2, placement.pp - 1}:
        start = speculative_start(schedule, placement, rank, lambda: True)
        assert start.length == lengths[rank]
        from_others = [message for message in under_way[rank] if placement.rank(message.stage) != rank]
        assert by_source(start.unread, placement) == by_source(from_others, placement)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("1f1b", [4, 3, 2, 1]), ("zb-h1", [4, 3, 2, 1]), ("zb-h2", [7, 5, 3, 1]), ("gpipe", [9, 9, 9, 9])],
)
def test_known_lengths(name, lengths):
    assert speculative_lengths(SCHEDULES[name](Placement(4), 9), Placement(4)) == lengths


def test_a_forward_pass_that_waits_for_one_behind_a_validation_is_not_speculative():
    """Rank 1's second forward pass needs one that rank 0 makes after its backward pass."""
    first = [Action("F", 0), Action("B", 0), Action("F", 1), Action("B", 1)]
    second = [Action("F", 0), Action("F", 1), Action("B", 0), Action("B", 1)]
    assert speculative_lengths([first, second], Placement(2)) == [1, 1]
