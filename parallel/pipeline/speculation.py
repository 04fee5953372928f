"""Forward passes on weights that may still be corrected: which ones a step can begin with, and what their messages are.

An optimizer that updates before all ranks have agreed on the gradient norm (`parallel.zero.post_validation`) knows only during
the next step whether the update was right. Until then a rank runs forward passes alone, which leave nothing behind: if the
weights are corrected, their activations are dropped and the step begins again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parallel.pipeline.layout import Placement
from parallel.pipeline.p2p import Message, received, sent
from parallel.pipeline.schedules import Action, Schedule


@dataclass(frozen=True)
class SpeculativeStart:
    """How one rank begins a step: its first `length` actions, then `validate`.

    `validate` says whether the weights were right; it has corrected them otherwise. `unread` are the messages that other ranks'
    speculative actions send here and this rank's do not take, lane by lane in the order of sending.
    """

    length: int
    unread: Sequence[Message]
    validate: Callable[[], bool]


def speculative_start(
    schedule: Schedule, placement: Placement, rank: int, validate: Callable[[], bool]
) -> SpeculativeStart:
    """The speculative actions of pp rank `rank`: all ranks compute the same cut of the schedule, and each takes its part."""
    lengths = speculative_lengths(schedule, placement)
    taken = {received(action, rank, placement) for action in schedule[rank][: lengths[rank]]}
    arriving = [
        message
        for message, target in _messages(schedule, lengths, placement)
        if target == rank != placement.rank(message.stage)
    ]
    unread = [message for message in arriving if message not in taken]
    return SpeculativeStart(lengths[rank], unread, validate)


def speculative_lengths(schedule: Schedule, placement: Placement) -> list[int]:
    """How many actions each rank can run before any rank has validated: the forward passes that its list begins with.

    Of these, only those that need nothing but one another: every rank gets to its end of the cut, whatever the others do
    there, so it may wait there for them.
    """
    lengths = [
        next((index for index, action in enumerate(actions) if action.kind != "F"), len(actions)) for actions in schedule
    ]
    while True:
        made = {message for message, _ in _messages(schedule, lengths, placement)}
        closed = [_closed_length(schedule[rank][: lengths[rank]], rank, placement, made) for rank in range(placement.pp)]
        if closed == lengths:
            return lengths
        lengths = closed


def _closed_length(actions: Sequence[Action], rank: int, placement: Placement, made: set[Message]) -> int:
    """How many of the actions come before one whose message is not `made`."""
    for index, action in enumerate(actions):
        message = received(action, rank, placement)
        if message is not None and message not in made:
            return index
    return len(actions)


def _messages(schedule: Schedule, lengths: list[int], placement: Placement) -> list[tuple[Message, int]]:
    """The messages that the first `lengths` actions of the ranks make, each with the rank that needs it."""
    outgoing = [
        sent(action, rank, placement)
        for rank, (actions, length) in enumerate(zip(schedule, lengths, strict=True))
        for action in actions[:length]
    ]
    return [made for made in outgoing if made is not None]
