"""What actions and messages cost: the numbers with which schedules are checked and chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PerStage = float | Sequence[float]  # one number for all stages, or one per global stage


@dataclass(frozen=True)
class Costs:
    """Seconds of each kind of action, sizes of what it keeps, and how messages travel.

    `activation`: what a forward pass keeps until its backward pass (B or I). `queued`: what of it an I leaves until its W (the
    linears' inputs and output gradients). Any unit: bytes, or 1 for one stage's activations; the papers count all of it
    until W, as the defaults do.

    `send`: seconds of one message between two ranks. A message travels once it is made, its receive is posted and the one
    before it in its lane is through; a receive is posted when its rank reaches the action that needs the message
    `receives_ahead` places before it (0: no earlier than it is needed). `blocking_sends`: a rank waits until its message is
    through.
    """

    forward: PerStage = 1.0
    backward: PerStage = 2.0
    input_backward: PerStage = 1.0
    weight_backward: PerStage = 1.0
    send: float = 0.0
    activation: PerStage = 1.0
    queued: PerStage = 1.0
    receives_ahead: int = 1
    blocking_sends: bool = False

    def seconds(self, num_stages: int) -> dict[str, list[float]]:
        """Seconds of each kind of action on each global stage."""
        values = {"F": self.forward, "B": self.backward, "I": self.input_backward, "W": self.weight_backward}
        return {kind: per_stage(value, num_stages) for kind, value in values.items()}


def per_stage(value: PerStage, num_stages: int) -> list[float]:
    """`value` as one number per global stage."""
    if not isinstance(value, Sequence):
        return [value] * num_stages
    assert len(value) == num_stages, f"{len(value)} costs for {num_stages} stages"
    return list(value)
