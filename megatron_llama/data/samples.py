"""Which window of a dataset is drawn when: a keyed permutation, computed for the sample asked for, never stored."""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_llama.data.indexed import IndexedDataset
from parallel.errors import DataError

ROUNDS = 6
MIN_BITS = 6  # with narrower halves some orders of a few windows would be more likely than others


def derive_key(*parts: object) -> int:
    """A 64-bit key from values with a stable text, e.g. (seed, source, epoch)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: np.ndarray | int, n: int, key: int) -> np.ndarray:
    """Where a permutation of [0, n), chosen by the 64-bit `key`, sends each `index`: int64, of the shape of `index`.

    A Feistel network on the smallest power of two, at least 64, that holds n, walked along its cycles until it is below n
    again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): from n = 64 on, below two steps on average.
    """
    index = np.asarray(index, np.int64)
    assert n >= 1 and (index.size == 0 or (index.min() >= 0 and index.max() < n)), f"index outside [0, {n})"
    bits = max(MIN_BITS, (n - 1).bit_length())
    round_keys = [np.uint64(derive_key(key, number)) for number in range(ROUNDS)]
    value = _feistel(index.astype(np.uint64).reshape(-1), bits, round_keys)
    outside = np.flatnonzero(value >= n)
    while outside.size:
        walked = _feistel(value[outside], bits, round_keys)
        value[outside] = walked
        outside = outside[walked >= n]
    return value.astype(np.int64).reshape(index.shape)


def _feistel(value: np.ndarray, bits: int, round_keys: list[np.uint64]) -> np.ndarray:
    """One pass over `bits` bits; the halves differ by a bit where `bits` is odd, and swap their widths each round."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = value >> np.uint64(right_bits), value & np.uint64((1 << right_bits) - 1)
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input changes every bit of the output half of the time."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Source:
    """One dataset as an endless series of windows; draw j is a pure function of (dataset, seed, source_key, j).

    Window k holds tokens [k s, k s + s], both included, of the documents joined: s inputs and, one further, s targets.
    Every epoch draws each window once, in its own order, or in the order of the file with `shuffle=False`.

    `source_key` tells sources of one blend apart (their number, say); the path of the files plays no part.
    Raises DataError where the dataset is too short for one window.
    """

    def __init__(
        self, dataset: IndexedDataset, sequence_length: int, seed: int, source_key: str | int, shuffle: bool = True
    ) -> None:
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.seed = seed
        self.source_key = source_key
        self.shuffle = shuffle
        self.num_windows = (dataset.num_tokens - 1) // sequence_length
        if self.num_windows < 1:
            raise DataError(
                f"{dataset.bin_path}: {dataset.num_tokens} tokens are too few for one sample of sequence_length + 1 = "
                f"{sequence_length + 1}; use more text or a smaller train.sequence_length"
            )

    def window_index(self, draws: np.ndarray | int) -> np.ndarray:
        """The window of each draw, int64, of the shape of `draws`."""
        epochs, within = np.divmod(np.asarray(draws, np.int64), self.num_windows)
        if not self.shuffle:
            return within
        windows = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = permute(within[chosen], self.num_windows, derive_key(self.seed, self.source_key, int(epoch)))
        return windows

    def start_token(self, draws: np.ndarray | int) -> np.ndarray:
        """The first token of the window of each draw."""
        return self.window_index(draws) * self.sequence_length

    def sample(self, draw: int) -> np.ndarray:
        """The s + 1 tokens of one draw, int64 [s + 1]."""
        return self.dataset.read(int(self.start_token(draw)), self.sequence_length + 1)
