"""Weight gradients that wait: what splits a backward pass into I (input gradients) and W (weight gradients).

`I` is an ordinary backward pass in which linears, instead of computing their weight gradient, put what it is made of into
their stage's queue. `W` takes it out again. Source: Qi et al. 2023 (Zero Bubble Pipeline Parallelism), section 2.

A stage whose backward pass can be split has its queue as the attribute `weight_gradients`, and hands it to its layers when it
builds them. Any layer may use it: in its backward pass it asks `collecting`, and puts a `WeightGradient`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightGradient:
    """The gradient of one parameter, `weight`, by one use of it: computed at once, or put into a queue and added later.

    It keeps alive what it is made of, so it is dropped once it has been added.
    """

    weight: nn.Parameter

    def fetch(self) -> None:
        """Start the communication that `compute` needs, if any."""

    def compute(self) -> Tensor | None:
        """The gradient; or None where it has been added already (to an engine's main gradient)."""
        raise NotImplementedError

    def add(self) -> None:
        """Add it to the parameter's, as autograd does: the first one is taken, others are added in place."""
        gradient = self.compute()
        if gradient is not None:
            self.weight.grad = gradient if self.weight.grad is None else self.weight.grad.add_(gradient)


class WeightGradientQueue:
    """The weight gradients that the I passes of one stage have left, first in, first out.

    So each parameter's gradients add up in the order in which whole backward passes add them: the same bits.
    """

    def __init__(self) -> None:
        self._passes: deque[tuple[int, deque[WeightGradient]]] = deque()
        self.collecting = False

    def __len__(self) -> int:
        """How many passes have left their weight gradients here."""
        return len(self._passes)

    @contextmanager
    def collect(self, micro_batch: int) -> Iterator[None]:
        """Inside, weight gradients are put here; they are those of `micro_batch`."""
        self._passes.append((micro_batch, deque()))
        self.collecting = True
        try:
            yield
        finally:
            self.collecting = False

    def put(self, gradient: WeightGradient) -> None:
        """Leave a weight gradient for the W of the micro-batch that is being collected."""
        assert self.collecting, "weight gradients are put during a pass to the input"
        self._passes[-1][1].append(gradient)

    @torch.no_grad()
    def drain(self, micro_batch: int) -> None:
        """Add the weight gradients of the oldest pass, which must be `micro_batch`'s, fetching one ahead."""
        oldest, gradients = self._passes.popleft()
        assert oldest == micro_batch, f"the weight gradients of micro-batch {oldest} come before those of {micro_batch}"
        if gradients:
            gradients[0].fetch()
        while gradients:
            gradient = gradients.popleft()
            if gradients:
                gradients[0].fetch()
            gradient.add()

    def clear(self) -> None:
        """Forget everything: a run that failed may have left something."""
        self._passes.clear()
