"""The moment of a step in which a pipeline rank's tensors take most: its activations, workspace and buffers.

Every situation of the schedule (`situations`), each moment of the action that runs in it (`block_memory`), with the gradients
that are on their way meanwhile (`reductions`); and the end of the step, when all gradients leave and the weights are updated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul
from typing import NamedTuple

from megatron_llama.plan.block_memory import MicroBatchMemory, Moment
from megatron_llama.plan.reductions import Reduction, in_order
from megatron_llama.plan.situations import Situation
from megatron_llama.plan.state_memory import BucketSize


class Transient(NamedTuple):
    """Bytes that come and go in a step."""

    activations: float
    workspace: float
    buffers: float


@dataclass(frozen=True)
class StagePart:
    """One of a rank's stages: its blocks, whether it has the head, and its buckets in the order of their leaving."""

    layers: int
    last: bool
    buckets: Sequence[BucketSize]


@dataclass(frozen=True)
class RankPeak:
    """The peak of one pipeline rank. `update`: bytes of what the update makes; `batch`: of the step's tokens."""

    memory: MicroBatchMemory
    parts: Sequence[StagePart]
    reduction: Reduction
    update: float
    batch: float

    def find(self, situations: Sequence[Situation]) -> Transient:
        """The largest of all moments."""
        activations, workspace, buffers = max(self._moments(situations), key=sum)
        return Transient(activations, workspace + self.batch, buffers)

    def _moments(self, situations: Sequence[Situation]) -> Iterator[Transient]:
        memory, parts = self.memory, self.parts
        kept = [memory.kept_by_stage(part.layers, part.last) for part in parts]
        queued = [memory.queued_by_stage(part.layers, part.last) for part in parts]
        head_gradient = memory.head_gradient
        for one in situations:
            if one.last and not self.reduction.leaves(one):
                continue
            held = sum(map(mul, one.held, kept)) + sum(map(mul, one.queued, queued))
            if head_gradient and any(part.last and count for part, count in zip(parts, one.held, strict=True)):
                held += head_gradient
            messages, part = one.messages * memory.size.part, parts[one.chunk]
            if self.reduction.leaves(one):
                moments = self._of_action(one.kind, part, _Leaving(self.reduction, parts, one))
            else:
                moments = (self._alone(one.kind, part),)
            for moment in moments:
                yield Transient(held + moment.activations, moment.workspace, messages + moment.buffers)
        yield Transient(0.0, 0.0, self.reduction.under_way([one.size for part in parts for one in part.buckets], starts=True))
        yield Transient(0.0, self.update, 0.0)

    def _alone(self, kind: str, part: StagePart) -> Transient:
        """The largest moment of an action in which no bucket leaves: the same whatever the rank holds."""
        key, known = (kind, part.layers, part.last), self.memory.largest_moments
        if key not in known:
            known[key] = max(self._of_action(kind, part, _Leaving(self.reduction)), key=sum)
        return known[key]

    def _of_action(self, kind: str, part: StagePart, leaving: _Leaving) -> Iterator[Transient]:
        """What an action adds to what its rank holds, at its moments."""
        if kind == "F":
            yield from self._forward(part)
        elif kind == "W":
            yield Transient(0.0, 0.0, 0.0)
            yield from self._leaving_in_w(part, leaving)
        else:
            yield from self._backward(part, kind == "I", leaving)

    def _forward(self, part: StagePart) -> Iterator[Transient]:
        """The last block's output is made of a product, and of a sum over tensor ranks; behind it the loss, if it is here."""
        size = self.memory.size
        yield Transient(0.0, size.hidden + size.summed, 0.0)
        if part.last:
            yield Transient(0.0, self.memory.head_moments[0].work, 0.0)
        else:
            yield Transient(0.0, size.part, size.part)

    def _leaving_in_w(self, part: StagePart, leaving: _Leaving) -> Iterator[Transient]:
        """A W drains its queue block by block, while buckets leave."""
        queued = self.memory.queued_by_stage(part.layers, part.last)
        for block, use in leaving.buckets:
            drained = queued * min(1.0, max(0, part.layers - 1 - block) / part.layers)
            leaving.starts(block, use)
            yield Transient(-drained, 0.0, leaving.under_way(starts=True))

    def _backward(self, part: StagePart, split: bool, leaving: _Leaving) -> Iterator[Transient]:
        """The head, then the blocks from the last to the first; a bucket leaves with the gradient that fills it.

        Of blocks alike only the first and the last are looked at where no bucket leaves: in between nothing new is held.
        """
        memory, released = self.memory, 0.0
        if part.last:
            for moment in memory.head_moments:
                freed = moment.kept - (moment.queued if split else 0.0)
                yield from self._moment(moment, -freed, 0.0, leaving, part.layers)
            released = self._released_by_head(split)
        modes = memory.modes(part.layers)
        for block in reversed(range(part.layers)):
            mode = modes[block]
            kept = memory.kept(mode) if block >= memory.config.parallel.offload_layers else 0.0
            if leaving or block in (0, part.layers - 1) or modes[block + 1] != mode:
                gradient = 0.0 if split or (block == part.layers - 1 and not part.last) else memory.size.part
                for moment in memory.block_moments(mode, split):
                    yield from self._moment(moment, moment.kept + moment.queued - released - kept, gradient, leaving, block)
            released += kept - (memory.queued if split else 0.0)
        if leaving and (-1, "embedding") in leaving.buckets:
            leaving.starts(-1, "embedding")
            yield Transient(-released, memory.size.part, leaving.under_way(starts=True))

    @staticmethod
    def _moment(moment: Moment, activations: float, gradient: float, leaving: _Leaving, block: int) -> Iterator[Transient]:
        """The weight gradient is made, of copies maybe; then a bucket leaves with it."""
        work = moment.work + gradient
        yield Transient(activations, work + moment.copies, leaving.under_way(starts=False))
        if leaving.starts(block, moment.use):
            yield Transient(activations, work, leaving.under_way(starts=True))

    def _released_by_head(self, split: bool) -> float:
        """What norm and head have let go of when the blocks' backward pass begins."""
        memory, size = self.memory, self.memory.size
        if memory.head_chunk:
            return size.part + size.hidden + memory.head_gradient
        return size.part if split else 2 * size.part + size.logits


class _Leaving:
    """The buckets that leave in an action, and what is under way; none without an action."""

    def __init__(self, reduction: Reduction, parts: Sequence[StagePart] = (), one: Situation | None = None) -> None:
        self.reduction, self.sent, self.begun = reduction, [], 0.0
        self.buckets: dict[tuple[int, str], list[int]] = {}
        if one is None:
            return
        part = parts[one.chunk]
        for bucket in in_order(part.buckets):
            self.buckets.setdefault((bucket.block, bucket.use), []).append(bucket.size)
        earlier = [part] if reduction.every_pass else []  # of the pass before, or of chunks that are done
        held = [here + waiting for here, waiting in zip(one.held, one.queued, strict=True)]
        earlier += [other for other, count in zip(parts, held, strict=True) if other is not part and not count]
        self.sent = [bucket.size for other in earlier for bucket in in_order(other.buckets)]
        self.begun = reduction.begun(part.buckets)

    def __bool__(self) -> bool:
        return bool(self.buckets)

    def starts(self, block: int, use: str) -> bool:
        """Whether buckets leave with the gradient of that linear; they are under way from then on."""
        self.sent += self.buckets.get((block, use), ())
        return (block, use) in self.buckets

    def under_way(self, starts: bool) -> float:
        """Bytes; while one starts it is one more than those that may be under way."""
        return self.begun + self.reduction.under_way(self.sent, starts)
