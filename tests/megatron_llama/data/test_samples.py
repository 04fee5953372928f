import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_llama.data.samples import Source, derive_key, permute
from parallel.errors import DataError


def dataset_of(tmp_path, num_tokens, name="d"):
    """Token i is i; documents of 7 tokens."""
    with IndexedDatasetWriter(tmp_path / name, np.int32) as writer:
        for start in range(0, num_tokens, 7):
            writer.add_document(np.arange(start, min(start + 7, num_tokens)))
    return IndexedDataset(tmp_path / name)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2**60), st.integers(0, 2**64 - 1), st.data())
def test_permutation_of_any_size_stays_inside_and_apart(n, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True)))
    image = permute(index, n, key)
    assert image.min() >= 0 and image.max() < n and len(np.unique(image)) == len(index)
    assert [int(permute(i, n, key)) for i in index] == image.tolist()  # one by one as together


@pytest.mark.parametrize("n", [3, 8])
def test_permutations_of_few_are_even(n):
    """Each place is equally likely: chi-squared, with (n - 1)^2 degrees of freedom, within five standard deviations."""
    keys = 300
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, derive_key("even", key))] += 1
    expected, degrees = keys / n, (n - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 5 * np.sqrt(2 * degrees)


def test_permutation_has_no_visible_structure():
    n = 100_003
    image = permute(np.arange(n), n, 7)
    other = permute(np.arange(n), n, 8)
    noise = 5 / np.sqrt(n)  # five standard deviations of the correlation of independent series
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < noise
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < noise
    assert abs(np.corrcoef(image, other)[0, 1]) < noise
    assert np.count_nonzero(image == other) < 20  # 1 expected


@pytest.mark.parametrize("bits", [16, 17])
def test_no_bit_of_the_result_follows_a_bit_of_the_index(bits):
    """Halves of equal and of unequal width."""
    index = np.arange(2**bits)
    image = permute(index, 2**bits, 7)
    before, after = ((values[:, None] >> np.arange(bits)) & 1 for values in (index, image))
    agreement = np.array([[(before[:, i] == after[:, j]).mean() for j in range(bits)] for i in range(bits)])
    assert np.abs(agreement - 0.5).max() < 5 * 0.5 / np.sqrt(2**bits)  # five standard deviations


def test_keys_depend_on_every_part_and_its_place():
    keys = {derive_key(*parts) for parts in [(1, 2, 3), (1, 3, 2), (1, 2, 4), (12, 3), (1, 23), (1, "2", 33)]}
    assert len(keys) == 6
    assert derive_key(1, 2, 3) == 12453245636928503841  # the order of past runs depends on it


def test_windows_overlap_by_one_token_and_cover_the_data(tmp_path):
    source = Source(dataset_of(tmp_path, 101), 10, seed=1, source_key=0)
    assert source.num_windows == 10
    windows = np.stack([source.sample(draw) for draw in range(10)])
    assert windows.shape == (10, 11) and windows.dtype == np.int64
    assert np.array_equal(windows[np.argsort(windows[:, 0])], np.arange(0, 100, 10)[:, None] + np.arange(11))


def test_last_window_needs_its_target(tmp_path):
    assert Source(dataset_of(tmp_path, 100), 10, 1, 0).num_windows == 9


def test_every_epoch_is_complete_and_its_own(tmp_path):
    source = Source(dataset_of(tmp_path, 1001), 10, seed=1, source_key=0)
    draws = source.window_index(np.arange(300)).reshape(3, 100)
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in draws)
    assert len({epoch.tobytes() for epoch in draws}) == 3
    assert [int(source.window_index(draw)) for draw in (0, 99, 100, 250)] == draws.reshape(-1)[[0, 99, 100, 250]].tolist()


def test_order_depends_on_seed_and_source_alone(tmp_path):
    first, second = dataset_of(tmp_path, 1001), dataset_of(tmp_path, 1001, "moved")
    order = Source(first, 10, 1, 0).window_index(np.arange(100)).tolist()
    assert Source(second, 10, 1, 0).window_index(np.arange(100)).tolist() == order
    assert Source(first, 10, 2, 0).window_index(np.arange(100)).tolist() != order
    assert Source(first, 10, 1, 1).window_index(np.arange(100)).tolist() != order


def test_sequential_order(tmp_path):
    source = Source(dataset_of(tmp_path, 51), 10, 1, 0, shuffle=False)
    assert source.window_index(np.arange(12)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_too_little_text(tmp_path):
    with pytest.raises(DataError, match=r"d.bin: 10 tokens are too few for one sample of sequence_length \+ 1 = 11"):
        Source(dataset_of(tmp_path, 10), 10, 1, 0)
