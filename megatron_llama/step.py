"""One training step: schedule, loss, gradient, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_llama.config import RunConfig
from megatron_llama.config.rules_zero import further_settings
from megatron_llama.data.loader import MicroBatch, target_count
from megatron_llama.pipeline_plan import stage_costs
from megatron_llama.runtime import DTYPES, Runtime
from megatron_llama.verdict import NO_SUMS, HostSums
from megatron_llama.watching.watch import Watch
from parallel.collectives import Handle, start_all_reduce
from parallel.errors import ConfigError
from parallel.graphs import CudaGraphs, MicroBatchGraphs
from parallel.pipeline.check import check_schedule
from parallel.pipeline.schedules import SCHEDULES, Action
from parallel.pipeline.speculation import SpeculativeStart, speculative_start
from parallel.zero.deepspeed_engine import DeepSpeedZero
from parallel.zero.deepspeed_setup import DeepSpeedOptions
from parallel.zero.engine import Engine, OptimizerSettings, StepInfo
from parallel.zero.native import NativeZero
from parallel.zero.post_validation import PostValidatedZero


def optimizer_settings(config: RunConfig) -> OptimizerSettings:
    """The engine's part of a run's settings."""
    optimizer, zero = config.optimizer, config.zero
    return OptimizerSettings(
        algorithm=optimizer.name,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        zero_stage=zero.stage,
        bucket_size=zero.bucket_size,
        gradient_dtype=DTYPES[zero.gradient_dtype],
        reduce_dtype=DTYPES[zero.reduce_dtype],
        overlap=zero.overlap,
        moment_dtype=DTYPES[optimizer.moment_dtype],
        master_weights=optimizer.master_weights,
        loss_scale=config.train.loss_scale if config.train.dtype == "fp16" else 0.0,
        loss_scale_window=config.train.loss_scale_window,
    )


def make_engine(runtime: Runtime) -> Engine:
    """The optimizer engine that the run asks for, over this rank's chunks; all ranks call it together.

    Raises ConfigError where the first and the last pipeline rank have to meet in every step.
    """
    config = runtime.config
    parallel, settings = config.parallel, optimizer_settings(config)
    if config.zero.engine == "deepspeed":
        zero, further = config.zero, further_settings(config)
        options = DeepSpeedOptions(zero.offload, config.train.micro_batch_size, further, zero.offload_directory)
        return DeepSpeedZero(runtime.chunks, runtime.groups, settings, options)
    if not parallel.post_validation:
        return NativeZero(runtime.chunks, runtime.groups, settings, runtime.kernels)
    if "embedding" in runtime.groups.replicas:
        raise ConfigError(
            "parallel.post_validation = true cannot be had with model.tie_embeddings under parallel.schedule = "
            f"{parallel.schedule}: embedding and head are on two pipeline ranks, which add up their gradients at the end of "
            "every step; set --parallel.post_validation false, or --parallel.schedule zb-v with --parallel.chunks 2, where "
            "one rank has both"
        )
    return PostValidatedZero(runtime.chunks, runtime.groups, settings, runtime.kernels)


@dataclass(frozen=True)
class Batch:
    """One step's micro-batches on this data rank, and what is counted over the global batch, on its way.

    `counts` are the number of targets and the sum of squared document lengths; valid after `counted.wait()`.
    """

    micro_batches: Sequence[MicroBatch]
    counts: Tensor  # [2] int64
    counted: Handle


def squared_document_lengths(micro_batches: Sequence[MicroBatch]) -> int:
    """The sum of length^2 over the documents of micro-batches on the host, which attention costs; a sample without is one."""
    total = 0
    for batch in micro_batches:
        s, b = batch.tokens.shape
        if batch.documents is None:
            total += b * s**2
        else:
            lengths = batch.documents.cu_seqlens.diff().long()  # repeated ends are padding: length 0
            total += int((lengths * lengths).sum())
    return total


def make_graphs(runtime: Runtime) -> MicroBatchGraphs:
    """What replays a step's inner micro-batches (`train.cuda_graphs`). Raises ConfigError on a device without graphs."""
    if runtime.device.type != "cuda":
        raise ConfigError(
            f"train.cuda_graphs = true needs a GPU, and this run is on {runtime.device.type} (train.device = "
            f"{runtime.config.train.device}): set --train.cuda_graphs false"
        )
    return MicroBatchGraphs(runtime.groups.ledger, CudaGraphs())


def _bounded(batch: MicroBatch) -> MicroBatch:
    """The same micro-batch, without the length of its longest document, which a graph would be bound to."""
    if batch.documents is None:
        return batch
    return replace(batch, documents=replace(batch.documents, max_length=batch.tokens.shape[0]))


class TrainStep:
    """Runs steps. `prepare` a batch one step ahead, then `run` it; neither makes the host wait for a GPU.

    `watch` judges them. Without one a step that is not finite is skipped, and nobody has to decide how to go on.
    """

    def __init__(self, runtime: Runtime, engine: Engine, num_micro_batches: int, watch: Watch | None = None) -> None:
        config = runtime.config
        self.runtime, self.engine = runtime, engine
        self.watch = watch or Watch(replace(config.watch, non_finite="skip"), runtime.device)
        schedule = SCHEDULES[config.parallel.schedule](runtime.placement, num_micro_batches)
        costs = stage_costs(config, runtime.placement)
        self.report = check_schedule(schedule, runtime.placement, num_micro_batches, costs)
        rank = runtime.groups.place.pp
        self.actions: list[Action] = schedule[rank]
        self.start: SpeculativeStart | None = None
        if isinstance(engine, PostValidatedZero):
            self.start = speculative_start(schedule, runtime.placement, rank, engine.validate)
        self.executor = runtime.executor(config.train.sequence_length, config.train.micro_batch_size, engine.chunks)
        if config.train.cuda_graphs:
            self.executor.graphs = make_graphs(runtime)
        self.state_copied: torch.cuda.Event | None = None  # what an update waits for on the device: a save's copy of the state

    def prepare(self, micro_batches: Sequence[MicroBatch]) -> Batch:
        """Move a step's micro-batches to the device and start counting over the global batch."""
        device = self.runtime.device
        if self.executor.graphs is not None:
            micro_batches = [_bounded(batch) for batch in micro_batches]
        counts = torch.tensor([target_count(micro_batches), squared_document_lengths(micro_batches)])  # still on the host
        counts = counts.to(device, non_blocking=True)
        counted = start_all_reduce(counts, self.runtime.groups.data)
        return Batch([batch.to(device) for batch in micro_batches], counts, counted)

    def run(self, batch: Batch, learning_rate: float, sums: HostSums = NO_SUMS, step: int = 0) -> StepInfo:
        """Forward, backward, reduction and update of the run's step of this number (0: one that nothing is compared with).

        `StepInfo.sums`, fp64 on the device: the token-mean loss of the global batch, and the ranks' `sums`.
        """
        batch.counted.wait()
        share = batch.counts[0].clamp(min=1)
        scale = self.engine.loss_scale.value if self.engine.loss_scale is not None else 1.0
        micro_batches = [replace(mb, loss_mask=mb.loss_mask / share * scale) for mb in batch.micro_batches]
        self.engine.begin_step()
        losses = self.executor.run(self.actions, micro_batches, self.engine, self.start)
        loss = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        if self.runtime.has_loss and self.runtime.groups.tp.rank == 0:  # tensor ranks all have the same loss
            loss = torch.stack(losses).double().sum() / scale
        from_host = torch.tensor(sums, dtype=torch.float64).to(loss.device, non_blocking=True)
        if self.state_copied is not None:
            torch.cuda.current_stream(loss.device).wait_event(self.state_copied)
        info = self.engine.step(learning_rate, torch.cat([loss[None], from_host]), self.watch.before_step(step).judge)
        self.watch.after_step(info)
        return info
