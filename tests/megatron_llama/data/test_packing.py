import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.data.packing import Packing, best_fit
from parallel.errors import DataError


def one_by_one(lengths, capacity):
    """Best-fit decreasing as it is written down: the free space of each sample."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 40), st.data())
def test_the_plan_is_best_fit_decreasing(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    fills, num_samples = best_fit(np.bincount(lengths, minlength=capacity + 1) if lengths else np.zeros(1, int), capacity)
    free = [capacity] * num_samples
    used = []
    for fill in fills:
        for sample in range(fill.first, fill.first + fill.count):
            free[sample] -= fill.length * fill.per_sample
            used += [fill.length] * fill.per_sample
    assert sorted(used) == sorted(lengths) and min(free, default=0) >= 0
    assert sorted(free) == one_by_one(lengths, capacity)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 20), st.integers(9, 40), st.integers(0, 3))
def test_every_target_is_in_one_sample_of_an_epoch(lengths, sequence_length, block_documents, seed):
    if max(lengths) < 2:
        return
    packing = Packing(np.array(lengths, np.int32), sequence_length, seed, block_documents=block_documents)
    epochs = []
    for epoch in range(2):
        numbers = range(epoch * packing.num_samples, (epoch + 1) * packing.num_samples)
        samples = [packing.sample(number) for number in numbers]
        assert all(sum(length for _, _, length in pieces) <= sequence_length + 1 for pieces in samples)
        assert all(length >= 2 for pieces in samples for _, _, length in pieces)
        targets = sorted((d, t) for pieces in samples for d, offset, n in pieces for t in range(offset + 1, offset + n))
        assert targets == sorted((d, t) for d, length in enumerate(lengths) for t in range(1, length))
        epochs.append(samples)
    again = Packing(np.array(lengths, np.int32), sequence_length, seed, block_documents=block_documents)
    assert [again.sample(number) for number in range(packing.num_samples)] == epochs[0]
    tokens = sum(n for pieces in epochs[0] for _, _, n in pieces)
    assert packing.padding == pytest.approx(1 - tokens / (packing.num_samples * (sequence_length + 1)))


def test_only_documents_that_are_too_long_are_cut():
    lengths = np.random.default_rng(0).integers(1, 400, 1000).astype(np.int32)
    packing = Packing(lengths, 255, 1)
    pieces = [piece for number in range(packing.num_samples) for piece in packing.sample(number)]
    whole = {document for document, offset, length in pieces if offset == 0 and length == lengths[document]}
    assert whole == set(np.flatnonzero((lengths >= 2) & (lengths <= 256)).tolist())


def test_epochs_and_seeds_have_their_own_order():
    lengths = np.full(300, 100, np.int32)
    first, other = (Packing(lengths, 255, seed, block_documents=100) for seed in (1, 2))
    n = first.num_samples
    starts = ((first, 0), (first, n), (other, 0))
    epochs = [[tuple(packing.sample(number)) for number in range(start, start + n)] for packing, start in starts]
    assert sorted(epochs[0]) == sorted(epochs[1]) != sorted(epochs[2]) and epochs[0] != epochs[1]


def web_like(documents):
    return np.clip(np.random.default_rng(0).lognormal(np.log(600), 1.1, documents), 16, 2**20).astype(np.int32)


@pytest.mark.parametrize("sequence_length", [2048, 8192])
def test_two_million_documents_leave_no_padding(sequence_length):
    lengths = web_like(2_000_000)
    started = time.process_time()
    packing = Packing(lengths, sequence_length, 1)
    counted = time.process_time() - started
    packing.sample(0)
    print(f"s {sequence_length}: counted {counted:.2f} s, one block planned {time.process_time() - started - counted:.2f} s, "
          f"padding {packing.padding:.4%}")  # fmt: skip
    assert packing.num_blocks == 2 and packing.padding < 0.001


def test_nothing_to_pack():
    with pytest.raises(DataError, match="found 3 documents, none of them with 2 tokens"):
        Packing(np.array([1, 0, 1], np.int32), 10, 1)
