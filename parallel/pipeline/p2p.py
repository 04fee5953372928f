"""Point-to-point messages between pipeline stages: receives posted early, sends that never block.

A message is an activation (towards later stages) or its gradient (towards earlier ones). Messages of one kind from one rank to
another are a *lane*: both ends post them in the same order. Lanes never wait for one another: activations and gradients have
communicators of their own, and so have the two ways between two ranks where a placement uses both. A buffer belongs to its
handle until the message is through.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.collectives import start_receive, start_send
from parallel.groups import ProcessGroups
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import Action
from parallel.pipeline.schedules.action import source_stage, target_stage
from parallel.waiting import ClockedHandle


@dataclass(frozen=True)
class Message:
    """One transfer: `kind` F (an activation) or B (a gradient), of a micro-batch, out of or into the stage `stage`."""

    kind: str
    micro_batch: int
    stage: int

    def is_after(self, other: Message) -> bool:
        """Whether this message can only be made when `other`, of the same micro-batch, has arrived.

        A micro-batch goes up all stages as activations, then down again as gradients.
        """
        if self.micro_batch != other.micro_batch:
            return False
        if self.kind != other.kind:
            return self.kind == "B"
        return self.stage > other.stage if self.kind == "F" else self.stage < other.stage


class Lane(NamedTuple):
    """All messages of one kind between this rank and `peer`, in one direction."""

    kind: str
    peer: int


class Transfer(NamedTuple):
    """A message under way: the buffer belongs to it until `work` is done."""

    message: Message
    buffer: Tensor
    work: ClockedHandle


def received(action: Action, rank: int, placement: Placement) -> Message | None:
    """The message that an action needs: it comes out of the neighbouring stage. None at the ends and for W."""
    source = source_stage(action.kind, placement.stage(rank, action.chunk), placement.num_stages)
    return None if source is None else Message("F" if action.kind == "F" else "B", action.micro_batch, source)


def sent(action: Action, rank: int, placement: Placement) -> tuple[Message, int] | None:
    """The message that an action makes and the pp rank that needs it. None at the ends and for W."""
    stage = placement.stage(rank, action.chunk)
    target = target_stage(action.kind, stage, placement.num_stages)
    if target is None:
        return None
    return Message("F" if action.kind == "F" else "B", action.micro_batch, stage), placement.rank(target)


def _edges(placement: Placement) -> set[tuple[int, int]]:
    """(source, target) of all activations between ranks; gradients go the other way."""
    ranks = [placement.rank(stage) for stage in range(placement.num_stages)]
    return {(source, target) for source, target in zip(ranks, ranks[1:], strict=False) if source != target}


def both_ways(placement: Placement) -> bool:
    """Whether activations go both ways between some two ranks, so that each way needs a communicator of its own."""
    edges = _edges(placement)
    return any((target, source) in edges for source, target in edges)


def open_lanes(placement: Placement, groups: ProcessGroups, device: torch.device) -> None:
    """Send one number along every lane, in the same order on all ranks, which call it together before the first run.

    NCCL makes the communicator of two ranks at their first message, and the host of each waits for the other then. In a
    schedule, one end would wait so for its first gradient while the other end waits for the activation to make it from.
    """
    edges = _edges(placement)
    lanes = {("F", source, target) for source, target in edges} | {("B", target, source) for source, target in edges}
    rank, number = groups.place.pp, torch.zeros(1, device=device)
    for kind, source, target in sorted(lanes):
        axis = groups.lane(kind, source, target)
        if rank == source:
            start_send(number, axis, target, tag=0).wait()
        elif rank == target:
            start_receive(number, axis, source, tag=0).wait()


class Mailbox:
    """This rank's messages of one run over a list of actions."""

    def __init__(
        self,
        actions: Sequence[Action],
        placement: Placement,
        groups: ProcessGroups,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.placement, self.groups, self.rank = placement, groups, groups.place.pp
        self.shape, self.dtype, self.device = shape, dtype, device
        self.expected: dict[Lane, deque[Message]] = defaultdict(deque)
        self.posted: dict[Lane, deque[Transfer]] = defaultdict(deque)
        self.sending: dict[Lane, deque[Transfer]] = defaultdict(deque)
        self.local: dict[Message, Tensor] = {}
        self._note(actions)

    def _note(self, actions: Sequence[Action]) -> None:
        """Line up the messages that the actions need."""
        for action in actions:
            message = received(action, self.rank, self.placement)
            if message is not None and not self._is_local(message):
                self.expected[self._inbound(message)].append(message)

    def _is_local(self, message: Message) -> bool:
        return self.placement.rank(message.stage) == self.rank

    def _inbound(self, message: Message) -> Lane:
        return Lane(message.kind, self.placement.rank(message.stage))

    def _tag(self, message: Message) -> int:
        return message.micro_batch * self.placement.num_stages + message.stage

    def start(self) -> None:
        """Post the first receive of every lane."""
        for lane in self.expected:
            if not self.posted[lane]:
                self._post_receive(lane)

    def extend(self, actions: Sequence[Action]) -> None:
        """The run goes on with `actions`."""
        self._note(actions)
        self.start()

    def _post_receive(self, lane: Lane) -> None:
        """Post the next receive of a lane, if there is one more."""
        if self.expected[lane]:
            message = self.expected[lane].popleft()
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            axis = self.groups.lane(lane.kind, lane.peer, self.rank)
            work = start_receive(buffer, axis, lane.peer, self._tag(message))
            self.posted[lane].append(Transfer(message, buffer, work))

    def take(self, message: Message) -> Tensor:
        """The message's tensor. Waits for it; the lane's next receive is posted first, to arrive behind the computation."""
        if self._is_local(message):
            return self.local.pop(message)
        lane = self._inbound(message)
        self._post_receive(lane)
        transfer = self.posted[lane].popleft()
        assert transfer.message == message, f"{message} is needed, but {transfer.message} comes first from its rank"
        transfer.work.wait()
        self._release_before(message)
        return transfer.buffer

    def _release_before(self, arrived: Message) -> None:
        """Drop the messages that must have got through for `arrived` to exist, and those before them in their lanes."""
        for lane in self.sending.values():
            through = [place for place, transfer in enumerate(lane) if arrived.is_after(transfer.message)]
            for _ in range(through[-1] + 1 if through else 0):
                lane.popleft().work.wait()  # returns at once

    def put(self, message: Message, peer: int, tensor: Tensor) -> None:
        """Send to pp rank `peer`, or hand over where both stages are on this rank. Never blocks; the tensor must not change.

        Messages that are through are let go. gloo says so of a send only when it is waited for: there, a tensor stays until a
        message arrives that was made after it; the last gradients of a micro-batch on this rank, until `finish`.
        """
        if peer == self.rank:
            self.local[message] = tensor
            return
        tensor = tensor.contiguous()
        work = start_send(tensor, self.groups.lane(message.kind, self.rank, peer), peer, self._tag(message))
        lane = self.sending[Lane(message.kind, peer)]
        while lane and lane[0].work.is_completed():
            lane.popleft()
        lane.append(Transfer(message, tensor, work))

    def discard(self, unread: Sequence[Message]) -> None:
        """Give up a run whose actions so far have all ended: read `unread`, which others have sent, and let all of it go."""
        self.local.clear()
        for message in unread:
            lane = self._inbound(message)
            self.expected[lane].append(message)
            self._post_receive(lane)
            self.posted[lane].popleft().work.wait()
        self.finish()

    def finish(self) -> None:
        """Wait for the last sends."""
        left_over = any(self.expected.values()) or any(self.posted.values()) or self.local
        assert not left_over, "messages left over"
        for lane in self.sending.values():
            while lane:
                lane.popleft().work.wait()
