"""Packs whole documents into samples, so that few are cut and little is padding.

Best-fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", 2024) needs only lengths: pieces of equal
length and samples with equal free space are interchangeable, so they are handled by the thousand instead of one by one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import NamedTuple

import numpy as np

from megatron_llama.data.permutation import derive_key, permute
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


class Packing:
    """The packed samples of a source; sample k is a pure function of (lengths, sequence_length, seed, source_key, k).

    `lengths` are those of the documents, in tokens. A sample holds at most s + 1 tokens: whole documents, and pieces of
    those that are longer, which overlap by one token so that each token but the first is a target once. A document of
    one token has no target and is left out. Documents are packed in blocks of BLOCK_DOCUMENTS that are drawn at random;
    an epoch puts the blocks, and the samples within them, in an order of its own.

    A pass over all lengths counts the samples; then the plan of one block is in memory, about 40 bytes a document.
    Raises DataError where no document has two tokens.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        sequence_length: int,
        seed: int,
        source_key: str | int = 0,
        block_documents: int = BLOCK_DOCUMENTS,
    ) -> None:
        self.lengths = lengths
        self.capacity = sequence_length + 1
        self.key = derive_key(seed, source_key, "packing")
        self.block_documents = block_documents
        self.num_blocks = -(-len(lengths) // block_documents)
        counts, tokens = [], 0
        for block in range(self.num_blocks):
            histogram = self._histogram(self.lengths[self._documents(block)])
            counts.append(best_fit(histogram, self.capacity)[1])
            tokens += int((histogram * np.arange(self.capacity + 1)).sum())
        self._samples_of_block = np.array(counts, np.int64)
        self.num_samples = int(self._samples_of_block.sum())
        if not self.num_samples:
            raise DataError(f"found {len(lengths)} documents, none of them with {MIN_PIECE} tokens: nothing to pack")
        self.padding = 1 - tokens / (self.num_samples * self.capacity)  # share of all positions
        self._planned: tuple[int, tuple[np.ndarray, ...]] | None = None

    def sample(self, number: int) -> list[tuple[int, int, int]]:
        """The pieces of a sample, (document, offset, length) each: together at most s + 1 tokens."""
        epoch, within = divmod(number, self.num_samples)
        order = permute(np.arange(self.num_blocks), self.num_blocks, derive_key(self.key, epoch))
        ends = np.cumsum(self._samples_of_block[order])
        place = int(np.searchsorted(ends, within, side="right"))
        block = int(order[place])
        size = int(self._samples_of_block[block])
        row = int(permute(within - int(ends[place]) + size, size, derive_key(self.key, epoch, block)))
        if self._planned is None or self._planned[0] != block:
            self._planned = block, self._plan(block)
        bounds, documents, offsets, lengths = self._planned[1]
        chosen = slice(int(bounds[row]), int(bounds[row + 1]))
        return list(zip(documents[chosen].tolist(), offsets[chosen].tolist(), lengths[chosen].tolist(), strict=True))

    def _documents(self, block: int) -> np.ndarray:
        places = np.arange(block * self.block_documents, min((block + 1) * self.block_documents, len(self.lengths)))
        return permute(places, len(self.lengths), self.key)

    def _cuts(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of full pieces of each document, and the length of what is left of it (0 where below MIN_PIECE)."""
        step = self.capacity - 1
        full = np.maximum(lengths.astype(np.int64) - 1, 0) // step
        rest = lengths - full * step
        return full, np.where(rest < MIN_PIECE, 0, rest)

    def _histogram(self, lengths: np.ndarray) -> np.ndarray:
        full, rest = self._cuts(lengths)
        histogram = np.bincount(rest, minlength=self.capacity + 1)
        histogram[0] = 0
        histogram[self.capacity] += full.sum()
        return histogram

    def _plan(self, block: int) -> tuple[np.ndarray, ...]:
        """Of each sample the bounds of its pieces; of each piece document, offset and length."""
        documents = self._documents(block)
        full, rest = self._cuts(self.lengths[documents])
        fills, num_samples = best_fit(self._histogram(self.lengths[documents]), self.capacity)
        pieces = full + (rest > 0)
        owner = np.repeat(np.arange(len(documents), dtype=np.int32), pieces)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        lengths = np.where(nth < full[owner], self.capacity, rest[owner]).astype(np.int32)
        by_length = _stable_order(self.capacity - lengths)
        samples = np.concatenate([np.repeat(np.arange(f.first, f.first + f.count), f.per_sample) for f in fills])
        order = by_length[_stable_order(samples)]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(samples, minlength=num_samples))])
        return bounds, documents[owner[order]], (nth * (self.capacity - 1))[order], lengths[order]


def _stable_order(values: np.ndarray) -> np.ndarray:
    """The order that sorts non-negative numbers; those of 16 bits are sorted by counting, so larger ones in two turns."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    high = values >> 16
    if high.any():
        order = order[np.argsort(high[order].astype(np.uint16), kind="stable")]
    return order
