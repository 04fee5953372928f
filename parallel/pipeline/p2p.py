"""Point-to-point messages between pipeline stages: receives posted early, sends that never block.

A message is an activation (towards later stages) or its gradient (towards earlier ones). The two directions have a
communicator each, and on each the two ends post messages in the order of the micro-batches. A buffer belongs to its handle
until the message is through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import start_receive, start_send
from parallel.groups import Axis
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import Action


@dataclass(frozen=True)
class Message:
    """One transfer: `kind` F (an activation) or B (a gradient), of a micro-batch, out of or into the stage `stage`."""

    kind: str
    micro_batch: int
    stage: int


def received(action: Action, rank: int, placement: Placement) -> Message | None:
    """The message that an action needs: it comes out of the neighbouring stage. None at the ends and for W."""
    stage = placement.stage(rank, action.chunk)
    if action.kind == "F" and stage > 0:
        return Message("F", action.micro_batch, stage - 1)
    if action.kind in ("B", "I") and stage < placement.num_stages - 1:
        return Message("B", action.micro_batch, stage + 1)
    return None


def sent(action: Action, rank: int, placement: Placement) -> tuple[Message, int] | None:
    """The message that an action makes and the pp rank that needs it. None at the ends and for W."""
    stage = placement.stage(rank, action.chunk)
    if action.kind == "F" and stage < placement.num_stages - 1:
        return Message("F", action.micro_batch, stage), placement.rank(stage + 1)
    if action.kind in ("B", "I") and stage > 0:
        return Message("B", action.micro_batch, stage), placement.rank(stage - 1)
    return None


class Mailbox:
    """This rank's messages of one run over a list of actions."""

    def __init__(
        self,
        actions: Sequence[Action],
        placement: Placement,
        forward_axis: Axis,
        backward_axis: Axis,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.placement = placement
        self.axes = {"F": forward_axis, "B": backward_axis}
        self.rank = forward_axis.rank
        self.shape, self.dtype, self.device = shape, dtype, device
        needed = (received(action, self.rank, placement) for action in actions)
        self.expected = [message for message in needed if message is not None and not self._is_local(message)]
        self.posted: dict[Message, tuple[Tensor, dist.Work]] = {}
        self.local: dict[Message, Tensor] = {}
        self.sending: dict[Message, tuple[Tensor, dist.Work]] = {}

    def _is_local(self, message: Message) -> bool:
        return self.placement.rank(message.stage) == self.rank

    def _tag(self, message: Message) -> int:
        return message.micro_batch * self.placement.num_stages + message.stage

    def post_receives(self, count: int) -> None:
        """Post the next receives, in the order of need, until `count` are waiting."""
        while self.expected and len(self.posted) < count:
            message = self.expected.pop(0)
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            peer = self.placement.rank(message.stage)
            self.posted[message] = (buffer, start_receive(buffer, self.axes[message.kind], peer, self._tag(message)))

    def take(self, message: Message) -> Tensor:
        """The message's tensor. Waits for it; one more receive is posted first, to arrive behind the computation."""
        if self._is_local(message):
            return self.local.pop(message)
        self.post_receives(1)
        buffer, work = self.posted.pop(message)
        self.post_receives(1)
        work.wait()
        if message.kind == "B":  # the answer to an activation: it has arrived, so it need not be kept
            self._release(Message("F", message.micro_batch, message.stage - 1))
        return buffer

    def _release(self, message: Message) -> None:
        """Drop a message that is known to be through; waiting for it returns at once."""
        tensor_and_work = self.sending.pop(message, None)
        if tensor_and_work is not None:
            tensor_and_work[1].wait()

    def put(self, message: Message, peer: int, tensor: Tensor) -> None:
        """Send to pp rank `peer`, or hand over where both stages are on this rank. Never blocks; the tensor must not change.

        Messages that are through are let go. gloo says so of a send only when it is waited for: there, gradients stay until
        `finish`, activations until their gradient comes back.
        """
        if peer == self.rank:
            self.local[message] = tensor
            return
        tensor = tensor.contiguous()
        work = start_send(tensor, self.axes[message.kind], peer, self._tag(message))
        self.sending = {m: (t, w) for m, (t, w) in self.sending.items() if not w.is_completed()}
        self.sending[message] = (tensor, work)

    def finish(self) -> None:
        """Wait for the last sends."""
        assert not self.expected and not self.posted and not self.local, "messages left over"
        for _, work in self.sending.values():
            work.wait()
        self.sending = {}
