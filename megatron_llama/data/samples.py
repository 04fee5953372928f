"""Which window of a dataset is drawn when: a pure function of the draw's number, nothing stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_llama.data.indexed import IndexedDataset
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
    the group. `tokens` were read in all, since the first epoch.
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

    def __init__(self, num_tokens: int, sequence_length: int, seed: int, source_key: str | int) -> None:
        self.num_tokens, self.sequence_length = num_tokens, sequence_length
        self.seed, self.source_key = seed, source_key
        self.full_blocks = max(0, num_tokens - 1) // BLOCK_TOKENS
        self.block_windows = BLOCK_TOKENS // sequence_length
        self.tail_tokens = max(0, num_tokens - 1) % BLOCK_TOKENS
        self.num_windows = self.full_blocks * self.block_windows + self.tail_tokens // sequence_length  # in an epoch
        self.group_windows = GROUP_BLOCKS * self.block_windows
        # Draws come one after the other, so some of them are computed at once, and the last ones are kept.
        self._turn = min(AHEAD, max(MIN_AHEAD, self.num_windows))
        self._turn_starts = lru_cache(maxsize=2)(self._compute_turn)

    def starts(self, draws: np.ndarray) -> np.ndarray:
        """The first token of each draw, int64."""
        starts = np.empty_like(draws)
        turns, places = np.divmod(draws, self._turn)
        for turn in np.unique(turns).tolist():
            chosen = turns == turn
            starts[chosen] = self._turn_starts(turn)[places[chosen]]
        return starts

    def _compute_turn(self, turn: int) -> np.ndarray:
        """The first tokens of the draws [turn x _turn, (turn + 1) x _turn)."""
        epochs, within = np.divmod(turn * self._turn + np.arange(self._turn, dtype=np.int64), self.num_windows)
        groups = within // self.group_windows
        starts = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            for group in np.unique(groups[epochs == epoch]).tolist():
                chosen = (epochs == epoch) & (groups == group)
                starts[chosen] = self.group_starts(epoch, group, within[chosen] - group * self.group_windows)
        return starts

    def group_starts(self, epoch: int, group: int, within: np.ndarray) -> np.ndarray:
        """The first tokens of the windows drawn at the places `within` of a group."""
        size = min(self.group_windows, self.num_windows - group * self.group_windows)
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
    order of `Windows`, or in the order of the file with `shuffle=False`. `source_key` tells sources of one blend apart
    (their number, say); the path of the files plays no part.

    `cursor` is where draw 0 is. Where it stands in a group that was read with another sequence length, what is left of
    that group comes first, cut anew: nothing is read twice in an epoch, and less than one sample is left out. Only there
    does a sample consist of several pieces.

    Raises DataError where the dataset is too short for one window, ConfigError where the windows are too long.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        sequence_length: int,
        seed: int,
        source_key: str | int,
        shuffle: bool = True,
        cursor: Cursor = START,
    ) -> None:
        if sequence_length > BLOCK_TOKENS:
            raise ConfigError(f"train.sequence_length = {sequence_length} is too large; it may be at most {BLOCK_TOKENS}")
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.seed = seed
        self.source_key = source_key
        self.shuffle = shuffle
        self.cursor = cursor
        self.windows = Windows(dataset.num_tokens, sequence_length, seed, source_key)
        self.num_windows = self.windows.num_windows if shuffle else (dataset.num_tokens - 1) // sequence_length
        if self.num_windows < 1:
            raise DataError(
                f"{dataset.bin_path}: {dataset.num_tokens} tokens are too few for one sample of sequence_length + 1 = "
                f"{sequence_length + 1}; use more text or a smaller train.sequence_length"
            )
        history = cursor.reads
        self._rest_offset = history[-1][1] if history and history[-1][0] == sequence_length else 0
        self._history = history[:-1] if self._rest_offset else history
        self._rest = self._left_over() if self._history else None
        # Draws before `_rest_end` are taken from the rest; the others are windows, numbered from `_first_window` on.
        self._rest_end = self._rest.num_samples - self._rest_offset if self._rest else 0
        windows = self.windows
        if self._rest:
            in_epoch = min((cursor.group + 1) * windows.group_windows, self.num_windows)
        else:
            in_epoch = cursor.group * windows.group_windows + self._rest_offset
        self._first_window = cursor.epoch * self.num_windows + in_epoch

    def start_token(self, draws: np.ndarray | int) -> np.ndarray:
        """The first token of the window of each draw, which must not be one of several pieces."""
        draws = np.asarray(draws, np.int64)
        assert draws.size == 0 or draws.min() >= self._rest_end
        numbers = draws - self._rest_end + self._first_window
        if not self.shuffle:
            return numbers % self.num_windows * self.sequence_length
        return self.windows.starts(numbers)

    def pieces(self, draws: np.ndarray) -> list[list[tuple[int, int]]]:
        """Per draw, its pieces (first token, number of tokens), which follow one another: s + 1 tokens together."""
        draws = np.asarray(draws, np.int64)
        whole = draws >= self._rest_end
        starts = np.zeros_like(draws)
        starts[whole] = self.start_token(draws[whole])
        return [
            [(start, self.sequence_length + 1)] if is_whole else self._rest_pieces(draw)
            for draw, start, is_whole in zip(draws.tolist(), starts.tolist(), whole.tolist(), strict=True)
        ]

    def sample(self, draw: int) -> np.ndarray:
        """The s + 1 tokens of one draw, int64 [s + 1]."""
        return np.concatenate([self.dataset.read(*piece) for piece in self.pieces(np.array([draw]))[0]])

    def cursor_after(self, draws: int) -> Cursor:
        """Where the source stands after its first `draws` draws."""
        tokens = self.cursor.tokens + draws * self.sequence_length
        if draws < self._rest_end:
            count = self._rest_offset + draws
            reads = self._history + (((self.sequence_length, count),) if count else ())
            return Cursor(self.cursor.epoch, self.cursor.group, reads, tokens)
        epoch, within = divmod(draws - self._rest_end + self._first_window, self.num_windows)
        group, count = divmod(within, self.windows.group_windows)
        return Cursor(epoch, group, ((self.sequence_length, count),) if count else (), tokens)

    def _left_over(self) -> Rest:
        """What the reads of the cursor have left of its group, as samples of this length."""
        epoch, group = self.cursor.epoch, self.cursor.group
        length, count = self._history[0]
        before = Windows(self.dataset.num_tokens, length, self.seed, self.source_key)
        starts = before.group_starts(epoch, group, np.arange(count, dtype=np.int64))
        runs = subtract(before.group_runs(epoch, group), (starts, np.full(count, length)))
        key = before.group_key(epoch, group)
        for number, (length, count) in enumerate(self._history[1:]):
            rest = Rest(runs, length, derive_key(key, "rest", number))
            runs = subtract(rest.runs, rest.pieces(np.arange(count)))
        return Rest(runs, self.sequence_length, derive_key(key, "rest", len(self._history) - 1))

    def _rest_pieces(self, draw: int) -> list[tuple[int, int]]:
        assert self._rest is not None
        starts, lengths = self._rest.pieces(np.array([draw + self._rest_offset]))
        lengths[-1] += 1  # the target of the last input
        return list(zip(starts.tolist(), lengths.tolist(), strict=True))
