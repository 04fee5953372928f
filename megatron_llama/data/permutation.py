"""A keyed permutation of [0, n), computed for the index asked for, never stored."""

from __future__ import annotations

import hashlib

import numpy as np

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
