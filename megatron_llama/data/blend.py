"""A weighted mixture of sources, exact at every prefix, without an index of the samples.

Weights become integers a with sum P. One period of P samples is laid out in a table; sample i is entry i mod P, and the
table also knows how many samples of that source came before it. So any sample is found in O(1), the past does not depend
on the length of the run, and each source's own samples come as 0, 1, 2, ... once each.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from typing import NamedTuple

import numpy as np

from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.samples import Cursor, Source
from megatron_llama.data.vocabulary import check_ids_of, check_token_ids
from parallel.errors import ConfigError

MAX_PERIOD = 10**6
ROUNDED_SHARE = 1000  # where weights must be rounded, the smallest of them gets this many entries if the period allows


def integer_weights(weights: Sequence[float], max_period: int = MAX_PERIOD) -> list[int]:
    """Integers in the proportion of `weights`, without a common divisor, their sum at most `max_period`.

    Weights are taken as the decimals that were written (0.7 is 7/10) and kept exactly if the sum allows; otherwise they
    are rounded by largest remainder, none to 0, to a sum that leaves the smallest an error below 0.1 % or is the limit.
    Raises ConfigError for a weight that is not a positive number.
    """
    for number, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"data.train: weight {weight} of entry {number} has to be a positive number")
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    integers = [int(weight * common) for weight in exact]
    if sum(integers) // math.gcd(*integers) > max_period:
        integers = _rounded([weight / sum(exact) for weight in exact], max_period)
    divisor = math.gcd(*integers)
    return [integer // divisor for integer in integers]


def _rounded(shares: list[Fraction], max_period: int) -> list[int]:
    period = min(max_period, math.ceil(ROUNDED_SHARE / min(shares)))
    if len(shares) > period:
        raise ConfigError(f"data.train: {len(shares)} entries are more than a mixture can have, {period}")
    integers = [max(1, math.floor(share * period)) for share in shares]
    order = sorted(range(len(shares)), key=lambda number: integers[number] - shares[number] * period)
    missing = period - sum(integers)
    for number in order[: max(0, missing)]:
        integers[number] += 1
    for _ in range(-missing):  # entries raised to 1 are taken from the largest
        integers[max(range(len(integers)), key=integers.__getitem__)] -= 1
    return integers


def period_table(integers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """One period: the source of each entry, and how many entries of that source came before it; int32 [P] each.

    Item k of a source with weight a may not come before entry floor(k P / a) and has to come before entry
    ceil((k + 1) P / a). Taking the earliest deadline among those that may come meets all of them, and then every prefix
    of n samples holds each source n a / P times, with an error below 1 (the chairman assignment problem: Tijdeman 1980;
    the deadlines are those of Baruah et al., "Proportionate progress", 1996).
    """
    period = sum(integers)
    table, rank = np.empty(period, np.int32), np.empty(period, np.int32)
    counts = [0] * len(integers)
    waiting = [(0, source) for source, weight in enumerate(integers) if weight]  # (first entry allowed, source)
    ready: list[tuple[int, int]] = []  # (deadline, source)
    for entry in range(period):
        while waiting and waiting[0][0] <= entry:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(counts[source] + 1) * period // integers[source]), source))
        deadline, source = heapq.heappop(ready)
        assert entry < deadline, "a deadline of the mixture was missed"
        table[entry], rank[entry] = source, counts[source]
        counts[source] += 1
        if counts[source] < integers[source]:
            heapq.heappush(waiting, (counts[source] * period // integers[source], source))
    return table, rank


class Piece(NamedTuple):
    """A stretch of the token stream of one source."""

    source: int
    start_token: int
    num_tokens: int


def read_pieces(
    datasets: Sequence[IndexedDataset], samples: Sequence[Sequence[Piece]], sequence_length: int, vocab_size: int | None
) -> np.ndarray:
    """The tokens of samples, int64 [len(samples), s + 1], with zeros behind those that are shorter.

    Raises DataError for an id outside the vocabulary.
    """
    tokens = np.zeros((len(samples), sequence_length + 1), np.int64)
    for row, pieces in zip(tokens, samples, strict=True):
        position = 0
        for source, start_token, num_tokens in pieces:
            row[position : position + num_tokens] = datasets[source].read_raw(start_token, num_tokens)
            position += num_tokens
    if vocab_size is not None and tokens.size and tokens.view(np.uint64).max() >= vocab_size:  # negative ids are large there
        for source, start_token, num_tokens in chain.from_iterable(samples):  # which of them is it?
            check_ids_of(datasets[source], datasets[source].read_raw(start_token, num_tokens), start_token, vocab_size)
    return tokens


class Blend:
    """An endless series of samples from several sources: sample i is a pure function of (datasets, seed, i).

    `weights` are proportions, or None for the numbers of windows. `sequence_length` s is that of the sources;
    `num_windows` is the number of different samples of all sources together. With a `vocab_size`, every token read is
    checked against it. Samples are numbered from `first_sample` on, where the sources are at their cursors. `integers`
    are weights that are taken as they are; one of them may be 0. `packed` says that samples are whole documents, at most
    s + 1 tokens of them, instead of windows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        vocab_size: int | None = None,
        first_sample: int = 0,
        integers: Sequence[int] | None = None,
    ) -> None:
        assert sources and len({(source.sequence_length, source.packed) for source in sources}) == 1
        self.sources = list(sources)
        self.packed = sources[0].packed
        self.sequence_length = sources[0].sequence_length
        self.num_windows = sum(source.num_windows for source in sources)
        self.vocab_size = vocab_size
        self.first_sample = first_sample
        if integers is None:
            integers = integer_weights([source.num_windows for source in sources] if weights is None else weights)
        self.weights = list(integers)
        self._table, self._rank = period_table(self.weights)
        self._integers = np.array(self.weights, np.int64)

    def locate(self, samples: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """The source number of each sample, and the number of its draw there; of the shape of `samples`."""
        periods, entries = divmod(samples - self.first_sample, len(self._table))
        sources = self._table[entries]
        return sources, periods * self._integers[sources] + self._rank[entries]

    def pieces(self, samples: Iterable[int]) -> list[list[Piece]]:
        """Where the tokens of each sample lie: s + 1 of them in one or several pieces, fewer in packed samples."""
        return [self._pieces(sample) for sample in samples]

    def _pieces(self, sample: int) -> list[Piece]:
        assert sample >= self.first_sample, "a sample before the mixture began"
        source, draw = map(int, self.locate(sample))
        return [Piece(source, *piece) for piece in self.sources[source].pieces(draw)]

    def sample(self, number: int) -> np.ndarray:
        """The tokens of one sample, int64 [s + 1]. Raises DataError for an id outside the vocabulary."""
        return self.samples([number])[0]

    def samples(self, numbers: Iterable[int]) -> np.ndarray:
        """The tokens of many samples, int64 [len(numbers), s + 1]. Raises DataError for an id outside the vocabulary."""
        datasets = [source.dataset for source in self.sources]
        return read_pieces(datasets, self.pieces(numbers), self.sequence_length, self.vocab_size)

    def draws_before(self, sample: int) -> list[int]:
        """How often each source has been drawn since `first_sample`, before that sample."""
        periods, entries = divmod(sample - self.first_sample, len(self._table))
        within = np.bincount(self._table[:entries], minlength=len(self.sources)).tolist()
        return [periods * weight + count for weight, count in zip(self.weights, within, strict=True)]

    def cursors(self, sample: int) -> list[Cursor]:
        """Where each source stands before that sample."""
        return [source.cursor_after(count) for source, count in zip(self.sources, self.draws_before(sample), strict=True)]

    def tokens_read(self, sample: int) -> list[int]:
        """The tokens that have been read of each source before that sample, since its first epoch."""
        return [cursor.tokens for cursor in self.cursors(sample)]


def build_blend(
    entries: Sequence[tuple[str, float | None]],
    sequence_length: int,
    seed: int,
    vocab_size: int,
    shuffle: bool = True,
    setting: str = "data.train",
) -> Blend:
    """Opens and checks the datasets of `entries`, each (prefix, weight or None), and mixes them.

    Without weights, sources are mixed in proportion to their sizes. `shuffle=False`, for evaluation, draws the windows
    of each source in the order of its file. `setting` is what the user gave the entries with.

    Raises ConfigError where there is no entry or only some have a weight, DataError for what is wrong with a dataset.
    """
    check_entries(entries, setting)
    sources = []
    for number, (prefix, _) in enumerate(entries):
        dataset = IndexedDataset(prefix)
        check_token_ids(dataset, vocab_size)
        sources.append(Source(dataset, sequence_length, seed, number, shuffle))
    weights = [weight for _, weight in entries if weight is not None]
    return Blend(sources, weights or None, vocab_size)


def check_entries(entries: Sequence[tuple[str, float | None]], setting: str = "data.train") -> None:
    """Raises ConfigError where there is no entry, or only some have a weight."""
    if not entries:
        raise ConfigError(f"{setting}: found no dataset, needed at least one prefix")
    without = [prefix for prefix, weight in entries if weight is None]
    if without and len(without) < len(entries):
        raise ConfigError(f"{setting}: {without[0]} has no weight, others have; give a weight to every entry or to none")
