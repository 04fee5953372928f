"""What is left of a part of a dataset, cut into samples of another length.

Runs are disjoint, ordered stretches of a token stream: int64 arrays of their first tokens and of their lengths.
"""

from __future__ import annotations

import numpy as np

from megatron_llama.data.permutation import permute

Runs = tuple[np.ndarray, np.ndarray]  # first tokens, lengths


def merge(runs: Runs) -> Runs:
    """The same tokens in order, in the longest possible runs."""
    order = np.argsort(runs[0], kind="stable")
    starts, ends = runs[0][order], (runs[0] + runs[1])[order]
    first = np.concatenate([[True], starts[1:] != ends[:-1]])[: len(starts)]
    last = np.concatenate([first[1:], [True]])[: len(starts)]
    return starts[first], ends[last] - starts[first]


def subtract(runs: Runs, taken: Runs) -> Runs:
    """What is left of `runs` without the disjoint stretches `taken`, each of which lies in one of them."""
    begins = np.sort(np.concatenate([runs[0], taken[0] + taken[1]]))
    ends = np.sort(np.concatenate([runs[0] + runs[1], taken[0]]))
    left = begins < ends
    return begins[left], (ends - begins)[left]


class Rest:
    """Samples of `length` tokens that together hold the tokens of `runs` once each, up to a remainder below `length`.

    A run gives as many whole samples as it holds; what is left of the runs is joined in order and cut. `key` shuffles all
    of them.
    """

    def __init__(self, runs: Runs, length: int, key: int) -> None:
        self.runs = starts, lengths = merge(runs)
        self.length = length
        self.key = key
        whole = lengths // length
        first = np.cumsum(whole) - whole
        within = np.arange(whole.sum(), dtype=np.int64) - np.repeat(first, whole)
        self._whole = np.repeat(starts, whole) + within * length
        left = lengths % length > 0
        self._starts = (starts + whole * length)[left]
        self._ends = np.cumsum((lengths % length)[left])  # of the pieces, in the stream of what is left
        self._begins = self._ends - (lengths % length)[left]
        joined = int(self._ends[-1]) // length if left.any() else 0
        self.num_samples = len(self._whole) + joined

    def pieces(self, draws: np.ndarray) -> Runs:
        """The stretches of the samples `draws`, one sample after the other; each sample's lengths sum to `length`."""
        numbers = permute(draws, self.num_samples, self.key)
        starts, lengths = [], []
        for number in numbers.tolist():
            if number < len(self._whole):
                starts.append(self._whole[number : number + 1])
                lengths.append(np.array([self.length]))
                continue
            begin = (number - len(self._whole)) * self.length
            piece_starts, piece_lengths = self._joined(begin)
            starts.append(piece_starts)
            lengths.append(piece_lengths)
        empty = np.zeros(0, np.int64)
        return np.concatenate([empty, *starts]), np.concatenate([empty, *lengths])

    def sample(self, draw: int) -> list[tuple[int, int]]:
        """The pieces of a draw, (first token, number of tokens) each; the last one has the target of the last input too."""
        starts, lengths = self.pieces(np.array([draw]))
        lengths[-1] += 1
        return list(zip(starts.tolist(), lengths.tolist(), strict=True))

    def _joined(self, begin: int) -> Runs:
        """The stretches of [begin, begin + length) of the stream of what is left."""
        end = begin + self.length
        first = int(np.searchsorted(self._ends, begin, side="right"))
        last = int(np.searchsorted(self._ends, end, side="left"))
        ends = self._ends[first : last + 1]
        begins = self._begins[first : last + 1]
        shift = np.maximum(begin - begins, 0)
        return self._starts[first : last + 1] + shift, np.minimum(ends, end) - np.maximum(begins, begin)
