"""The parity criteria: what "any layout gives the same losses" means in numbers."""

from __future__ import annotations

from functools import cache

import torch

from tests.parity.training import Case, Outcome, assemble, train
from tests.ranks import run_ranks

# fp32: reductions in another order change the last bits; noise is about 1e-6 in gradients, 1e-7 in losses and norms.
GRADIENT_TOLERANCE = 1e-5  # relative L2, per logical tensor, step 0
NORM_TOLERANCE = 1e-6  # relative, step 0
LOSS_TOLERANCE = 5e-7  # relative, 8 steps
WEIGHT_TOLERANCE = 1e-6  # relative L2, per logical tensor, after 8 steps of SGD (Adam amplifies noise in tiny gradients)
# bf16 (and fp16): tensor parallelism rounds partial sums at other places; 8 bits of mantissa.
BF16_LOSS_TOLERANCE = 2e-3
BF16_NORM_TOLERANCE = 1e-3


@cache
def reference(case: Case) -> Outcome:
    """The case's training on one process (each once per test session)."""
    return run_ranks(1, train, case.alone)[0]


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-30)


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def differences(case: Case, outcomes: list[Outcome]) -> list[str]:
    """Every criterion that the outcomes break against one process; empty where all hold.

    Losses and norms must be equal on every rank, and all copies of a logical tensor bit-equal.
    """
    expected, first = reference(case), outcomes[0]
    broken = list(first.unequal_copies)
    if any(o.losses != first.losses or o.norms != first.norms for o in outcomes):
        broken.append("ranks disagree on losses or norms")
    low = case.train.dtype != "fp32"
    norm_tolerance = BF16_NORM_TOLERANCE if low else NORM_TOLERANCE
    loss_tolerance = BF16_LOSS_TOLERANCE if low else LOSS_TOLERANCE
    if relative(first.norms[0], expected.norms[0]) > norm_tolerance:
        broken.append(f"norm of step 0: {first.norms[0]!r}, one process has {expected.norms[0]!r}")
    for step, (loss, right) in enumerate(zip(first.losses, expected.losses, strict=True)):
        if relative(loss, right) > loss_tolerance:
            broken.append(f"loss of step {step}: {loss!r}, one process has {right!r}")
    try:
        gradients, weights = assemble(outcomes, "gradients"), assemble(outcomes, "weights")
    except AssertionError as error:
        return [*broken, str(error)]
    if low:
        return broken
    for name, right in assemble([expected], "gradients").items():
        difference = relative_l2(gradients[name], right)
        if difference > GRADIENT_TOLERANCE:
            broken.append(f"gradient of {name} at step 0 is off by {difference}")
    if case.optimizer.name == "sgd":
        for name, right in assemble([expected], "weights").items():
            difference = relative_l2(weights[name], right)
            if difference > WEIGHT_TOLERANCE:
                broken.append(f"weight {name} after {len(first.losses)} steps is off by {difference}")
    return broken


def inexact(outcomes: list[Outcome], expected: list[Outcome]) -> list[str]:
    """Every loss, gradient and weight that is not bit-equal."""
    broken = list(outcomes[0].unequal_copies)
    if outcomes[0].losses != expected[0].losses:
        broken.append(f"losses {outcomes[0].losses} and {expected[0].losses}")
    for what in ("gradients", "weights"):
        ours, theirs = assemble(outcomes, what), assemble(expected, what)
        broken += [f"{what} {name}" for name in theirs if not torch.equal(ours[name], theirs[name])]
    return broken
