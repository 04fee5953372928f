import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.data import packing as packing_module
from megatron_llama.data.packing import PackedRuns, Packing, best_fit
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


def packing_of(lengths, sequence_length, seed=1):
    """Documents of these lengths one after the other."""
    lengths = np.array(lengths, np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    return Packing(lengths, lambda numbers: ends[numbers] - lengths[numbers], sequence_length, seed, 0)


def targets_of(samples):
    """The tokens that are targets, in the order of the samples."""
    return [token for pieces in samples for start, count in pieces for token in range(start + 1, start + count)]


def all_targets(lengths):
    """Every token but the first of each document."""
    starts = np.cumsum(lengths) - lengths
    return sorted(set(range(sum(lengths))) - {int(start) for start, length in zip(starts, lengths, strict=True) if length})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 20), st.integers(9, 40), st.integers(0, 3))
def test_every_target_is_in_one_sample_of_an_epoch(lengths, sequence_length, block_documents, seed):
    if max(lengths) < 2:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "BLOCK_DOCUMENTS", block_documents)
        packing = packing_of(lengths, sequence_length, seed)
        n = packing.num_samples
        epochs = [[packing.sample(first + number) for number in range(n)] for first in (0, n)]
        again = packing_of(lengths, sequence_length, seed)
        assert [again.sample(number) for number in reversed(range(n))] == epochs[0][::-1]
    for samples in epochs:
        assert all(sum(count for _, count in pieces) <= sequence_length + 1 for pieces in samples)
        assert all(count >= 2 for pieces in samples for _, count in pieces)
        assert sorted(targets_of(samples)) == all_targets(lengths)
    tokens = sum(count for pieces in epochs[0] for _, count in pieces)
    assert packing.padding == pytest.approx(1 - tokens / (n * (sequence_length + 1)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 20), st.data())
def test_what_samples_have_left_is_whole_runs(lengths, sequence_length, data):
    """Read samples and what `after` leaves hold each target once; nothing is cut that need not be."""
    if max(lengths) < 2:
        return
    ends = np.cumsum(lengths)
    packed = PackedRuns((ends - lengths, np.array(lengths)), sequence_length + 1, key=5)
    count = data.draw(st.integers(0, packed.num_samples))
    read = targets_of([packed.sample(draw) for draw in range(count)])
    starts, left = packed.after(count)
    rest = [list(zip(starts.tolist(), left.tolist(), strict=True))]
    assert sorted(read + targets_of(rest)) == all_targets(lengths)
    firsts = {start for start, length in rest[0]}
    assert not firsts & {start + length - 1 for start, length in rest[0]}  # one run, not two that touch


def test_only_documents_that_are_too_long_are_cut():
    lengths = np.random.default_rng(0).integers(1, 400, 1000)
    packing = packing_of(lengths, 255)
    pieces = [piece for number in range(packing.num_samples) for piece in packing.sample(number)]
    starts = np.cumsum(lengths) - lengths
    whole = {(int(start), int(length)) for start, length in zip(starts, lengths, strict=True) if 2 <= length <= 256}
    assert whole <= set(pieces) and len(set(pieces)) == len(pieces)


def test_epochs_and_seeds_have_their_own_order(monkeypatch):
    monkeypatch.setattr(packing_module, "BLOCK_DOCUMENTS", 100)
    first, other = (packing_of([100] * 300, 255, seed) for seed in (1, 2))
    n = first.num_samples
    starts = ((first, 0), (first, n), (other, 0))
    epochs = [[tuple(packing.sample(start + number)) for number in range(n)] for packing, start in starts]
    assert sorted(epochs[0]) == sorted(epochs[1]) != sorted(epochs[2]) and epochs[0] != epochs[1]


def test_each_block_is_packed_once(monkeypatch):
    """Packing is what costs: a run that goes through an epoch packs each block as it comes, and not again."""
    monkeypatch.setattr(packing_module, "BLOCK_DOCUMENTS", 100)
    packing = packing_of([100] * 300, 255)
    packed = []
    monkeypatch.setattr(packing_module, "PackedRuns", lambda *of: packed.append(of) or PackedRuns(*of))
    for number in range(packing.num_samples):
        packing.sample(number)
    assert len(packed) == packing.num_blocks == 3


def web_like(documents):
    return np.clip(np.random.default_rng(0).lognormal(np.log(600), 1.1, documents), 16, 2**20).astype(np.int32)


@pytest.mark.parametrize("sequence_length", [2048, 8192])
def test_two_million_documents_leave_no_padding(sequence_length):
    lengths = web_like(2_000_000)
    started = time.process_time()
    packing = packing_of(lengths, sequence_length)
    counted = time.process_time() - started
    packing.sample(0)
    print(f"s {sequence_length}: counted {counted:.2f} s, one block packed {time.process_time() - started - counted:.2f} s, "
          f"padding {packing.padding:.4%}")  # fmt: skip
    assert packing.num_blocks == 2 and packing.padding < 0.001


def test_nothing_to_pack():
    with pytest.raises(DataError, match="found 3 documents, none of them with 2 tokens"):
        packing_of([1, 0, 1], 10)
