"""One training step: schedule, loss, gradient, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_llama.config import RunConfig
from megatron_llama.data.loader import MicroBatch, target_count
from megatron_llama.runtime import Runtime
from parallel.collectives import Handle, start_all_reduce
from parallel.pipeline.check import check_schedule
from parallel.pipeline.schedules import SCHEDULES, Action
from parallel.zero.native import NativeZero, OptimizerSettings, StepInfo


def optimizer_settings(config: RunConfig) -> OptimizerSettings:
    """The engine's part of a run's settings."""
    optimizer, parallel = config.optimizer, config.parallel
    return OptimizerSettings(
        algorithm=optimizer.name,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        zero_stage=parallel.zero_stage,
        bucket_size=parallel.bucket_size,
    )


@dataclass(frozen=True)
class Batch:
    """One step's micro-batches on this data rank, and the global number of targets, on its way."""

    micro_batches: Sequence[MicroBatch]
    target_count: Tensor  # [1] int64, valid after `counted.wait()`
    counted: Handle


class TrainStep:
    """Runs steps. `prepare` a batch one step ahead, then `run` it; neither makes the host wait for a GPU."""

    def __init__(self, runtime: Runtime, engine: NativeZero, num_micro_batches: int) -> None:
        config = runtime.config
        self.runtime, self.engine = runtime, engine
        schedule = SCHEDULES[config.parallel.schedule](runtime.placement, num_micro_batches)
        self.report = check_schedule(schedule, runtime.placement, num_micro_batches)
        self.actions: list[Action] = schedule[runtime.groups.place.pp]
        self.executor = runtime.executor(config.train.sequence_length, config.train.micro_batch_size)

    def prepare(self, micro_batches: Sequence[MicroBatch]) -> Batch:
        """Move a step's micro-batches to the device and start counting the targets of the global batch."""
        device = self.runtime.device
        count = torch.tensor([target_count(micro_batches)], dtype=torch.int64)  # still on the host
        count = count.to(device, non_blocking=True)
        counted = start_all_reduce(count, self.runtime.groups.data)
        return Batch([batch.to(device) for batch in micro_batches], count, counted)

    def run(self, batch: Batch, learning_rate: float, stop_wished: bool = False) -> StepInfo:
        """Forward, backward, reduction and update.

        `StepInfo.sums` is [token-mean loss of the global batch, number of ranks that wish to stop], fp64 on the device.
        """
        batch.counted.wait()
        share = batch.target_count.clamp(min=1)
        micro_batches = [replace(mb, loss_mask=mb.loss_mask / share) for mb in batch.micro_batches]
        self.engine.begin_step()
        losses = self.executor.run(self.actions, micro_batches, self.engine)
        loss = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        if self.runtime.has_loss and self.runtime.groups.tp.rank == 0:  # tensor ranks all have the same loss
            loss = torch.stack(losses).double().sum()
        stop = torch.full_like(loss, float(stop_wished))
        return self.engine.step(learning_rate, torch.stack([loss, stop]))
