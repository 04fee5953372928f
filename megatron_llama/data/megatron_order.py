"""The order of samples of megatron-core's GPTDataset and BlendedDataset, bit for bit, for those who continue its runs.

A dataset's documents (its sequences) are shuffled, several epochs of them at once, and joined; sample j is the tokens
[j s, j s + s] of that; the samples are shuffled again. Datasets are blended by the largest deficit. All of it is laid out
in arrays: per dataset 4 bytes for each document and epoch and 12 for each sample, and 10 for each sample of the blend;
while they are made, another 16 for each document and epoch and 32 for each sample. They depend on the length of the run:
another number of samples may change all of them, which is why `data.order = "windows"` exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_llama.data.blend import Piece, read_pieces
from megatron_llama.data.indexed import IndexedDataset
from parallel.errors import ConfigError, DataError

SURPLUS = 0.005  # samples that are prepared beyond a dataset's share of a blend
SEPARATE_BELOW = 0.80  # a last epoch of which less is needed is shuffled apart
SMALL = np.iinfo(np.uint32).max - 1


class MegatronSamples:
    """The training samples of one dataset: `document_index`, `sample_index` and `shuffle_index` as in GPTDataset.

    `num_samples` are asked for, None for one epoch; there are `len()`, all that whole epochs give. `documents` is the
    number of documents, from the first on, that the training split has.
    """

    def __init__(
        self, dataset: IndexedDataset, sequence_length: int, num_samples: int | None, seed: int, documents: int
    ) -> None:
        self.dataset = dataset
        self.sequence_length = sequence_length
        lengths = dataset.sequence_lengths[:documents]
        tokens = int(lengths.sum(dtype=np.int64))
        if tokens < sequence_length + 1:
            raise DataError(
                f"{dataset.prefix}: the {tokens} tokens of its training split are too few for one sample of "
                f"train.sequence_length + 1 = {sequence_length + 1}"
            )
        self.num_epochs = 1 if num_samples is None else max(1, -(-(num_samples * sequence_length + 1) // tokens))
        before_last = ((self.num_epochs - 1) * tokens - 1) // sequence_length
        self.num_windows = (tokens - 1) // sequence_length  # in an epoch
        self.separate_last_epoch = False
        if num_samples is not None and self.num_epochs > 1:
            self.separate_last_epoch = num_samples - before_last < int(SEPARATE_BELOW * self.num_windows)
        random = np.random.RandomState(seed)  # one stream, in this order
        self.document_index = _document_index(documents, self.num_epochs, random, self.separate_last_epoch)
        self.sample_index = _sample_index(lengths, self.document_index, sequence_length)
        total = len(self.sample_index) - 1
        self.shuffle_index = _shuffle_index(before_last if self.separate_last_epoch else total, total, random)

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def pieces(self, sample: int) -> list[tuple[int, int]]:
        """The pieces of a sample (first token, number of tokens): s + 1 tokens together."""
        number = int(self.shuffle_index[sample])
        (first, offset), (last, end) = self.sample_index[number : number + 2].tolist()
        documents = self.document_index[first : last + 1]
        starts = self.dataset.sequence_starts(documents)
        stops = starts + self.dataset.sequence_lengths[documents]
        stops[-1] = starts[-1] + end + 1  # and one more: the target of the last input
        starts[0] += offset
        pieces = zip(starts.tolist(), (stops - starts).tolist(), strict=True)
        return [(start, count) for start, count in pieces if count]


def _document_index(documents: int, num_epochs: int, random: np.random.RandomState, separate: bool) -> np.ndarray:
    """The documents of all epochs in the order they are read, int32."""
    first = num_epochs - 1 if separate else num_epochs
    index = np.tile(np.arange(documents, dtype=np.int32), first)
    random.shuffle(index)
    if not separate:
        return index
    last = np.arange(documents, dtype=np.int32)
    random.shuffle(last)
    return np.concatenate([index, last])


def _sample_index(lengths: np.ndarray, document_index: np.ndarray, sequence_length: int) -> np.ndarray:
    """Where each sample begins, and after them the last one's end: (place in the document index, offset), [n + 1, 2]."""
    ends = np.cumsum(lengths[document_index], dtype=np.int64)
    positions = np.arange((int(ends[-1]) - 1) // sequence_length + 1, dtype=np.int64) * sequence_length
    places = np.searchsorted(ends, positions + 1, side="left")  # of the document that holds the token; empty ones hold none
    places[0] = 0
    offsets = positions - np.where(places > 0, ends[places - 1], 0)
    large = max(len(document_index), int(lengths.max(initial=0))) > np.iinfo(np.int32).max
    return np.stack([places, offsets], axis=1).astype(np.int64 if large else np.int32)


def _shuffle_index(first: int, total: int, random: np.random.RandomState) -> np.ndarray:
    """The samples [0, first) shuffled, then those of [first, total)."""
    dtype = np.uint32 if total < SMALL else np.int64
    index = np.arange(first, dtype=dtype)
    random.shuffle(index)
    if first == total:
        return index
    rest = np.arange(first, total, dtype=dtype)
    random.shuffle(rest)
    return np.concatenate([index, rest])


def blend_index(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The dataset of each sample, int16, and the number of the sample in it, int64. The weights sum to 1.

    Sample i goes to the dataset with the largest w max(i, 1) - (samples it has), the first where several are equal, in
    float64 as megatron-core computes it: ties depend on rounding. So it is computed one by one, 1 us a sample.
    """
    datasets, numbers = np.empty(size, np.int16), np.empty(size, np.int64)
    counts = [0] * len(weights)
    others = range(1, len(weights))
    for sample in range(size):
        scale = float(max(sample, 1))
        chosen, largest = 0, weights[0] * scale - counts[0]
        for number in others:
            lag = weights[number] * scale - counts[number]
            if lag > largest:
                chosen, largest = number, lag
        datasets[sample], numbers[sample] = chosen, counts[chosen]
        counts[chosen] += 1
    return datasets, numbers


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights with the sum 1, rounded as megatron-core rounds them."""
    values = np.array(weights, dtype=np.float64)
    return (values / np.sum(values)).tolist()


def training_documents(split: str, documents: int) -> int:
    """How many documents the first part of a split such as "969,30,1" has. Raises ConfigError."""
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if not parts or min(parts) < 0 or parts[0] <= 0:
        raise ConfigError(f"data.megatron_split = {split!r} is not a split: numbers such as 969,30,1, the first above 0")
    return round(normalize(parts)[0] * float(documents))


class MegatronBlend:
    """The samples of a Megatron run of `num_samples`; sample i is what it reads as its i-th.

    `entries` are (dataset, weight or None). One dataset without a weight is read alone. Without weights, every dataset is
    read for one epoch, in proportion to its number of samples.

    Raises ConfigError where the datasets hold fewer samples than the run reads, DataError for a dataset too short.
    """

    def __init__(
        self,
        entries: Sequence[tuple[IndexedDataset, float | None]],
        sequence_length: int,
        num_samples: int,
        seed: int,
        vocab_size: int | None = None,
        split: str = "1",
    ) -> None:
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.first_sample = 0
        self.packed = False
        sizes: list[int | None] = [None] * len(entries)
        weights = [weight for _, weight in entries if weight is not None]
        if weights:
            shares = normalize(weights)
            sizes = [math.ceil(math.ceil(num_samples * share) * (1 + SURPLUS)) for share in shares]
            total = sum(math.ceil(num_samples * share) for share in shares)
        elif len(entries) == 1:
            sizes = [num_samples]
        self.sources = [
            MegatronSamples(dataset, sequence_length, size, seed, training_documents(split, len(dataset.sequence_lengths)))
            for (dataset, _), size in zip(entries, sizes, strict=True)
        ]
        self.num_windows = sum(source.num_windows for source in self.sources)
        available = sum(map(len, self.sources))
        if not weights:
            shares, total = normalize(list(map(len, self.sources))), min(num_samples, available)
        self.weights = shares
        self._blended = len(entries) > 1 or bool(weights)
        if self._blended:
            self.dataset_index, self.dataset_sample_index = blend_index(normalize(shares), total)
            self._check_room()
        if total < num_samples:
            raise ConfigError(
                f"data.order = megatron: the run reads {num_samples} samples, but one epoch of the datasets has {total}; "
                "give the datasets weights, as the Megatron run has to"
            )

    @property
    def index_bytes(self) -> int:
        """The memory of all arrays."""
        arrays = [array for s in self.sources for array in (s.document_index, s.sample_index, s.shuffle_index)]
        if self._blended:
            arrays += [self.dataset_index, self.dataset_sample_index]
        return sum(array.nbytes for array in arrays)

    def pieces(self, samples: Iterable[int]) -> list[list[Piece]]:
        """Where the tokens of each sample lie: s + 1 of them in one or several pieces, documents that follow one another."""
        return [self._pieces(sample) for sample in samples]

    def _pieces(self, sample: int) -> list[Piece]:
        source = int(self.dataset_index[sample]) if self._blended else 0
        number = int(self.dataset_sample_index[sample]) if self._blended else sample
        return [Piece(source, *piece) for piece in self.sources[source].pieces(number)]

    def sample(self, number: int) -> np.ndarray:
        """The tokens of one sample, int64 [s + 1]. Raises DataError for an id outside the vocabulary."""
        return self.samples([number])[0]

    def samples(self, numbers: Iterable[int]) -> np.ndarray:
        """The tokens of many samples, int64 [len(numbers), s + 1]. Raises DataError for an id outside the vocabulary."""
        datasets = [source.dataset for source in self.sources]
        return read_pieces(datasets, self.pieces(numbers), self.sequence_length, self.vocab_size)

    def tokens_read(self, sample: int) -> list[int]:
        """The tokens that have been read of each source before that sample."""
        if not self._blended:
            return [sample * self.sequence_length]
        counts = np.bincount(self.dataset_index[:sample], minlength=len(self.sources))
        return (counts * self.sequence_length).tolist()

    def _check_room(self) -> None:
        drawn = np.bincount(self.dataset_index, minlength=len(self.sources)).tolist()
        for source, count in zip(self.sources, drawn, strict=True):
            if count > len(source):
                raise ConfigError(
                    f"data.order = megatron: the blend draws {count} samples of {source.dataset.prefix}, which has "
                    f"{len(source)}; the Megatron run fails there too: give it a larger weight or a longer run"
                )
