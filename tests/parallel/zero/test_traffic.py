"""In which order buckets' messages start, and who waits for them."""

import math

from parallel.zero.traffic import Gathers, Reductions


class Noting:
    """Stands for a bucket: notes what is asked of it."""

    def __init__(self, name, events):
        self.name, self.events = name, events

    def __getattr__(self, asked):
        return lambda: self.events.append(f"{asked} {self.name}")


def buckets(count):
    events = []
    return [Noting(name, events) for name in "abcdefgh"[:count]], events


def of_kind(events, *kinds):
    return [event for event in events if event.startswith(kinds)]


def test_one_reduction_waits_behind_the_one_that_travels_and_the_oldest_is_waited_for():
    (a, b, c), events = buckets(3)
    reductions = Reductions(2)
    for bucket in (a, b, c):
        reductions.start(bucket)
    started = ["start_reduction a", "start_reduction b", "start_reduction c"]
    assert of_kind(events, "start_reduction", "wait") == [*started, "wait_reduction a"]
    reductions.finish()
    assert of_kind(events, "wait") == ["wait_reduction a", "wait_reduction b", "wait_reduction c"]


def test_without_a_limit_nobody_waits_before_the_end():
    (a, b, c), events = buckets(3)
    reductions = Reductions(math.inf)
    for bucket in (a, b, c):
        reductions.start(bucket)
    assert of_kind(events, "wait") == []
    reductions.finish()
    assert len(of_kind(events, "wait")) == 3


def test_a_limit_of_none_waits_at_once():
    (a, b), events = buckets(2)
    reductions = Reductions(0)
    for bucket in (a, b):
        reductions.start(bucket)
    assert events == ["start_reduction a", "wait_reduction a", "start_reduction b", "wait_reduction b"]


def test_shards_are_summed_over_their_copies_when_the_next_bucket_has_left():
    (a, b), events = buckets(2)
    reductions = Reductions(2)
    reductions.start(a)
    assert of_kind(events, "start_copies") == []
    reductions.start(b)
    assert events[-2:] == ["start_reduction b", "start_copies_sum a"]
    reductions.finish()
    assert events[-3:] == ["start_copies_sum b", "wait_reduction a", "wait_reduction b"]


def test_a_bucket_that_leaves_again_waits_for_its_last_reduction():
    (a, b), events = buckets(2)
    reductions = Reductions(2)
    for bucket in (a, b, a):
        reductions.start(bucket)
    order = ["start_reduction a", "start_reduction b", "wait_reduction a", "start_reduction a"]
    assert of_kind(events, "start_reduction", "wait") == order
    reductions.finish()
    assert of_kind(events, "wait")[1:] == ["wait_reduction b", "wait_reduction a"]


def test_gathers_start_two_ahead_once_each_and_all_of_them_at_the_end():
    (a, b, c, d, e), events = buckets(5)
    gathers = Gathers([a, b, c, d, e])
    gathers.wait_for(b)  # nothing is new yet
    assert of_kind(events, "start") == []
    gathers.start()
    assert of_kind(events, "start") == ["start_gather a", "start_gather b"]
    gathers.wait_for(a)
    assert events[-2:] == ["start_gather c", "wait_gather a"]
    gathers.wait_for(a)  # the next micro-batch
    gathers.wait_for(d)  # b and c are not used
    assert of_kind(events, "start") == [f"start_gather {name}" for name in "abcde"]
    gathers.finish()
    assert len(of_kind(events, "start")) == 5
    assert {"wait_gather b", "wait_gather c", "wait_gather e"} <= set(events)
