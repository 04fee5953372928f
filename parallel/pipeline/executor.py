"""The executor: runs one rank's list of actions, whatever the schedule.

A stage is a module `stage(x, micro_batch) -> y`: `x` is None on the first stage, and `y` on the last one is the
micro-batch's loss (training, evaluation) or whatever the model returns there (generation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.groups import ProcessGroups
from parallel.pipeline.layout import Placement
from parallel.pipeline.p2p import Mailbox, received, sent
from parallel.pipeline.schedules import Action


class StepListener(Protocol):
    """What an optimizer engine is told during a step. Schedules and stages know nothing else of it."""

    def last_use(self, chunk: int) -> None:
        """The backward pass that follows is the chunk's last of this step."""

    def no_more_grads(self, chunk: int) -> None:
        """All gradients of the chunk are made."""


@dataclass
class InFlight:
    """What stays between a micro-batch's forward and backward pass: the leaf input and the output's edge in the graph.

    The output itself is not kept: the edge is enough to start the backward pass from.
    """

    x: Tensor | None
    edge: GradientEdge


@dataclass
class Executor:
    """Runs action lists over this rank's chunks.

    `shape` and `dtype` are those of the activations between stages. `peak_in_flight` is the most micro-batches (times chunks)
    that were ever between forward and backward in the last run.
    """

    chunks: Sequence[nn.Module]
    placement: Placement
    groups: ProcessGroups
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    peak_in_flight: int = 0
    _in_flight: dict[tuple[int, int], InFlight] = field(default_factory=dict)

    def run(self, actions: list[Action], micro_batches: Sequence[Any], listener: StepListener | None = None) -> list[Tensor]:
        """Run the list. Returns, on the rank of the last stage, each micro-batch's last output, detached; elsewhere [].

        With a `listener` the chunks are trained; without one, nothing is kept for a backward pass.
        """
        mailbox = self._mailbox(actions)
        last_backward = {action.chunk: index for index, action in enumerate(actions) if action.kind in ("B", "W")}
        outputs: list[Tensor] = []
        self.peak_in_flight = 0
        self._in_flight.clear()
        mailbox.post_receives(1)
        for index, action in enumerate(actions):
            try:
                if action.kind == "F":
                    self._forward(action, micro_batches[action.micro_batch], mailbox, outputs, train=listener is not None)
                    continue
                assert action.kind == "B" and listener is not None, f"cannot run {action}"
                is_last = last_backward[action.chunk] == index
                if is_last:
                    listener.last_use(action.chunk)
                self._backward(action, mailbox)
                if is_last:
                    listener.no_more_grads(action.chunk)
            except Exception as error:
                error.add_note(self._where(action))
                raise
        mailbox.finish()
        return outputs

    def _where(self, action: Action) -> str:
        """For whoever reads a failure: which rank, which action, which collective was the last to start."""
        groups = self.groups
        return (
            f"in action {action} of stage {self.placement.stage(groups.place.pp, action.chunk)}, at {groups.place} of "
            f"{groups.topology}; last collective: {groups.ledger.last}"
        )

    def _mailbox(self, actions: list[Action]) -> Mailbox:
        groups = self.groups
        return Mailbox(
            actions, self.placement, groups.pp_forward, groups.pp_backward, self.shape, self.dtype, self.device
        )

    def _forward(self, action: Action, micro_batch: Any, mailbox: Mailbox, outputs: list[Tensor], train: bool) -> None:
        rank = self.groups.pp_forward.rank
        message = received(action, rank, self.placement)
        x = mailbox.take(message) if message is not None else None
        with torch.set_grad_enabled(train):
            if x is not None and train:
                x = x.detach().requires_grad_()
            y = self.chunks[action.chunk](x, micro_batch)
        if train:
            self._in_flight[action.micro_batch, action.chunk] = InFlight(x, get_gradient_edge(y))
            self.peak_in_flight = max(self.peak_in_flight, len(self._in_flight))
        outgoing = sent(action, rank, self.placement)
        if outgoing is None:
            outputs.append(y.detach())
        else:
            mailbox.put(*outgoing, y.detach())

    def _backward(self, action: Action, mailbox: Mailbox) -> None:
        rank = self.groups.pp_forward.rank
        message = received(action, rank, self.placement)
        dy = mailbox.take(message) if message is not None else None
        flight = self._in_flight.pop((action.micro_batch, action.chunk))
        torch.autograd.backward(flight.edge, dy)
        outgoing = sent(action, rank, self.placement)
        if outgoing is not None:
            assert flight.x is not None and flight.x.grad is not None
            mailbox.put(*outgoing, flight.x.grad)
