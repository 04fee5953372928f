"""The chooser against the costs of all schedules, one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError
from parallel.pipeline.check import check_schedule
from parallel.pipeline.choice import candidates, choose_schedule, require_fit
from parallel.pipeline.costs import Costs
from parallel.pipeline.schedules import SCHEDULES


def one_rank(forward, input_backward, weight_backward, send=0.0):
    """Costs of a rank, shared by its chunks: the same model in every placement."""

    def costs_of(placement):
        share = 1 / placement.chunks
        backward = input_backward + weight_backward
        seconds = [value * share for value in (forward, backward, input_backward, weight_backward)]
        return Costs(*seconds, send=send, activation=share, queued=share / 2)

    return costs_of


seconds = st.sampled_from([0.5, 1.0, 1.5, 2.0])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 14), st.integers(1, 14), seconds, seconds, seconds, st.sampled_from([0.0, 0.2]))
def test_no_schedule_that_fits_is_faster_than_the_chosen_one(pp, micro_batches, memory, forward, back, weight, send):
    costs_of = one_rank(forward, back, weight, send)
    found = candidates(pp, micro_batches, (1, 2, 3), costs_of)
    fitting = []
    for kind in SCHEDULES.values():
        for chunks in (1, 2, 3):
            if kind.allows(pp, chunks, micro_batches):
                placement = kind.placement(pp, chunks)
                report = check_schedule(kind(placement, micro_batches), placement, micro_batches, costs_of(placement))
                if max(report.peak_memory) <= memory:
                    fitting.append(report.makespan_seconds)
    limits = [float(memory)] * pp
    if not fitting:
        with pytest.raises(ConfigError, match="parallel.schedule = auto: no schedule fits the memory"):
            choose_schedule(found, limits)
        return
    chosen = choose_schedule(found, limits)
    assert chosen.report.makespan_seconds == pytest.approx(min(fitting), rel=1e-9)
    assert chosen.fits(limits)


@pytest.mark.parametrize(("memory", "name"), [(100.0, "zb-v"), (8.0, "zb-v"), (7.9, "v-half"), (5.0, "v-half"), (4.0, "v-min")])
def test_less_memory_chooses_a_slower_schedule(memory, name):
    """Memory counted until W: ZB-V and ZB-H2 end at the same time, and ZB-V needs less."""
    costs_of = one_rank(1.0, 1.0, 1.0)
    found = candidates(8, 16, (1, 2), lambda placement: full_queue(costs_of(placement)))
    assert choose_schedule(found, [memory] * 8).kind.name == name


def full_queue(costs):
    return Costs(**{**vars(costs), "queued": costs.activation})


def test_no_room_is_an_error_with_the_least_that_is_needed():
    found = candidates(8, 16, (1, 2), lambda placement: full_queue(one_rank(1.0, 1.0, 1.0)(placement)))
    with pytest.raises(ConfigError) as error:
        choose_schedule(found, [9.0, 3.5] + [9.0] * 6, "GiB")
    assert str(error.value) == (
        "parallel.schedule = auto: no schedule fits the memory for activations. v-min with parallel.chunks = 2 needs 4 GiB on "
        "pp rank 1, where 3.5 are free, and the others need more: set --parallel.recompute, lower --train.micro_batch_size or "
        "raise --parallel.pp"
    )


def test_a_wanted_schedule_that_does_not_fit_is_an_error_with_the_fastest_that_does():
    found = candidates(8, 16, (1, 2), one_rank(1.0, 1.0, 1.0))
    wanted = next(candidate for candidate in found if candidate.kind.name == "gpipe")
    with pytest.raises(ConfigError) as error:
        require_fit(wanted, found, [8.0] * 8)
    assert str(error.value) == (
        "parallel.schedule = gpipe: gpipe with parallel.chunks = 1 needs 16 activations on pp rank 0, where 8 are free; "
        "set --parallel.schedule to zb-v with --parallel.chunks 2"
    )
    require_fit(wanted, found, [16.0] * 8)
