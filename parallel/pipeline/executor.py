"""The executor: runs one rank's list of actions, whatever the schedule.

A stage is a module `stage(x, micro_batch) -> y`: `x` is None on the first stage, and `y` on the last one is the
micro-batch's loss (training, evaluation) or whatever the model returns there (generation). A stage whose backward pass can be
split into I and W has a `WeightGradientQueue` as its attribute `weight_gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.graphs import MicroBatchGraphs
from parallel.groups import ProcessGroups
from parallel.heartbeat import WAITS
from parallel.pipeline.layout import Placement
from parallel.pipeline.p2p import Mailbox, received, sent
from parallel.pipeline.schedules import Action
from parallel.pipeline.speculation import SpeculativeStart
from parallel.pipeline.trace import Trace
from parallel.tensor.deferred import WeightGradientQueue


class StepListener(Protocol):
    """What an optimizer engine is told of a step. Schedules and stages know nothing else of it.

    When a gradient is made, the parameter's sink is told; so the engine counts, and no order of I and W can mislead it.
    """

    def expect_passes(self, count: int) -> None:
        """Every chunk makes the gradients of `count` backward passes in this step; said before the first of them.

        Replays of a graph are not among them: sinks are not told of theirs.
        """


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

    `shape` and `dtype` are those of the activations between stages. `trace`, where given, times the actions of the runs that
    follow; `graphs`, where given, launch some of them, when training. Of the last run, `peak_in_flight` is the most
    micro-batches (times chunks) that were ever between forward and backward pass by Python, `peak_waiting` the most that were
    ever between I and W.
    """

    chunks: Sequence[nn.Module]
    placement: Placement
    groups: ProcessGroups
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    trace: Trace | None = None
    graphs: MicroBatchGraphs | None = None
    peak_in_flight: int = 0
    peak_waiting: int = 0
    _in_flight: dict[tuple[int, int], InFlight] = field(default_factory=dict)

    @property
    def _queues(self) -> list[WeightGradientQueue]:
        return [chunk.weight_gradients for chunk in self.chunks if hasattr(chunk, "weight_gradients")]

    def run(
        self,
        actions: list[Action],
        micro_batches: Sequence[Any],
        listener: StepListener | None = None,
        start: SpeculativeStart | None = None,
    ) -> list[Tensor]:
        """Run the list. Returns, on the rank of the last stage, each micro-batch's last output, detached; elsewhere [].

        With a `listener` the chunks are trained; without one, nothing is kept for a backward pass. With a `start`, the list
        begins with actions on weights that may turn out to be wrong; it begins again then, on all ranks.
        """
        self._start_clean()
        outputs: list[Tensor] = []
        train, first = listener is not None, start.length if start is not None else 0
        mailbox = Mailbox(actions[:first], self.placement, self.groups, self.shape, self.dtype, self.device)
        mailbox.start()
        self._perform(actions[:first], micro_batches, mailbox, outputs, train)
        if start is not None and not start.validate():
            mailbox.discard(start.unread)
            return self.run(actions, micro_batches, listener)
        if listener is not None:
            listener.expect_passes(self._passes(actions, micro_batches))
        mailbox.extend(actions[first:])
        self._perform(actions[first:], micro_batches, mailbox, outputs, train)
        mailbox.finish()
        return outputs

    def _passes(self, actions: list[Action], micro_batches: Sequence[Any]) -> int:
        """How many backward passes of each chunk tell the parameters' sinks of their gradients."""
        if self.graphs is not None:
            return self.graphs.begin_step(actions, micro_batches)
        return sum(action.kind in ("B", "I") for action in actions if action.chunk == 0)

    def _perform(
        self, actions: list[Action], micro_batches: Sequence[Any], mailbox: Mailbox, outputs: list[Tensor], train: bool
    ) -> None:
        """Run some of the list, in order."""
        for action in actions:
            try:
                self._act(action, micro_batches[action.micro_batch], mailbox, outputs, train)
            except Exception as error:
                error.add_note(self._where(action))
                raise

    def _start_clean(self) -> None:
        """Nothing of an earlier run is left over, though it may have failed."""
        self.peak_in_flight = self.peak_waiting = 0
        self._in_flight.clear()
        for queue in self._queues:
            queue.clear()

    def _where(self, action: Action) -> str:
        """For whoever reads a failure: which rank, which action, which collective was the last to start."""
        groups = self.groups
        return (
            f"in action {action} of stage {self.placement.stage(groups.place.pp, action.chunk)}, at {groups.place} of "
            f"{groups.topology}; last collective: {groups.ledger.last}"
        )

    def _span(self, kind: str, action: Action) -> AbstractContextManager[None]:
        return nullcontext() if self.trace is None else self.trace.span(kind, action)

    def _act(self, action: Action, micro_batch: Any, mailbox: Mailbox, outputs: list[Tensor], train: bool) -> None:
        """Take what the action needs, compute, and send what it makes."""
        rank, heartbeat = self.groups.place.pp, self.groups.ledger.heartbeat
        message, arrived = received(action, rank, self.placement), None
        if message is not None:
            heartbeat.act(f"{WAITS}{action}")
            with self._span("wait", action):
                arrived = mailbox.take(message)
        heartbeat.act(str(action))
        with self._span(action.kind, action):
            if train and self.graphs is not None and self.graphs.replays(action):
                made = self.graphs.run(action, micro_batch, lambda inputs: self._compute(action, arrived, inputs, train))
            else:
                made = self._compute(action, arrived, micro_batch, train)
        outgoing = sent(action, rank, self.placement)
        if outgoing is not None:
            assert made is not None
            mailbox.put(*outgoing, made)
        elif action.kind == "F":
            assert made is not None
            outputs.append(made)

    def _compute(self, action: Action, arrived: Tensor | None, micro_batch: Any, train: bool) -> Tensor | None:
        """The output (F), the input's gradient (B, I; None on the first stage) or nothing (W)."""
        if action.kind == "F":
            return self._forward(action, arrived, micro_batch, train)
        assert train, f"cannot run {action} without training"
        if action.kind == "B":
            return self._backward(action, arrived)
        if action.kind == "I":
            with self._queue(action).collect(action.micro_batch):
                dx = self._backward(action, arrived)
            self.peak_waiting = max(self.peak_waiting, sum(map(len, self._queues)))
            return dx
        self._queue(action).drain(action.micro_batch)
        return None

    def _forward(self, action: Action, x: Tensor | None, micro_batch: Any, train: bool) -> Tensor:
        with torch.set_grad_enabled(train):
            if x is not None and train:
                x = x.detach().requires_grad_()
            y = self.chunks[action.chunk](x, micro_batch)
        if train:
            self._in_flight[action.micro_batch, action.chunk] = InFlight(x, get_gradient_edge(y))
            self.peak_in_flight = max(self.peak_in_flight, len(self._in_flight))
        return y.detach()

    def _backward(self, action: Action, dy: Tensor | None) -> Tensor | None:
        flight = self._in_flight.pop((action.micro_batch, action.chunk))
        torch.autograd.backward(flight.edge, dy)
        if flight.x is None:
            return None
        assert flight.x.grad is not None
        return flight.x.grad

    def _queue(self, action: Action) -> WeightGradientQueue:
        """Where the chunk's weight gradients wait between I and W."""
        queue = getattr(self.chunks[action.chunk], "weight_gradients", None)
        assert queue is not None, f"chunk {action.chunk} has no weight_gradients: its backward pass cannot be split"
        return queue
