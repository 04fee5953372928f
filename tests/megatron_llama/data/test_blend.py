from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.data.blend import Blend, build_blend, integer_weights, period_table
from megatron_llama.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_llama.data.samples import Source
from parallel.errors import ConfigError, DataError


def write(prefix, tokens, dtype=np.uint16):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        writer.add_document(tokens)
    return str(prefix)


@pytest.fixture
def prefixes(tmp_path):
    """Two datasets of 40 and 20 windows of 10; tokens of the second begin at 1000."""
    return write(tmp_path / "a", np.arange(401)), write(tmp_path / "b", 1000 + np.arange(201))


@pytest.mark.parametrize(
    ("weights", "integers"),
    [
        ([0.7, 0.3], [7, 3]),
        ([70, 30], [7, 3]),
        ([5], [1]),
        ([0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02], [134, 30, 9, 9, 9, 5, 4]),  # LLaMA, table 1
        ([1e-6, 1 - 1e-6], [1, 999_999]),
    ],
)
def test_weights_are_taken_as_written(weights, integers):
    assert integer_weights(weights) == integers


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.floats(1e-3, 1e3), st.integers(1, 10**12)), min_size=1, max_size=20))
def test_weights_are_bounded_and_close(weights):
    integers = integer_weights(weights)
    assert sum(integers) <= 10**6 and min(integers) >= 1 and np.gcd.reduce(integers) == 1
    total = sum(map(Fraction, weights))
    for weight, integer in zip(weights, integers, strict=True):
        share = float(Fraction(weight) / total)
        # below 0.1 % where the limit allows, else within the entry or so that rounding up to 1 costs
        assert abs(integer / sum(integers) - share) <= 0.001 * share + 20e-6


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_impossible_weights(weight):
    with pytest.raises(ConfigError, match="data.train: weight .* of entry 1 has to be a positive number"):
        integer_weights([1, weight])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_every_prefix_is_in_proportion(integers):
    table, rank = period_table(integers)
    period = sum(integers)
    for source, weight in enumerate(integers):
        counts = np.cumsum(table == source)
        assert counts[-1] == weight
        assert np.abs(counts * period - weight * np.arange(1, period + 1)).max() < period  # off by less than one sample
        assert np.array_equal(rank[table == source], np.arange(weight))


def test_one_large_and_many_small_sources():
    """Where sorting by ideal position would be a dozen off, since all small sources fall due together."""
    integers = [50] + [1] * 50
    counts = np.cumsum(period_table(integers)[0] == 0)
    assert np.abs(counts - np.arange(1, 101) / 2).max() < 1


def test_each_source_is_drawn_in_order_once(prefixes):
    blend = build_blend([(prefixes[0], 0.7), (prefixes[1], 0.3)], 10, 1, 2000)
    sources, draws = blend.locate(np.arange(1000))
    assert [np.count_nonzero(sources == number) for number in (0, 1)] == [700, 300]
    for number in (0, 1):
        assert np.array_equal(draws[sources == number], np.arange(np.count_nonzero(sources == number)))
    one_by_one = [tuple(map(int, blend.locate(i))) for i in range(50)]
    assert one_by_one == list(zip(sources[:50].tolist(), draws[:50].tolist(), strict=True))


def test_without_weights_one_pass_sees_every_window_once(prefixes):
    blend = build_blend([(prefix, None) for prefix in prefixes], 10, 1, 2000)
    assert blend.weights == [2, 1] and blend.num_windows == 60
    first = blend.samples(np.arange(60))[:, 0]
    assert sorted(first.tolist()) == [*range(0, 400, 10), *range(1000, 1200, 10)]
    assert first.tolist() != sorted(first.tolist())
    assert blend.tokens_read(90) == [600, 300]


def test_samples_are_a_pure_function(prefixes):
    entries = [(prefixes[0], 0.5), (prefixes[1], 0.5)]
    together = build_blend(entries, 10, 1, 2000).samples(np.arange(200))
    assert together.shape == (200, 11) and together.dtype == np.int64
    again = build_blend(entries, 10, 1, 2000)
    assert all(np.array_equal(again.sample(number), together[number]) for number in (199, 3, 64))
    assert not np.array_equal(build_blend(entries, 10, 2, 2000).samples(np.arange(200)), together)


def test_sequential_blend(prefixes):
    blend = build_blend([(prefix, None) for prefix in prefixes], 10, 1, 2000, shuffle=False)
    first = blend.samples(np.arange(60))[:, 0]
    assert first[first < 1000].tolist() == list(range(0, 400, 10))
    assert first[first >= 1000].tolist() == list(range(1000, 1200, 10))


def test_weights_for_all_or_none(prefixes):
    with pytest.raises(ConfigError, match="data.train: .*b has no weight"):
        build_blend([(prefixes[0], 0.5), (prefixes[1], None)], 10, 1, 2000)
    with pytest.raises(ConfigError, match="data.train: found no dataset"):
        build_blend([], 10, 1, 2000)


def test_ids_beyond_the_vocabulary_are_found_when_built(prefixes):
    with pytest.raises(DataError, match="b.bin: token id 1150 at position 150 is outside the vocabulary of 1150; set model."):
        build_blend([(prefixes[0], None), (prefixes[1], None)], 10, 1, 1150)


def test_ids_beyond_the_vocabulary_are_found_when_read(tmp_path):
    """What a scan of the ends of a huge file has missed."""
    dataset = IndexedDataset(write(tmp_path / "d", [1] * 25 + [77] + [1] * 25))
    blend = Blend([Source(dataset, 10, 1, 0, shuffle=False)], vocab_size=77)
    blend.samples(np.array([0, 1]))
    with pytest.raises(DataError, match="token id 77 at position 25 is outside the vocabulary of 77"):
        blend.samples(np.array([0, 2]))
