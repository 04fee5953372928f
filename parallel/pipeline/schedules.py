"""Pipeline schedules: pure functions from sizes to lists of actions, one list per pp rank.

An action says what to compute, never what to send: sends and receives follow from the dependencies. Every schedule runs
the backward passes in the order of the micro-batches, so gradients add up in the same order in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from parallel.pipeline.layout import Placement


@dataclass(frozen=True)
class Action:
    """Compute on one micro-batch and one chunk of this rank.

    `kind`: F (forward), B (whole backward), I (backward to the input only), W (weight gradients left by I).
    """

    kind: str
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


Schedule = list[list[Action]]  # actions of pp rank 0, 1, ...


def gpipe(placement: Placement, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes. Keeps every micro-batch's activations.

    Source: Huang et al. 2019 (GPipe), figure 2c; the backward passes run first to last here.
    """
    assert placement.chunks == 1, "gpipe has one chunk per rank"
    batches = range(micro_batches)
    return [[Action("F", m) for m in batches] + [Action("B", m) for m in batches] for _ in range(placement.pp)]


def one_forward_one_backward(placement: Placement, micro_batches: int) -> Schedule:
    """1F1B: after `pp - 1 - rank` forward passes to fill the pipeline, one forward and one backward in turn.

    Rank r keeps the activations of at most `pp - r` micro-batches.
    Source: Narayanan et al. 2021 (PipeDream-Flush), section 2.2.
    """
    assert placement.chunks == 1, "1f1b has one chunk per rank"
    schedule = []
    for rank in range(placement.pp):
        warm_up = min(placement.pp - 1 - rank, micro_batches)
        actions = [Action("F", m) for m in range(warm_up)]
        for m in range(warm_up, micro_batches):
            actions += [Action("F", m), Action("B", m - warm_up)]
        actions += [Action("B", m) for m in range(micro_batches - warm_up, micro_batches)]
        schedule.append(actions)
    return schedule


def forward_only(placement: Placement, micro_batches: int) -> Schedule:
    """Evaluation and generation: each micro-batch through every stage, in order."""
    return [
        [Action("F", m, chunk) for m in range(micro_batches) for chunk in range(placement.chunks)]
        for _ in range(placement.pp)
    ]


SCHEDULES: Mapping[str, Callable[[Placement, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
