"""DeepSpeedZero: DeepSpeed's ZeRO under our parallelism, with the interface of every engine.

Stage 1 is driven directly: the executor calls our chunks, gradients add up in fp32 sinks, and DeepSpeed reduces, updates and
gathers once at the end of the step, so that any schedule can run. Stages 2 and 3 reduce in every backward pass through hooks
that need DeepSpeed's own forward, so the executor calls that. Source: Rajbhandari et al. 2020 (ZeRO); Ren et al. 2021
(ZeRO-Offload).

Losses are normalised by the global number of targets, so gradients are summed over the data ranks where DeepSpeed would
average. The norm and its clipping are ours, because a fused weight may have replicated and split rows, which DeepSpeed's
counting per parameter cannot tell apart.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from parallel.collectives import all_reduce
from parallel.groups import Axis, ProcessGroups
from parallel.replica_audit import Replicated, Rounded
from parallel.shards import TensorBox
from parallel.tensor.parameter import ShardedParameter
from parallel.zero.boxes import state_boxes
from parallel.zero.buckets import BucketClass
from parallel.zero.copies import roundings, state_copies, weight_copies
from parallel.zero.deepspeed_parts import (
    Bf16Parts,
    Partition,
    Stage3FileParts,
    Stage3Parts,
    ZeroParts,
    class_of,
    flat_sinks,
    sum_replicas_by_hook,
)
from parallel.zero.deepspeed_setup import DeepSpeedOptions, deepspeed_settings, own_folder, start_deepspeed
from parallel.zero.engine import Capabilities, Judge, OptimizerSettings, StepInfo, not_finite
from parallel.zero.grad_norm import local_squared_norm, sum_replicas


class DeepSpeedZero:
    """Owns this rank's parameters and optimizer state through a DeepSpeed engine.

    `chunks` is what the executor is to call. Reading the norm makes the host wait in every step, for DeepSpeed does.
    """

    loss_scale = None  # fp16 is not supported

    def __init__(
        self, chunks: Sequence[nn.Module], groups: ProcessGroups, settings: OptimizerSettings, options: DeepSpeedOptions
    ) -> None:
        self.groups, self.settings = groups, settings
        direct = settings.zero_stage == 1
        self.caps = Capabilities(any_schedule=direct, main_grad=direct, overlap=False)
        parameter_groups = _by_class(chunks)
        parameters = [parameter for members in parameter_groups.values() for parameter in members]
        device, dtype = parameters[0].device, parameters[0].dtype
        for parameter in parameters:
            parameter.model_parallel = True  # DeepSpeed's norm tells it what is finite: it is to look at everything
            if not direct:
                sum_replicas_by_hook(parameter, groups)
        own_sinks = direct and (dtype == torch.float32 or options.offload != "none")
        flats = [_own_sinks(members) for members in parameter_groups.values()] if own_sinks else []
        if options.offload == "nvme":
            options = replace(options, offload_directory=own_folder(options.offload_directory))
            weakref.finalize(self, shutil.rmtree, options.offload_directory, ignore_errors=True)
        self._base = _base_optimizer(parameter_groups, settings)
        model, config = nn.ModuleList(chunks) if direct else chunks[0], deepspeed_settings(dtype, settings, options)
        self._deepspeed = start_deepspeed(model, self._base, groups, device, config)
        self._parts = self._parts_of(self._deepspeed.optimizer, flats)
        self.buckets: list[Partition] = self._parts.partitions
        if settings.algorithm == "adamw":
            self._make_moments()
        self.chunks: Sequence[nn.Module] = chunks if direct else [self._deepspeed]
        self._passes_to_come = 0
        if not direct:
            self._deepspeed.register_forward_pre_hook(self._note_pass)

    def _parts_of(self, optimizer: Any, flats: Sequence[Tensor]) -> Bf16Parts | ZeroParts | Stage3Parts:
        data, name = self.groups.data, type(optimizer).__name__
        if name == "BF16_Optimizer":
            return Bf16Parts(optimizer, data.rank)
        if name == "DeepSpeedZeroOptimizer":
            return ZeroParts(optimizer, data.rank, flats)
        assert name == "DeepSpeedZeroOptimizer_Stage3", f"DeepSpeed has chosen {name}, which this engine does not know"
        kind = Stage3FileParts if optimizer.swap_optimizer else Stage3Parts
        return kind(optimizer, data.rank, data.size)

    def _make_moments(self) -> None:
        """AdamW's state, made now: memory does not grow at the first step, and a checkpoint has where to load."""
        for number, partition in enumerate(self.buckets):
            master = partition.master
            with self._parts.in_memory(number):
                self._base.state[master] = {
                    "step": torch.zeros((), dtype=torch.float32, device=master.device),
                    "exp_avg": torch.zeros_like(master, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
                }

    # ---- during a step --------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Clear the gradients."""
        self._parts.clear()

    def expect_passes(self, count: int) -> None:
        """In stages 2 and 3 the last of `count` backward passes finishes the reduction; forward and backward alternate."""
        self._passes_to_come = count

    def _note_pass(self, module: nn.Module, inputs: object) -> None:
        self._passes_to_come -= 1
        self._deepspeed.set_gradient_accumulation_boundary(self._passes_to_come == 0)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Finish the reduction: afterwards each partition holds the gradient of the global batch."""
        if self.settings.zero_stage == 1:
            for partition in self.buckets:
                sum_replicas(partition, self.groups)
            self._parts.hand_over()
            self._deepspeed.allreduce_gradients(self.settings.bucket_size)
        self._parts.take_gradients()

    @torch.no_grad()
    def step(self, learning_rate: float, sums: Tensor, judge: Judge = not_finite) -> StepInfo:
        """Reduce what has not left yet, clip, update, and gather the weights.

        `sums` [n] fp64: the caller's values to add up over the world along with the squared norm. The update is masked where
        the `judge` of the step says so.
        """
        self.reduce_gradients()
        factor = self._parts.gradient_factor
        squared_norm = local_squared_norm(self.buckets, data_copies=1).to(sums.device) * factor**2
        part = torch.cat([squared_norm[None], sums])
        info = StepInfo(all_reduce(part.clone(), self.groups.world), part, judge)
        where = self.buckets[0].master.device  # on the host under offload, where torch's own copy would not be waited for
        excess = (info.norm / self.settings.clip_norm).clamp(min=1.0) if self.settings.clip_norm > 0 else 1.0
        self._base.grad_scale = torch.as_tensor(excess / factor, dtype=torch.float32, device=where)
        self._base.found_inf = info.skipped.to(where)
        for group in self._base.param_groups:
            group["lr"] = learning_rate
        self._deepspeed.step()
        for partition in self.buckets:
            del partition.master_grad  # it may be a copy
        return info

    def inspect_gradients(self, look: Callable[[ShardedParameter], None] | None) -> None:
        """Nothing is called: from stage 2 on DeepSpeed collects the gradients."""

    def finish(self) -> None:
        """Nothing is under way after a step: DeepSpeed gathers the weights inside it."""

    # ---- state ----------------------------------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """What this rank holds, on the device or the host: weights, gradients, fp32 masters, moments."""
        tensors = [*self._parts.buffers, *(partition.master for partition in self.buckets)]
        tensors += [tensor for state in self._base.state.values() for tensor in state.values()]
        return self._parts.gradient_bytes + sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far (skipped steps don't count). Reading it waits for the device."""
        return max((int(state["step"].item()) for state in self._base.state.values() if "step" in state), default=0)

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for state in self._base.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    def weight_boxes(self, write: bool) -> Iterator[TensorBox]:
        """The fp32 weights of this rank's partitions as boxes of logical tensors.

        `write`: only what this rank is to store (of copies, its share); otherwise everything it holds.
        """
        yield from self._boxes(write, "", lambda partition: self._parts.whole(partition, partition.master))

    def optimizer_boxes(self, write: bool) -> Iterator[TensorBox]:
        """The optimizer's moments likewise, named `exp_avg/NAME` and `exp_avg_sq/NAME`."""
        if self.settings.algorithm == "adamw":
            for kind in ("exp_avg", "exp_avg_sq"):
                yield from self._boxes(write, f"{kind}/", lambda partition, kind=kind: self._moment(partition, kind))

    def gradient_boxes(self) -> Iterator[TensorBox]:
        """The reduced gradients (fp32) of this rank's partitions, between `reduce_gradients` and the update."""
        factor = self._parts.gradient_factor
        yield from self._boxes(False, "", lambda partition: partition.master_grad * factor)

    def _moment(self, partition: Partition, kind: str) -> Tensor:
        return self._parts.whole(partition, self._base.state[partition.master][kind])

    def _boxes(self, write: bool, prefix: str, flat_of: Callable[[Partition], Tensor]) -> Iterator[TensorBox]:
        flats = (flat_of(partition).detach() for partition in self.buckets)
        return state_boxes(self.buckets, flats, prefix, (0, 1) if write else None)

    def replicated(self) -> Iterator[Replicated]:
        """What other ranks hold too: weights, unless they are sharded themselves, and the state of replicated segments."""
        whole = self.settings.zero_stage < 3
        if whole:
            yield from weight_copies((p for partition in self.buckets for p in partition.parameters), self.groups)
        alone = Axis.single("copies")
        for partition in self.buckets:
            flats = {} if whole else {"weights": partition.local_weights}
            flats |= {"master": partition.master, **self._base.state[partition.master]}
            for kind, flat in flats.items():
                if flat.numel() == partition.local_weights.numel():  # not a count of steps, nor in a file
                    yield from state_copies(kind, partition, flat, self.groups, alone)

    def rounded(self) -> Iterator[Rounded]:
        """The weights of this rank's partitions and the fp32 masters that they are made from, where these are in memory."""
        for partition in self.buckets:
            if partition.master.numel() == partition.local_weights.numel():
                yield from roundings(partition, partition.local_weights, partition.master)

    @torch.no_grad()
    def load(self, fill: Callable[[Iterable[TensorBox]], object]) -> None:
        """Let `fill` write the boxes of this rank's weights and moments; then bring the model in line, on every rank."""
        fill(chain(self.weight_boxes(write=False), self.optimizer_boxes(write=False)))
        self._parts.publish()


def _by_class(chunks: Sequence[nn.Module]) -> dict[BucketClass, list[ShardedParameter]]:
    """The parameters in groups that never mix weight-decay classes nor kinds of replicas, in the same order on every rank."""
    groups: dict[BucketClass, list[ShardedParameter]] = {}
    for parameter in nn.ModuleList(chunks).parameters():
        assert isinstance(parameter, ShardedParameter), "every parameter must know its place"
        groups.setdefault(class_of(parameter), []).append(parameter)
    return dict(sorted(groups.items(), key=lambda item: (item[0].replica_axes, not item[0].decay)))


def _own_sinks(parameters: Sequence[ShardedParameter]) -> Tensor:
    """A flat fp32 gradient buffer for a group's sinks. They are made before DeepSpeed's hooks, which would run first."""
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
    flat_sinks(parameters, flat)
    return flat


def _base_optimizer(groups: Mapping[BucketClass, list[ShardedParameter]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """torch's fused optimizer, which divides gradients by `grad_scale` and does nothing where `found_inf` is 1."""
    adam = settings.algorithm == "adamw"
    param_groups = [
        {"params": list(members), "weight_decay": settings.weight_decay * key.decay * adam} for key, members in groups.items()
    ]
    if not adam:
        return torch.optim.SGD(param_groups, lr=0.0, fused=True)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(param_groups, lr=0.0, betas=betas, eps=settings.eps, fused=True)
