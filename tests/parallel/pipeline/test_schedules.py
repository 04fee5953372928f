"""Every schedule of the table, proved and costed by the checker over sizes far beyond this machine."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError
from parallel.pipeline.check import Costs, check_schedule
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import SCHEDULES, Action, forward_only, interleaved

kinds = st.sampled_from(list(SCHEDULES.values()))


@st.composite
def cases(draw):
    """(kind, placement, micro-batches): up to pp 64, 8 chunks and 512 micro-batches, with at most a few thousand actions."""
    kind = draw(kinds)
    pp = draw(st.integers(1, 64))
    chunks = draw(st.integers(kind.min_chunks, 8 if kind.max_chunks is None else kind.max_chunks))
    least = max(1, kind.min_micro_batches_per_rank * pp)
    micro_batches = draw(st.integers(least, max(least, min(512, 3000 // (pp * chunks)))))
    return kind, kind.placement(pp, chunks), micro_batches


def report_of(name, pp, micro_batches, chunks=None, costs=None):
    kind = SCHEDULES[name]
    placement = kind.placement(pp, chunks or kind.min_chunks)
    return check_schedule(kind(placement, micro_batches), placement, micro_batches, costs)


def bubble(report, micro_batches, chunks=1):
    """The papers' measure: the longest that a rank waits between its first and its last action; a stage's F, I and W take 1."""
    assert report.makespan_seconds >= 3 * micro_batches * chunks
    return max(report.idle_seconds)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2), st.booleans())
def test_every_schedule_is_valid_in_every_size(case, receives_ahead, whole_seconds):
    """Complete, ordered, in one order of gradients, and free of deadlock however few receives are posted ahead."""
    kind, placement, micro_batches = case
    costs = Costs(1.0, 2.0, 1.1, 0.7, send=1.0 if whole_seconds else 0.3, receives_ahead=receives_ahead)
    report = check_schedule(kind(placement, micro_batches), placement, micro_batches, costs)
    for spans in report.spans:
        split = [action for action, _, _ in spans if action.kind in "IW"]
        assert bool(split) == kind.splits_backward
        for part in ("F", "BI", "BW"):
            for chunk in range(placement.chunks):
                numbers = [action.micro_batch for action, _, _ in spans if action.kind in part and action.chunk == chunk]
                assert numbers == list(range(micro_batches))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["gpipe", "1f1b"]),
    st.integers(1, 64),
    st.integers(1, 30),
    st.builds(Costs, forward=st.integers(1, 5).map(float), backward=st.integers(1, 9).map(float)),
)
def test_gpipe_and_1f1b_have_the_bubble_of_the_paper(name, pp, micro_batches, costs):
    """(pp - 1) / (m + pp - 1) for stages of equal cost. Source: Narayanan et al. 2021, section 2.2."""
    report = report_of(name, pp, micro_batches, costs=costs)
    assert report.bubble == pytest.approx((pp - 1) / (micro_batches + pp - 1), abs=1e-9)
    assert report.makespan_seconds == (micro_batches + pp - 1) * (costs.forward + costs.backward)
    assert max(report.idle_seconds) == (pp - 1) * (costs.forward + costs.backward)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 32), st.integers(2, 8), st.integers(0, 40), st.integers(1, 4), st.integers(1, 6))
def test_interleaving_divides_the_bubble_by_the_chunks(pp, chunks, more, forward, backward):
    """(pp - 1)(F + B) of a chunk, also where groups don't divide the micro-batches. Narayanan et al. 2021, section 2.2."""
    micro_batches = pp + more % (2 * pp)
    costs = Costs(float(forward), float(backward))  # of one chunk
    report = report_of("interleaved", pp, micro_batches, chunks, costs)
    assert report.makespan_seconds == (micro_batches * chunks + pp - 1) * (forward + backward)
    longest_group = -(-micro_batches // (micro_batches // pp))
    assert max(report.peak_activations) == min(2 * pp - 1 + (chunks - 1) * longest_group, micro_batches * chunks)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(2, 4), st.integers(1, 40), st.data())
def test_interleaving_in_larger_groups_is_valid_and_no_slower(pp, chunks, micro_batches, data):
    placement = Placement(pp, chunks)
    size = data.draw(st.integers(pp, 2 * pp + 2))
    report = check_schedule(interleaved(placement, micro_batches, size), placement, micro_batches)
    assert report.makespan_seconds <= report_of("interleaved", pp, micro_batches, chunks).makespan_seconds


def test_a_group_smaller_than_the_pipeline_is_an_error_with_the_numbers():
    with pytest.raises(
        ConfigError, match="group size 3 of parallel.schedule = interleaved is below parallel.pp = 4: set it to 4"
    ):
        interleaved(Placement(4, 2), 8, 3)


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("times", [2, 3, 4])
def test_zero_bubble_schedules_have_the_bubble_and_memory_of_their_papers(pp, times):
    """For F = I = W, memory counted until W.

    ZB-H1: (pp - 1)(F + I - W) and pp. ZB-H2: (pp - 1)(F + I - 2 W) and 2 pp - 1. Source: Qi et al. 2023.
    ZB-V: 0 and pp micro-batches, which are 2 pp of chunks. Source: the same (arXiv 2401.10241).
    """
    micro_batches = times * pp
    h1, h2, v = (report_of(name, pp, micro_batches) for name in ("zb-h1", "zb-h2", "zb-v"))
    assert (bubble(h1, micro_batches), max(h1.peak_memory)) == (pp - 1, pp)
    assert (bubble(h2, micro_batches), max(h2.peak_memory)) == (0, 2 * pp - 1)
    assert (bubble(v, micro_batches, 2), max(v.peak_memory)) == (0, 2 * pp)
    for report, chunks in ((h1, 1), (h2, 1), (v, 2)):  # and none can end earlier: the last rank starts pp - 1 units late
        assert report.makespan_seconds == 3 * micro_batches * chunks + pp - 1


@pytest.mark.parametrize("pp", range(3, 25))
def test_v_half_and_v_min_trade_memory_for_bubble_as_their_paper_says(pp):
    """In units of 1F1B's bubble, 6 (pp - 1) of a chunk's F = I = W: about a half and two thirds; in micro-batches at most
    (pp + 2) // 2 and (pp + 4) // 3. Source: Qi et al. 2024 (arXiv 2405.15362).
    """
    micro_batches = 2 * pp
    half, least = report_of("v-half", pp, micro_batches), report_of("v-min", pp, micro_batches)
    assert bubble(half, micro_batches, 2) == 3 * pp - 4
    assert bubble(least, micro_batches, 2) == (4 * pp - 5 if pp % 3 else 4 * pp - 3)
    assert half.peak_memory == [2 * ((pp + 2) // 2)] * pp
    assert max(least.peak_memory) == 2 * ((pp + 4) // 3)


@pytest.mark.parametrize("pp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("more", [0, 1, 20])
def test_dualpipe_v_has_no_more_bubble_and_memory_than_its_source_says(pp, more):
    """(pp - 1)(F&B + B - 3 W) = 2 (pp - 1) where a pair F&B is one piece; a pair of two pieces saves half of it.

    2 pp + 1 chunk activations. Source: the table of DualPipe's repository (its PP counts stages, two per rank).
    """
    micro_batches = 2 * pp + more
    report = report_of("dualpipe-v", pp, micro_batches)
    assert bubble(report, micro_batches, 2) == pp - 1
    assert max(report.peak_memory) == 2 * pp + 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 64), st.integers(1, 30))
def test_1f1b_keeps_no_more_activations_than_stages_behind_it_and_gpipe_all(pp, micro_batches):
    assert report_of("1f1b", pp, micro_batches).peak_activations == [min(pp - r, micro_batches) for r in range(pp)]
    assert report_of("gpipe", pp, micro_batches).peak_activations == [micro_batches] * pp


@settings(max_examples=30, deadline=None)
@given(cases())
def test_the_memory_that_schedules_promise_holds_for_any_number_of_micro_batches(case):
    kind, placement, micro_batches = case
    pp = placement.pp
    promised = {
        "1f1b": pp,
        "zb-h1": pp,
        "zb-h2": 2 * pp - 1,
        "zb-v": 2 * pp,
        "v-half": 2 * ((pp + 2) // 2),
        "v-min": 2 * ((pp + 4) // 3),
        "dualpipe-v": 2 * pp + 1,
    }
    assume(kind.name in promised)
    report = check_schedule(kind(placement, micro_batches), placement, micro_batches)
    assert max(report.peak_memory) <= promised[kind.name]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 32), st.sampled_from(["loop", "v"]))
def test_forward_passes_alone_run_in_any_placement(pp, chunks, micro_batches, kind):
    placement = Placement(pp, chunks, kind)
    report = check_schedule(forward_only(placement, micro_batches), placement, micro_batches, backward=False)
    assert all(len(spans) == chunks * micro_batches for spans in report.spans)


def test_pp_64_with_4_chunks_and_512_micro_batches():
    report = report_of("interleaved", 64, 512, chunks=4)
    assert sum(map(len, report.spans)) == 2 * 64 * 4 * 512
    assert max(report.idle_seconds) == 63 * (1.0 + 2.0)


BY_HAND = {
    ("1f1b", 3, 1, 4): ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"],
    ("interleaved", 2, 2, 4): [
        "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3",
        "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3",
    ],
    ("zb-h1", 2, 1, 4): ["F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 I3 W3", "F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 W3"],
    ("zb-h2", 2, 1, 4): ["F0 F1 F2 I0 W0 F3 I1 I2 W1 W2 I3 W3", "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"],
    ("dualpipe-v", 2, 2, 4): [
        "F0 F1 F2 F0.1 I0.1 W0.1 F1.1 F3 B1.1 F2.1 B0 B2.1 F3.1 B1 B3.1 I2 W2 I3 W3",
        "F0 F0.1 F1 F1.1 F2 B0.1 F2.1 B0 F3 B1.1 F3.1 B1 B2.1 B2 I3.1 I3 W3.1 W3",
    ],
}


@pytest.mark.parametrize("case", BY_HAND, ids=lambda case: case[0])
def test_small_schedules_are_those_worked_out_by_hand(case):
    name, pp, chunks, micro_batches = case
    kind = SCHEDULES[name]
    assert [" ".join(map(str, actions)) for actions in kind(kind.placement(pp, chunks), micro_batches)] == BY_HAND[case]


def test_an_action_prints_its_chunk_where_it_is_not_the_first():
    assert [str(Action("F", 3)), str(Action("B", 12, 2))] == ["F3", "B12.2"]


@pytest.mark.parametrize("kind", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_placement_of_another_kind_is_refused(kind):
    chunks = kind.min_chunks
    wrong = Placement(2, chunks, {"loop": "v", "v": "loop"}[kind.placement_kind]) if chunks > 1 else Placement(2, 2)
    with pytest.raises(AssertionError, match=kind.name):
        kind(wrong, 4)


CANNOT_RUN = {
    ("zb-v", 4, 3, 8): "parallel.schedule = zb-v cannot have parallel.chunks = 3: set --parallel.chunks to 2, or "
    "--parallel.schedule to interleaved",
    ("interleaved", 4, 1, 8): "parallel.schedule = interleaved cannot have parallel.chunks = 1: set --parallel.chunks to 2, or "
    "--parallel.schedule to gpipe or 1f1b or zb-h1 or zb-h2",
    ("1f1b", 4, 2, 7): "parallel.schedule = 1f1b cannot have parallel.chunks = 2: set --parallel.chunks to 1, or "
    "--parallel.schedule to interleaved or zb-v or v-half or v-min",
    ("dualpipe-v", 4, 2, 7): "parallel.schedule = dualpipe-v with parallel.pp = 4 needs 8 micro-batches, and "
    "train.global_batch_size = 42 makes 7: set --train.global_batch_size to 48, or --parallel.schedule to interleaved or zb-v "
    "or v-half or v-min",
}


@pytest.mark.parametrize("case", CANNOT_RUN, ids=lambda case: f"{case[0]}-{case[2]}-chunks")
def test_sizes_that_cannot_run_are_an_error_with_the_nearest_that_can(case):
    name, pp, chunks, micro_batches = case
    with pytest.raises(ConfigError) as error:
        SCHEDULES[name].validate(pp, chunks, micro_batches, samples_per_micro_batch=6)
    assert str(error.value) == CANNOT_RUN[case]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_sizes_that_can_run_are_no_error(case):
    kind, placement, micro_batches = case
    kind.validate(placement.pp, placement.chunks, micro_batches)
    assert kind.allows(placement.pp, placement.chunks, micro_batches)
