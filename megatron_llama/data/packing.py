"""Packs whole documents into samples, so that few are cut and little is padding.

Best-fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", 2024) needs only lengths: pieces of equal
length and samples with equal free space are interchangeable, so they are handled by the thousand instead of one by one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_llama.data.permutation import derive_key, permute
from megatron_llama.data.rest import Runs
from parallel.errors import DataError

BLOCK_DOCUMENTS = 1 << 20
MIN_PIECE = 2  # tokens: one input and its target


class Fill(NamedTuple):
    """One step of a plan: `count` samples from `first` on each take `per_sample` pieces of `length`."""

    length: int
    first: int
    count: int
    per_sample: int


def best_fit(histogram: np.ndarray, capacity: int) -> tuple[list[Fill], int]:
    """Best-fit decreasing for `histogram[length]` pieces of each length up to `capacity`: the steps, the number of samples.

    Each piece, the longest first, goes to the sample with the least free space that suffices, or opens one.
    """
    fills: list[Fill] = []
    free: dict[int, deque[tuple[int, int]]] = {}  # free space -> runs of samples (first, count)
    spaces: list[int] = []  # the keys of `free`, ascending
    num_samples = 0
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            place = bisect_left(spaces, length)
            if place == len(spaces):
                space, available = capacity, -(-left // (capacity // length))
                first, num_samples = num_samples, num_samples + available
            else:
                space = spaces[place]
                first, available = free[space].popleft()
                if not free[space]:
                    del free[space], spaces[place]
            per_sample = min(space // length, left)
            count = min(available, left // per_sample)
            fills.append(Fill(length, first, count, per_sample))
            left -= count * per_sample
            for rest, start, number in (
                (space - per_sample * length, first, count),
                (space, first + count, available - count),
            ):
                if rest and number:
                    if rest not in free:
                        free[rest] = deque()
                        insort(spaces, rest)
                    free[rest].appendleft((start, number))
    return fills, num_samples


class PackedRuns:
    """Runs of tokens packed into samples of at most `capacity` tokens, drawn in the order that `key` chooses.

    A sample holds whole runs, and pieces of those that are longer, which overlap by one token so that each token but the
    first of its run is a target once. A run of one token has no target and is left out.
    """

    def __init__(self, runs: Runs, capacity: int, key: int) -> None:
        starts, lengths = runs
        full, rest = _cuts(lengths, capacity)
        fills, self.num_samples = best_fit(_histogram(full, rest, capacity), capacity)
        pieces = full + (rest > 0)
        owner = np.repeat(np.arange(len(lengths), dtype=np.int32), pieces)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        tokens = np.where(nth < full[owner], capacity, rest[owner]).astype(np.int32)
        samples = [np.repeat(np.arange(fill.first, fill.first + fill.count), fill.per_sample) for fill in fills]
        sample = np.concatenate([np.zeros(0, np.int64), *samples])  # of each piece, the longest first
        order = _stable_order(capacity - tokens)[_stable_order(sample)]
        self._rows = permute(np.arange(self.num_samples), self.num_samples, key)  # in the order of the draws
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(sample, minlength=self.num_samples))])
        self._starts = (starts[owner] + nth * (capacity - 1))[order]
        self._tokens = tokens[order]

    def sample(self, draw: int) -> list[tuple[int, int]]:
        """The pieces of a draw, (first token, number of tokens) each."""
        row = self._rows[draw]
        first, last = self._bounds[row : row + 2]
        return list(zip(self._starts[first:last].tolist(), self._tokens[first:last].tolist(), strict=True))

    def after(self, draws: int) -> Runs:
        """What the first `draws` samples have left, pieces of one run that follow one another joined again."""
        left = np.ones(self.num_samples, bool)
        left[self._rows[:draws]] = False
        kept = np.repeat(left, np.diff(self._bounds))
        order = np.argsort(self._starts[kept], kind="stable")
        starts, last_tokens = self._starts[kept][order], (self._starts + self._tokens - 1)[kept][order]
        first = np.concatenate([[True], starts[1:] != last_tokens[:-1]])[: len(starts)]
        last = np.concatenate([first[1:], [True]])[: len(starts)]
        return starts[first], last_tokens[last] - starts[first] + 1


class Packing:
    """The endless order of the packed samples of the documents of a dataset; what `Windows` is for windows.

    `lengths` are those of the documents in tokens, `starts(numbers)` gives their first tokens. Documents are packed in
    blocks of BLOCK_DOCUMENTS that are drawn at random, always the same ones; an epoch puts the blocks, and the samples
    within each, in an order of its own. In the terms of a cursor, a block is a group.

    A pass over all lengths counts the samples; then one block is in memory, about 20 bytes a document, 120 while it is packed.
    Raises DataError where no document has two tokens.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        starts: Callable[[np.ndarray], np.ndarray],
        sequence_length: int,
        seed: int,
        source_key: str | int,
    ) -> None:
        self.lengths, self.starts = lengths, starts
        self.capacity = sequence_length + 1
        self.key = derive_key(seed, source_key, "packing")
        self.num_blocks = -(-len(lengths) // BLOCK_DOCUMENTS)
        counts, tokens = [], 0
        for block in range(self.num_blocks):
            histogram = _histogram(*_cuts(lengths[self._documents(block)], self.capacity), self.capacity)
            counts.append(best_fit(histogram, self.capacity)[1])
            tokens += int((histogram * np.arange(self.capacity + 1)).sum())
        self._samples_of_block = np.array(counts, np.int64)
        self.num_samples = int(self._samples_of_block.sum())  # in an epoch
        if not self.num_samples:
            raise DataError(f"found {len(lengths)} documents, none of them with {MIN_PIECE} tokens: nothing to pack")
        self.padding = 1 - tokens / (self.num_samples * self.capacity)  # share of the tokens of all samples
        # Samples are drawn one after the other, so the block that is being read is kept.
        self._packed = lru_cache(maxsize=1)(self._pack)
        self._order = lru_cache(maxsize=2)(self._compute_order)

    def sample(self, number: int) -> list[tuple[int, int]]:
        """The pieces of a sample, (first token, number of tokens) each: together at most s + 1 tokens."""
        epoch, group, place = self.place(number)
        return self._packed(epoch, group).sample(place)

    def place(self, number: int) -> tuple[int, int, int]:
        """Where a sample stands: epoch, group, and how many samples of the group come before it."""
        epoch, within = divmod(number, self.num_samples)
        group = int(np.searchsorted(self._order(epoch)[1], within, side="right"))
        return epoch, group, number - self.first(epoch, group)

    def first(self, epoch: int, group: int) -> int:
        """The number of the first sample of a group; that of the next epoch where the group is past the last."""
        return epoch * self.num_samples + (int(self._order(epoch)[1][group - 1]) if group else 0)

    def rest(self, epoch: int, group: int, reads: Sequence[tuple[int, int]]) -> PackedRuns:
        """What reads of (sequence length, number of samples) have left of a group, packed anew."""
        runs, key = self._runs(epoch, group)
        for number, (length, count) in enumerate(reads):
            runs = PackedRuns(runs, length + 1, derive_key(key, number)).after(count)
        return PackedRuns(runs, self.capacity, derive_key(key, len(reads)))

    def _pack(self, epoch: int, group: int) -> PackedRuns:
        return self.rest(epoch, group, ())

    def _runs(self, epoch: int, group: int) -> tuple[Runs, int]:
        """The documents of a group, and the key of its order."""
        block = int(self._order(epoch)[0][group])
        documents = self._documents(block)
        return (self.starts(documents), self.lengths[documents]), derive_key(self.key, epoch, block)

    def _compute_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the order of an epoch, and at which of its samples each ends."""
        order = permute(np.arange(self.num_blocks), self.num_blocks, derive_key(self.key, epoch))
        return order, np.cumsum(self._samples_of_block[order])

    def _documents(self, block: int) -> np.ndarray:
        places = np.arange(block * BLOCK_DOCUMENTS, min((block + 1) * BLOCK_DOCUMENTS, len(self.lengths)))
        return permute(places, len(self.lengths), self.key)


def _cuts(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of full pieces of each run, and the length of what is left of it (0 where below MIN_PIECE)."""
    step = capacity - 1
    full = np.maximum(lengths.astype(np.int64) - 1, 0) // step
    rest = lengths - full * step
    return full, np.where(rest < MIN_PIECE, 0, rest)


def _histogram(full: np.ndarray, rest: np.ndarray, capacity: int) -> np.ndarray:
    """How many pieces of each length the cuts give."""
    histogram = np.bincount(rest, minlength=capacity + 1)
    histogram[0] = 0
    histogram[capacity] += full.sum()
    return histogram


def _stable_order(values: np.ndarray) -> np.ndarray:
    """The order that sorts non-negative numbers; those of 16 bits are sorted by counting, so larger ones in two turns."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    high = values >> 16
    if high.any():
        order = order[np.argsort(high[order].astype(np.uint16), kind="stable")]
    return order
