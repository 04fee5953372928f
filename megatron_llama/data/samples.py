"""Which sample of a dataset is drawn when: a pure function of the draw's number, nothing stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.packing import Packing
from megatron_llama.data.permutation import derive_key, permute
from megatron_llama.data.rest import Rest, Runs, subtract
from parallel.errors import ConfigError, DataError

BLOCK_TOKENS = 1 << 20
GROUP_BLOCKS = 1 << 10
KEYS = 1 << 64
MIN_AHEAD, AHEAD = 16, 1024


@dataclass(frozen=True)
class Cursor:
    """How far a source has been read: it stands in `group` of `epoch`, of which `reads` have been made.

    A read is (sequence_length, number of samples); there is more than one only where the sequence length changed within
    the group. `tokens` were read in all, since the first epoch: s for each sample, the padding of packed ones included.
    """

    epoch: int = 0
    group: int = 0
    reads: tuple[tuple[int, int], ...] = ()
    tokens: int = 0

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Cursor:
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        return cls(state["epoch"], state["group"], tuple((length, count) for length, count in state["reads"]), state["tokens"])


START = Cursor()


class Windows:
    """The endless order of the windows of s tokens in a stream of `num_tokens`, one of which is only a target.

    The stream is cut into blocks of BLOCK_TOKENS, an epoch puts the blocks in an order of its own (a last, shorter one
    stays last), and the windows of every GROUP_BLOCKS blocks that follow one another in it, a group, are permuted. A
    stream below 2^30 tokens is one group: all of its windows are permuted. Windows don't cross the end of a block, so
    where s doesn't divide BLOCK_TOKENS the rest of each is left out: less than one window in 2^20 tokens.
    """

    def __init__(
        self, num_tokens: int, sequence_length: int, seed: int, source_key: str | int, shuffle: bool = True
    ) -> None:
        self.num_tokens, self.sequence_length = num_tokens, sequence_length
        self.seed, self.source_key = seed, source_key
        self.shuffle = shuffle
        self.full_blocks = max(0, num_tokens - 1) // BLOCK_TOKENS
        self.block_windows = BLOCK_TOKENS // sequence_length
        self.tail_tokens = max(0, num_tokens - 1) % BLOCK_TOKENS
        in_blocks = self.full_blocks * self.block_windows + self.tail_tokens // sequence_length
        self.num_samples = in_blocks if shuffle else max(0, num_tokens - 1) // sequence_length  # in an epoch
        self.group_windows = GROUP_BLOCKS * self.block_windows
        # Draws come one after the other, so some of them are computed at once, and the last ones are kept.
        self._turn = min(AHEAD, max(MIN_AHEAD, self.num_samples))
        self._turn_starts = lru_cache(maxsize=2)(self._compute_turn)

    def sample(self, number: int) -> list[tuple[int, int]]:
        """The one piece of a sample, (first token, s + 1)."""
        if not self.shuffle:
            return [(number % self.num_samples * self.sequence_length, self.sequence_length + 1)]
        turn, place = divmod(number, self._turn)
        return [(self._turn_starts(turn)[place], self.sequence_length + 1)]

    def place(self, number: int) -> tuple[int, int, int]:
        """Where a sample stands: epoch, group, and how many samples of the group come before it."""
        epoch, within = divmod(number, self.num_samples)
        return epoch, *divmod(within, self.group_windows)

    def first(self, epoch: int, group: int) -> int:
        """The number of the first sample of a group; that of the next epoch where the group is past the last."""
        return epoch * self.num_samples + min(group * self.group_windows, self.num_samples)

    def rest(self, epoch: int, group: int, reads: Sequence[tuple[int, int]]) -> Rest:
        """What reads of (sequence length, number of samples) have left of a group, as samples of this length."""
        (length, count), *others = reads
        before = Windows(self.num_tokens, length, self.seed, self.source_key)
        starts = before.group_starts(epoch, group, np.arange(count, dtype=np.int64))
        runs = subtract(before.group_runs(epoch, group), (starts, np.full(count, length)))
        key = before.group_key(epoch, group)
        for number, (length, count) in enumerate(others):
            rest = Rest(runs, length, derive_key(key, "rest", number))
            runs = subtract(rest.runs, rest.pieces(np.arange(count)))
        return Rest(runs, self.sequence_length, derive_key(key, "rest", len(others)))

    def _compute_turn(self, turn: int) -> list[int]:
        """The first tokens of the samples [turn x _turn, (turn + 1) x _turn)."""
        epochs, within = np.divmod(turn * self._turn + np.arange(self._turn, dtype=np.int64), self.num_samples)
        groups = within // self.group_windows
        starts = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            for group in np.unique(groups[epochs == epoch]).tolist():
                chosen = (epochs == epoch) & (groups == group)
                starts[chosen] = self.group_starts(epoch, group, within[chosen] - group * self.group_windows)
        return starts.tolist()

    def group_starts(self, epoch: int, group: int, within: np.ndarray) -> np.ndarray:
        """The first tokens of the windows drawn at the places `within` of a group."""
        size = min(self.group_windows, self.num_samples - group * self.group_windows)
        slots, windows = np.divmod(permute(within, size, self.group_key(epoch, group)), self.block_windows)
        return self._block_starts(epoch, group * GROUP_BLOCKS + slots) + windows * self.sequence_length

    def group_runs(self, epoch: int, group: int) -> Runs:
        """All tokens of a group that can be inputs."""
        slots = np.arange(group * GROUP_BLOCKS, min((group + 1) * GROUP_BLOCKS, self.full_blocks + 1), dtype=np.int64)
        lengths = np.where(slots < self.full_blocks, BLOCK_TOKENS, self.tail_tokens)
        return self._block_starts(epoch, slots), lengths

    def group_key(self, epoch: int, group: int) -> int:
        return (self._epoch_key(epoch) + group) % KEYS

    def _epoch_key(self, epoch: int) -> int:
        return derive_key(self.seed, self.source_key, epoch)

    def _block_starts(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        """The first token of the block at each place of an epoch's order."""
        blocks = slots.copy()
        full = slots < self.full_blocks
        if self.full_blocks:
            blocks[full] = permute(slots[full], self.full_blocks, derive_key(self._epoch_key(epoch), "blocks"))
        return blocks * BLOCK_TOKENS


class Source:
    """One dataset as an endless series of samples; draw j is a pure function of (dataset, seed, source_key, cursor, j).

    A sample is a window of s + 1 tokens: s inputs and, one further, s targets. Every epoch draws each window once, in the
    order of `Windows`, or in the order of the file with `shuffle=False`. With `packed`, a sample is at most s + 1 tokens of
    whole documents, in the order of `Packing`. `source_key` tells sources of one blend apart (their number, say); the path
    of the files plays no part.

    `cursor` is where draw 0 is. Where it stands in a group that was read with another sequence length, what is left of
    that group comes first, cut or packed anew: nothing is read twice in an epoch. Of windows less than one sample is left
    out then, and only there does a window consist of several pieces.

    Raises DataError where the dataset is too short for one sample, ConfigError where the samples are too long.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        sequence_length: int,
        seed: int,
        source_key: str | int,
        shuffle: bool = True,
        cursor: Cursor = START,
        packed: bool = False,
    ) -> None:
        if sequence_length > BLOCK_TOKENS:
            raise ConfigError(f"train.sequence_length = {sequence_length} is too large; it may be at most {BLOCK_TOKENS}")
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.packed = packed
        self.cursor = cursor
        self.order = self._open_order(seed, source_key, shuffle)
        self.num_windows = self.order.num_samples
        history = cursor.reads
        self._rest_offset = history[-1][1] if history and history[-1][0] == sequence_length else 0
        self._history = history[:-1] if self._rest_offset else history
        self._rest = self.order.rest(cursor.epoch, cursor.group, self._history) if self._history else None
        # Draws before `_rest_end` are taken from the rest; the others follow the order from `_first` on.
        self._rest_end = self._rest.num_samples - self._rest_offset if self._rest else 0
        if self._rest:
            self._first = self.order.first(cursor.epoch, cursor.group + 1)
        else:
            self._first = self.order.first(cursor.epoch, cursor.group) + self._rest_offset

    def _open_order(self, seed: int, source_key: str | int, shuffle: bool) -> Windows | Packing:
        dataset, length = self.dataset, self.sequence_length
        if self.packed:
            try:
                return Packing(dataset.sequence_lengths, dataset.sequence_starts, length, seed, source_key)
            except DataError as error:
                raise DataError(f"{dataset.bin_path}: {error}") from error
        windows = Windows(dataset.num_tokens, length, seed, source_key, shuffle)
        if windows.num_samples < 1:
            raise DataError(
                f"{dataset.bin_path}: {dataset.num_tokens} tokens are too few for one sample of sequence_length + 1 = "
                f"{length + 1}; use more text or a smaller train.sequence_length"
            )
        return windows

    def pieces(self, draw: int) -> list[tuple[int, int]]:
        """The pieces of a draw (first token, number of tokens), which follow one another.

        They are s + 1 tokens together; of packed samples at most so many, and each piece lies in a document of its own.
        """
        assert draw >= 0
        if draw < self._rest_end:
            return self._rest.sample(draw + self._rest_offset)
        return self.order.sample(draw - self._rest_end + self._first)

    def sample(self, draw: int) -> np.ndarray:
        """The tokens of one draw, int64 [s + 1]; of a packed sample [s + 1 or fewer]."""
        return np.concatenate([self.dataset.read(*piece) for piece in self.pieces(draw)])

    def cursor_after(self, draws: int) -> Cursor:
        """Where the source stands after its first `draws` draws."""
        tokens = self.cursor.tokens + draws * self.sequence_length
        if draws < self._rest_end:
            count = self._rest_offset + draws
            reads = self._history + (((self.sequence_length, count),) if count else ())
            return Cursor(self.cursor.epoch, self.cursor.group, reads, tokens)
        epoch, group, count = self.order.place(draws - self._rest_end + self._first)
        return Cursor(epoch, group, ((self.sequence_length, count),) if count else (), tokens)
