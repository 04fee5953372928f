"""The planner's waiting times and held micro-batches beside the schedules' own action lists, simulated."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.plan.bubble import WARM, bubble_seconds, held_micro_batches, idle_micro_batches
from megatron_llama.plan.rows import job_of, read_rows
from parallel.pipeline.check import check_schedule
from parallel.pipeline.costs import Costs
from parallel.pipeline.schedules import SCHEDULES


def layout_of(schedule, pp, chunks, micro_batches):
    layout = job_of(read_rows()[0]).layout
    return replace(layout, schedule=schedule, pp=pp, chunks=chunks, micro_batches=micro_batches)


def simulated(schedule, pp, chunks, micro_batches, seconds):
    """The report of the real lists where rank r takes seconds[r] for a micro-batch: a third forward, two thirds backward."""
    kind = SCHEDULES[schedule]
    placement = kind.placement(pp, chunks)
    third = [seconds[placement.rank(stage)] / (3 * chunks) for stage in range(placement.num_stages)]
    costs = Costs(third, [2 * one for one in third], third, third, activation=1 / chunks, queued=1 / chunks)
    return check_schedule(kind(placement, micro_batches), placement, micro_batches, costs)


@given(st.integers(2, 8), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_formulas_are_the_makespan_of_equal_ranks(pp, chunks, groups):
    schedule = "1f1b" if chunks == 1 else "interleaved"
    micro_batches = groups * pp
    report = simulated(schedule, pp, chunks, micro_batches, [3.0] * pp)
    expected = 3.0 * micro_batches + bubble_seconds(layout_of(schedule, pp, chunks, micro_batches), [3.0] * pp)
    assert report.makespan_seconds == pytest.approx(expected)


@given(st.integers(2, 8), st.integers(1, 20), st.floats(1.0, 2.0))
@settings(max_examples=15, deadline=None)
def test_a_slow_last_rank(pp, micro_batches, slow):
    """The rank with the head sets the pace; the others fill and empty the pipeline once."""
    seconds = [1.0] * (pp - 1) + [slow]
    report = simulated("1f1b", pp, 1, micro_batches, seconds)
    expected = slow * micro_batches + bubble_seconds(layout_of("1f1b", pp, 1, micro_batches), seconds)
    assert report.makespan_seconds == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1", "zb-v", "v-half", "v-min"])
@pytest.mark.parametrize("rest", [0, 1, 3])
def test_waiting_does_not_grow_beyond_the_warm_micro_batches(schedule, rest):
    """So that a thousand micro-batches are costed by a few."""
    pp, chunks = 4, 1 if SCHEDULES[schedule].max_chunks == 1 else 2
    few, many = WARM * pp + rest, 7 * WARM * pp + rest
    waits = [simulated(schedule, pp, chunks, count, [1.0] * pp).makespan_seconds - count for count in (few, many)]
    assert waits[0] == pytest.approx(waits[1])
    assert idle_micro_batches(schedule, pp, chunks, many) == pytest.approx(waits[1])


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "v-half"])
@pytest.mark.parametrize("micro_batches", [4, 12, 40])
def test_held_micro_batches_are_those_of_the_lists(schedule, micro_batches):
    pp, chunks = 4, 1 if SCHEDULES[schedule].max_chunks == 1 else 2
    report = simulated(schedule, pp, chunks, micro_batches, [1.0] * pp)
    assert held_micro_batches(schedule, pp, chunks, micro_batches) == pytest.approx(report.peak_memory)


def test_one_rank_waits_for_nobody():
    assert bubble_seconds(layout_of("1f1b", 1, 1, 8), [1.0]) == 0.0
