"""What a schedule is made of."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Action(NamedTuple):
    """Compute on one micro-batch and one chunk of this rank.

    `kind`: F (forward), B (whole backward), I (backward to the input only), W (weight gradients left by I).
    """

    kind: str
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


Schedule = list[list[Action]]  # actions of pp rank 0, 1, ...


def source_stage(kind: str, stage: int, num_stages: int) -> int | None:
    """The global stage whose message an action of `stage` needs, or None."""
    source = {"F": stage - 1, "B": stage + 1, "I": stage + 1}.get(kind, -1)
    return source if 0 <= source < num_stages else None


def target_stage(kind: str, stage: int, num_stages: int) -> int | None:
    """The global stage that needs the message of an action of `stage`, or None."""
    target = {"F": stage + 1, "B": stage - 1, "I": stage - 1}.get(kind, -1)
    return target if 0 <= target < num_stages else None


def actions_of(pattern: str, micro_batches: int) -> list[Action]:
    """One rank's actions from a word: FBI of chunk 0, fbi of chunk 1, and W for the oldest I that has none yet.

    The micro-batches of each letter count up (B and I of a chunk together); those that don't exist are left out.
    """
    following = {"F": 0, "f": 0, "B": 0, "b": 0}
    waiting: deque[Action] = deque()
    actions = []
    for letter in pattern:
        if letter == "W":
            actions.append(waiting.popleft())
            continue
        counter = {"I": "B", "i": "b"}.get(letter, letter)
        micro_batch, chunk = following[counter], int(letter.islower())
        if micro_batch < micro_batches:
            actions.append(Action(letter.upper(), micro_batch, chunk))
            following[counter] += 1
            if counter != letter:
                waiting.append(Action("W", micro_batch, chunk))
    return actions
