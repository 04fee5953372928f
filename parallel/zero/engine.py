"""What the optimizer engines have in common: their settings, their interface, and what they say of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from parallel.collectives import Done, Handle
from parallel.replica_audit import Replicated, Rounded
from parallel.shards import TensorBox
from parallel.tensor.parameter import ShardedParameter
from parallel.zero.loss_scale import LossScale


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter 2019) or plain SGD. `clip_norm` 0: no clipping. `bucket_size` in elements.

    Micro-batches add up their gradients in `gradient_dtype`, and gradients travel in `reduce_dtype`, or in the former where it
    is narrower. Without `overlap`, nothing travels behind computation. `ProcessGroups.shard` says who shares the optimizer.

    AdamW's moments are kept in `moment_dtype`, masters as "fp32" or as the "remainder" of bf16 weights. `loss_scale` is the
    first one of fp16 training (0: none), doubled after `loss_scale_window` finite steps.
    """

    algorithm: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    zero_stage: int = 1
    bucket_size: int = 40_000_000
    gradient_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    overlap: bool = True
    moment_dtype: torch.dtype = torch.float32
    master_weights: str = "fp32"
    loss_scale: float = 0.0
    loss_scale_window: int = 1000


@dataclass(frozen=True)
class Capabilities:
    """What an engine supports."""

    any_schedule: bool
    main_grad: bool
    overlap: bool


def not_finite(info: StepInfo) -> Tensor:
    """Whether the norm or a sum of a step is not finite (device scalar)."""
    return info.not_finite


Judge = Callable[["StepInfo"], Tensor]  # says on the device whether a step's update is to be masked; alike on all ranks


@dataclass(frozen=True)
class StepInfo:
    """What the world knows of one step: `totals` [1 + n] fp64, the squared norm and the caller's sums; this rank's own `part`.

    The squared norm is that of gradients that bear the `loss_scale` (fp16; a device scalar). The totals may be read after
    `arrival.wait()`, which the properties (device scalars) call. Where there is a `stream`, they are read on it: the current
    one would wait for other ranks.
    """

    totals: Tensor
    part: Tensor
    judge: Judge = not_finite
    arrival: Handle = Done()
    stream: torch.cuda.Stream | None = None
    loss_scale: Tensor | None = None

    @cached_property
    def norm(self) -> Tensor:
        """The gradient norm before clipping, without the loss scale."""
        self.arrival.wait()
        norm = self.totals[0].sqrt()
        return norm if self.loss_scale is None else norm / self.loss_scale

    @cached_property
    def not_finite(self) -> Tensor:
        """Whether the norm or a sum is not finite."""
        self.arrival.wait()
        return (self.totals - self.totals).any()  # (0 where finite, else NaN: fewer operations than isfinite)

    @cached_property
    def skipped(self) -> Tensor:
        """1.0 where the update was masked, as the judge has said."""
        self.arrival.wait()
        return self.judge(self).float()

    @property
    def sums(self) -> Tensor:
        """The caller's sums, added up over the world."""
        self.arrival.wait()
        return self.totals[1:]


class Engine(Protocol):
    """Owns this rank's parameters, gradients and optimizer state.

    In a step: `begin_step`, then the executor's `expect_passes`, then the backward passes, then `step`. State is named boxes of
    logical tensors, so every engine reads what another one wrote.
    """

    caps: Capabilities
    loss_scale: LossScale | None  # what the loss of a step is to be multiplied by (fp16)
    chunks: Sequence[nn.Module]  # what the executor is to call
    buckets: Sequence[object]  # the flat tensors that are updated as one

    @property
    def state_bytes(self) -> int:
        """What this rank holds: weights, gradients, masters, moments."""

    optimizer_steps: int  # updates applied so far (skipped steps don't count); reading it waits for the device

    def begin_step(self) -> None:
        """Clear the gradients."""

    def expect_passes(self, count: int) -> None:
        """Every chunk makes the gradients of `count` backward passes in this step."""

    def step(self, learning_rate: float, sums: Tensor, judge: Judge = not_finite) -> StepInfo:
        """Reduce what has not left yet, clip, update, and send the weights on their way.

        `sums` [n] fp64: the caller's values to add up over the world along with the squared norm. The update is masked where
        the `judge` of the step says so.
        """

    def inspect_gradients(self, look: Callable[[ShardedParameter], None] | None) -> None:
        """From now on call `look` with each parameter whose gradient has got a part; None: no more.

        That is before any rank's gradients are mixed with another's. Engines that leave it to others to collect gradients
        call nothing.
        """

    def finish(self) -> None:
        """Wait for the communication under way: before evaluating, saving or leaving."""

    def weight_boxes(self, write: bool) -> Iterator[TensorBox]:
        """The fp32 weights of this rank's shards. `write`: only what this rank is to store; otherwise all it holds."""

    def optimizer_boxes(self, write: bool) -> Iterator[TensorBox]:
        """The optimizer's moments likewise, named `exp_avg/NAME` and `exp_avg_sq/NAME`."""

    def replicated(self) -> Iterator[Replicated]:
        """What other ranks hold too, bit for bit, after `finish`."""

    def rounded(self) -> Iterator[Rounded]:
        """Weights whose fp32 masters this rank holds too."""

    def load(self, fill: Callable[[Iterable[TensorBox]], object]) -> None:
        """Let `fill` write the boxes of this rank's weights and moments; then bring the model in line, on every rank.

        All ranks call it together. The boxes of `weight_boxes` and `optimizer_boxes` are to be read only.
        """
