"""The two orders of the rows of wq and wk: where the two halves of each rotary pair stand in a head.

Half-split: rows j and j + D/2 turn together (ours, Hugging Face's, Megatron's). Interleaved: rows 2 j and 2 j + 1 do (Meta's,
torchtitan's).
"""

from __future__ import annotations

from torch import Tensor


def to_half_split(rows: Tensor, heads: int) -> Tensor:
    """Interleaved [heads D, d] -> half-split, the same shape."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(rows: Tensor, heads: int) -> Tensor:
    """Half-split [heads D, d] -> interleaved, the same shape."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
