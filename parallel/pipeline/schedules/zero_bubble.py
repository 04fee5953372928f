"""Zero-bubble schedules: the backward pass is split, and weight gradients fill the time in which a rank would wait.

Each is an order of F and I per rank, into which `fill_with_weight_gradients` puts the W.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules.action import Action, Schedule, actions_of, source_stage


def zb_h1(placement: Placement, micro_batches: int) -> Schedule:
    """ZB-H1: a third of 1F1B's bubble in the memory of 1F1B, `pp` activations (here on every rank, counted until W).

    Bubble: (pp - 1)(F + I - W). Source: Qi et al. 2023 (Zero Bubble Pipeline Parallelism), section 2.1.
    """
    return _one_chunk(placement, micro_batches, placement.pp)


def zb_h2(placement: Placement, micro_batches: int) -> Schedule:
    """ZB-H2, also ZB-2p: no rank waits between its first and its last action; up to `2 pp - 1` activations.

    Bubble: (pp - 1)(F + I - 2 W). Needs `2 pp - 1` micro-batches for that. Source: Qi et al. 2023, section 2.2.
    """
    return _one_chunk(placement, micro_batches, 2 * placement.pp - 1)


def _one_chunk(placement: Placement, micro_batches: int, limit: int) -> Schedule:
    """At most `limit` activations (pp to 2 pp - 1): as many forward passes before the first I as time and limit allow."""
    assert placement.chunks == 1, "zb-h1 and zb-h2 have one chunk per rank"
    pp = placement.pp
    orders = []
    for rank in range(pp):
        warm_up = min(2 * (pp - rank) - 1, limit - rank)
        pattern = "F" * warm_up + "IF" * (micro_batches - warm_up) + "I" * warm_up
        orders.append(actions_of(pattern, micro_batches))
    return fill_with_weight_gradients(orders, placement, limit)


def zb_v(placement: Placement, micro_batches: int) -> Schedule:
    """ZB-V: two chunks per rank in a V; no rank waits between its first and its last action, in the memory of 1F1B.

    At most `pp` activations of a rank (2 pp of a chunk). Zero bubble wants equal F, I, W and `2 pp - 1` micro-batches.
    Source: Qi et al. 2023 (arXiv 2401.10241), ZB-V; Qi et al. 2024 (arXiv 2405.15362), V-ZB.
    """
    assert (placement.chunks, placement.kind) == (2, "v"), "zb-v has two chunks per rank in a V"
    pp = placement.pp
    orders = []
    for rank in range(pp):
        behind = pp - rank
        pattern = "F" * (2 * behind - 1) + "fF" * rank + "fi" * behind
        pattern += "FIfi" * (micro_batches - pp)
        pattern += "Ii" * rank + "I" * behind
        orders.append(actions_of(pattern, micro_batches))
    return fill_with_weight_gradients(orders, placement, 2 * pp)


def fill_with_weight_gradients(orders: Schedule, placement: Placement, limit: int) -> Schedule:
    """Put a W for every I into orders of F and I: first in, first out, where a rank would wait or keeps `limit` activations.

    An activation is kept from F to W. What is left runs at the end. Every action takes one unit here and messages none: lists
    made with measured seconds were no faster under those seconds.
    """
    ended: dict[tuple[str, int, int], int] = {}  # (kind, micro-batch, stage) -> time
    ranks = [_Rank(rank, deque(order), placement, limit) for rank, order in enumerate(orders)]
    while any([rank.advance(ended) for rank in ranks]):
        pass
    assert not any(rank.order for rank in ranks), "an order of F and I that waits in a circle"
    return [rank.actions for rank in ranks]


@dataclass
class _Rank:
    """One rank's clock while weight gradients are put into its order."""

    rank: int
    order: deque[Action]  # what is to come of F and I
    placement: Placement
    limit: int
    actions: list[Action] = field(default_factory=list)
    queue: deque[Action] = field(default_factory=deque)  # the W that may run
    free: int = 0
    kept: int = 0

    def advance(self, ended: dict[tuple[str, int, int], int]) -> bool:
        """Run as far as the times of other ranks are known. True if anything ran."""
        before = len(self.actions)
        while self.order:
            kind, micro_batch, chunk = action = self.order[0]
            stage = self.placement.stage(self.rank, chunk)
            source = source_stage(kind, stage, self.placement.num_stages)
            arrival = 0 if source is None else ended.get((kind, micro_batch, source))
            if arrival is None:
                return len(self.actions) > before
            while self.queue and (self.free < arrival or (kind == "F" and self.kept >= self.limit)):
                self._run_weight_gradient()
            self.order.popleft()
            self.free = ended[kind, micro_batch, stage] = max(self.free, arrival) + 1
            self.actions.append(action)
            if kind == "F":
                self.kept += 1
            else:
                self.queue.append(Action("W", micro_batch, chunk))
        while self.queue:
            self._run_weight_gradient()
        return len(self.actions) > before

    def _run_weight_gradient(self) -> None:
        self.actions.append(self.queue.popleft())
        self.free += 1
        self.kept -= 1
