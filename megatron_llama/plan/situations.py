"""What a pipeline rank holds when an action runs: counted on the schedule's own action lists, whatever the sizes are.

A step's peak is in one of a few situations, as most of them hold no more of anything than another one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from parallel.pipeline.layout import Placement
from parallel.pipeline.p2p import Message, received, sent
from parallel.pipeline.schedules import SCHEDULES, Action

MOST_WALKED = 16  # pipeline ranks; with more, a rank holds proportionally more
WARM = 2  # as many micro-batches per rank fill a pipeline


class Situation(NamedTuple):
    """An action that runs, and what its rank holds of each chunk then, in micro-batches.

    `held`: between F and the backward pass, the action's own included; `queued`: between I and W. `messages`: buffers of those
    received and sent. `last`: with it the chunk's weight gradients are complete; such a situation is there a second time, as
    any other.
    """

    kind: str
    chunk: int
    held: tuple[float, ...]
    queued: tuple[float, ...]
    messages: int
    last: bool


@lru_cache(maxsize=4096)
def situations(
    schedule: str, pp: int, chunks: int, micro_batches: int, every: bool = False
) -> tuple[tuple[Situation, ...], ...]:
    """Of each pipeline rank, those in which most is held; of each kind and chunk one, with the most messages of any.

    `every`: all those in which no other one holds as much of everything, and a message that was sent stays until an answer to
    it arrives, as on gloo. It takes a thousand times as long as a formula.
    """
    if every:
        return _found(schedule, pp, chunks, micro_batches, every)
    walked = min(pp, MOST_WALKED)
    walked_batches = min(micro_batches, WARM * walked + micro_batches % walked)
    found = _found(schedule, walked, chunks, walked_batches, every)
    factor = pp / walked * (micro_batches / walked_batches if schedule == "gpipe" else 1.0)
    scaled = [tuple(_scaled(one, factor) for one in of_rank) for of_rank in found]
    return tuple(scaled[rank * walked // pp] for rank in range(pp))


@lru_cache(maxsize=1024)
def _found(schedule: str, pp: int, chunks: int, micro_batches: int, every: bool) -> tuple[tuple[Situation, ...], ...]:
    """The situations of each rank's action list."""
    kind = SCHEDULES[schedule]
    placement = kind.placement(pp, chunks)
    found = []
    for rank, actions in enumerate(kind(placement, micro_batches)):
        mailbox = _Mailbox(actions, rank, placement) if every else _Lanes(rank, placement)
        all_of_them = _walk(actions, rank, placement, mailbox)
        found.append(_incomparable(all_of_them) if every else _fullest(all_of_them))
    return tuple(found)


def _scaled(one: Situation, factor: float) -> Situation:
    if factor == 1.0:
        return one
    return one._replace(held=tuple(count * factor for count in one.held), queued=tuple(count * factor for count in one.queued))


def _walk(actions: Sequence[Action], rank: int, placement: Placement, mailbox: _Mailbox | _Lanes) -> list[Situation]:
    """Each action's situation."""
    held, queued = [0] * placement.chunks, [0] * placement.chunks
    left = [sum(action.kind in "BW" and action.chunk == chunk for action in actions) for chunk in range(placement.chunks)]
    found = []
    for action in actions:
        kind, _, chunk = action
        if kind == "F":
            held[chunk] += 1
        left[chunk] -= kind in "BW"
        messages, last = mailbox.take(action), kind in "BW" and not left[chunk]
        found.append(Situation(kind, chunk, tuple(held), tuple(queued), messages, last))
        held[chunk] -= kind in "BI"
        queued[chunk] += (kind == "I") - (kind == "W")
        mailbox.put(action)
    return found


class _Lanes:
    """The most buffers that a rank has where a send is known to be through: one in each lane, and the message just taken."""

    def __init__(self, rank: int, placement: Placement) -> None:
        edges = [(chunk, kind) for chunk in range(placement.chunks) for kind in "FB"]
        sources = {received(Action(kind, 0, chunk), rank, placement) for chunk, kind in edges} - {None}
        sends = {sent(Action(kind, 0, chunk), rank, placement) for chunk, kind in edges} - {None}
        inbound = {(message.kind, placement.rank(message.stage)) for message in sources}
        outbound = {(message.kind, peer) for message, peer in sends}
        self.count = len(inbound | {("to", *lane) for lane in outbound}) + bool(inbound)

    def take(self, action: Action) -> int:
        """The same for all actions."""
        return self.count

    def put(self, action: Action) -> None:
        """Counted already."""


class _Mailbox:
    """The buffers that `parallel.pipeline.p2p.Mailbox` has on gloo, where what was sent stays until an answer comes."""

    def __init__(self, actions: Sequence[Action], rank: int, placement: Placement) -> None:
        self.rank, self.placement = rank, placement
        needed = (received(action, rank, placement) for action in actions)
        self.expected: dict[tuple[str, int], int] = defaultdict(int)
        for message in needed:
            if message is not None and not self._is_local(message):
                self.expected[self._lane(message)] += 1
        self.posted = {lane: 1 for lane in self.expected}
        self.sending: dict[tuple[str, int], deque[Message]] = defaultdict(deque)
        self.local = 0

    def _is_local(self, message: Message) -> bool:
        return self.placement.rank(message.stage) == self.rank

    def _lane(self, message: Message) -> tuple[str, int]:
        return message.kind, self.placement.rank(message.stage)

    def take(self, action: Action) -> int:
        """The buffers while the action runs; an F or I counts what it takes as its own."""
        message = received(action, self.rank, self.placement)
        if message is not None and self._is_local(message):
            self.local -= 1
        elif message is not None:
            lane = self._lane(message)
            self.expected[lane] -= 1
            self.posted[lane] = min(1, self.expected[lane])
            for lane in self.sending.values():
                while any(message.is_after(one) for one in lane):
                    lane.popleft()
        taken = message is not None and action.kind == "B"
        return sum(self.posted.values()) + self.local + taken + sum(map(len, self.sending.values()))

    def put(self, action: Action) -> None:
        """What the action has made is on its way."""
        message = sent(action, self.rank, self.placement)
        if message is not None and message[1] == self.rank:
            self.local += 1
        elif message is not None:
            self.sending[message[0].kind, message[1]].append(message[0])


def _fullest(all_of_them: Sequence[Situation]) -> tuple[Situation, ...]:
    """Of each kind and chunk the one that holds most, and the last one."""
    fullest: dict[tuple[str, int, bool], Situation] = {}
    for one in [*all_of_them, *_but_for_buckets(all_of_them)]:
        key, size = (one.kind, one.chunk, one.last), sum(one.held) + sum(one.queued)
        if key not in fullest or size > sum(fullest[key].held) + sum(fullest[key].queued):
            fullest[key] = one
    return tuple(fullest.values())


def _incomparable(all_of_them: Sequence[Situation]) -> tuple[Situation, ...]:
    """Those that no other one of the same action exceeds in everything."""
    kept: list[Situation] = []
    different = {*all_of_them, *_but_for_buckets(all_of_them)}
    for one in sorted(different, key=lambda one: (-sum(one.held) - sum(one.queued), -one.messages)):
        if not any(_covers(other, one) for other in kept):
            kept.append(one)
    return tuple(kept)


def _but_for_buckets(all_of_them: Sequence[Situation]) -> list[Situation]:
    """The last ones as any other: for what is held besides buckets."""
    return [one._replace(last=False) for one in all_of_them if one.last]


def _covers(other: Situation, one: Situation) -> bool:
    same = (other.kind, other.chunk, other.last) == (one.kind, one.chunk, one.last)
    if not same or other.messages < one.messages:
        return False
    return all(a >= b for a, b in zip(other.held + other.queued, one.held + one.queued, strict=True))
