import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.data.permutation import derive_key, permute


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
