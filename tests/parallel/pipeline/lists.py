"""Lists of actions for tests of what runs them, made by rules too simple to be wrong."""

from __future__ import annotations

from collections import deque

from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import Action, Schedule


def all_forward_all_backward(placement: Placement, micro_batches: int) -> Schedule:
    """gpipe for any number of chunks: chunk after chunk forward, then back."""
    chunks, batches = range(placement.chunks), range(micro_batches)
    forward = [Action("F", m, chunk) for chunk in chunks for m in batches]
    backward = [Action("B", m, chunk) for chunk in reversed(chunks) for m in batches]
    return [forward + backward for _ in range(placement.pp)]


def split_backward(schedule: Schedule, delay: int) -> Schedule:
    """Every B as an I, and its W after `delay` further ones (0: at once); what is left at the end."""
    return [_split(actions, delay) for actions in schedule]


def _split(actions: list[Action], delay: int) -> list[Action]:
    made: list[Action] = []
    waiting: deque[Action] = deque()
    for action in actions:
        if action.kind != "B":
            made.append(action)
            continue
        made.append(_as(action, "I"))
        waiting.append(_as(action, "W"))
        if len(waiting) > delay:
            made.append(waiting.popleft())
    return made + list(waiting)


def _as(action: Action, kind: str) -> Action:
    return Action(kind, action.micro_batch, action.chunk)
