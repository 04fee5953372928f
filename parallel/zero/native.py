"""NativeZero: the default optimizer engine.

Stage 0: every data rank holds the whole optimizer state, gradients are all-reduced. Stage 1: the state is sharded over the
data ranks; gradients leave by reduce-scatter as buckets fill in the last backward pass of a step, weights come back by
all-gather behind the next forward pass. Source: Rajbhandari et al. 2020 (ZeRO), stage 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from parallel.collectives import all_reduce
from parallel.groups import Axis, ProcessGroups
from parallel.shards import TensorBox
from parallel.tensor.parameter import ShardedParameter
from parallel.zero.buckets import Bucket, make_buckets
from parallel.zero.engine import Capabilities, OptimizerSettings, StepInfo
from parallel.zero.grad_norm import local_squared_norm, sum_replicas


class NativeZero:
    """Owns this rank's parameters, gradients and optimizer state.

    During a step linears and hooks add gradients to `main_grad`, and each bucket leaves with its last one; the executor says
    how many passes there are. `step` ends it. Nothing in a step makes the host wait for the device.
    """

    caps = Capabilities(any_schedule=True, main_grad=True, overlap=True)

    def __init__(self, chunks: Sequence[nn.Module], groups: ProcessGroups, settings: OptimizerSettings) -> None:
        self.groups, self.settings = groups, settings
        sharded = settings.zero_stage >= 1
        shard_axis = groups.data if sharded else Axis.single("data", groups.data.ranks[groups.data.rank], groups.ledger)
        self.data_copies = 1 if sharded else groups.data.size
        self.chunk_buckets = [
            make_buckets(parameters, settings.bucket_size, shard_axis, groups.data) for parameters in _owned_parameters(chunks)
        ]
        self.buckets = [bucket for buckets in self.chunk_buckets for bucket in buckets]
        self._optimizer = self._make_optimizer()
        owner = {id(parameter): bucket for bucket in self.buckets for parameter in bucket.parameters}
        for chunk in chunks:
            for module in chunk.modules():
                mine = {id(owner[id(p)]): owner[id(p)] for p in module.parameters(recurse=False)}
                if mine:
                    module.register_forward_pre_hook(_waiter(list(mine.values())))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        param_groups = []
        for decay in (True, False):
            masters = [bucket.master for bucket in self.buckets if bucket.bucket_class.decay == decay]
            if masters:
                param_groups.append({"params": masters, "weight_decay": settings.weight_decay * decay})
        for bucket in self.buckets:
            bucket.master.grad = bucket.master_grad
        if settings.algorithm == "sgd":
            for group in param_groups:
                group["weight_decay"] = 0.0
            return torch.optim.SGD(param_groups, lr=0.0, fused=True)
        optimizer = torch.optim.AdamW(
            param_groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
        )
        for bucket in self.buckets:  # made now: memory does not grow at the first step, and a checkpoint has where to load
            optimizer.state[bucket.master] = {
                "step": torch.zeros((), dtype=torch.float32, device=bucket.master.device),
                "exp_avg": torch.zeros_like(bucket.master),
                "exp_avg_sq": torch.zeros_like(bucket.master),
            }
        return optimizer

    # ---- during a step --------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Clear the gradients."""
        for bucket in self.buckets:
            bucket.begin_step()

    def expect_passes(self, count: int) -> None:
        """Every chunk makes the gradients of `count` backward passes in this step: buckets leave as they fill.

        Buckets with replicas wait for `step`: a copy may be on another stage, which is not done yet.
        """
        for bucket in self.buckets:
            if not bucket.bucket_class.replica_axes:
                bucket.expect_passes(count)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Finish the reduction: afterwards each shard holds the gradient of the global batch.

        What has not left yet leaves now: buckets with replicas, and those that did not fill (a parameter was not used).
        """
        for bucket in self.buckets:
            if not bucket.has_left:
                sum_replicas(bucket, self.groups)
                bucket.start_reduction()
        for bucket in self.buckets:
            bucket.wait_reduction()

    @torch.no_grad()
    def step(self, learning_rate: float, sums: Tensor) -> StepInfo:
        """Reduce what has not left yet, clip, update, and send the weights on their way.

        `sums` [n] fp64: the caller's values to add up over the world along with the squared norm, in the same message. The
        update is masked on the device where the norm or a sum is not finite; the count of Adam's steps stands still then.
        """
        self.reduce_gradients()
        info = StepInfo(all_reduce(self._local_totals(sums), self.groups.world))
        self._update(learning_rate, info.norm, info.skipped)
        self._start_gathers()
        return info

    def _local_totals(self, sums: Tensor) -> Tensor:  # [n] -> [1 + n]
        """This rank's part of a step's totals: its squared norm and `sums`."""
        return torch.cat([local_squared_norm(self.buckets, self.data_copies)[None], sums])

    def _update(self, learning_rate: float, norm: Tensor, skipped: Tensor) -> None:
        """torch's fused optimizers divide the gradients by `grad_scale` and do nothing where `found_inf` is 1."""
        if self.settings.clip_norm > 0:
            self._optimizer.grad_scale = (norm / self.settings.clip_norm).clamp(min=1.0).float()
        self._optimizer.found_inf = skipped
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()

    def _start_gathers(self) -> None:
        """Send the weights on their way."""
        for buckets in self.chunk_buckets:
            for bucket in reversed(buckets):  # about the order of the next forward passes
                bucket.start_gather()

    def finish(self) -> None:
        """Wait for the gathers under way: before evaluating, saving or leaving."""
        for bucket in self.buckets:
            bucket.wait_gather()

    # ---- state ----------------------------------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """What this rank holds: weights, gradients, fp32 masters where they are not the weights themselves, moments."""
        buffers = [buffer for bucket in self.buckets for buffer in (bucket.weights, bucket.main_grad)]
        buffers += [bucket.master for bucket in self.buckets if bucket.weights.dtype != torch.float32]
        buffers += [tensor for state in self._optimizer.state.values() for tensor in state.values()]
        return sum(buffer.nbytes for buffer in buffers)

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far (skipped steps don't count). Reading it waits for the device."""
        if self.settings.algorithm == "sgd" or not self.buckets:
            return 0
        return int(self._optimizer.state[self.buckets[0].master]["step"].item())

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    def weight_boxes(self, write: bool) -> Iterator[TensorBox]:
        """The fp32 weights of this rank's shards as boxes of logical tensors.

        `write`: only what this rank is to store (the first copy of each replica); otherwise everything it holds.
        """
        yield from self._boxes(write, "", lambda bucket: bucket.master)

    def optimizer_boxes(self, write: bool) -> Iterator[TensorBox]:
        """The optimizer's moments likewise, named `exp_avg/NAME` and `exp_avg_sq/NAME`."""
        if self.settings.algorithm == "adamw":
            for kind in ("exp_avg", "exp_avg_sq"):
                yield from self._boxes(write, f"{kind}/", lambda bucket, kind=kind: self._optimizer.state[bucket.master][kind])

    def gradient_boxes(self) -> Iterator[TensorBox]:
        """The reduced gradients (fp32) of this rank's shards, between `reduce_gradients` and the update."""
        yield from self._boxes(False, "", lambda bucket: bucket.master_grad)

    def _boxes(self, write: bool, prefix: str, flat_of) -> Iterator[TensorBox]:
        if write and self.data_copies > 1 and self.groups.data.rank != 0:
            return
        for bucket in self.buckets:
            flat = flat_of(bucket)
            for piece, place in bucket.pieces():
                segment = piece.segment
                if write and segment.replica is not None and segment.replica.index != 0:
                    continue
                yield TensorBox(prefix + segment.name, segment.global_shape, piece.box, flat[place].view(piece.box.shape))

    @torch.no_grad()
    def publish_weights(self) -> None:
        """After the shards were loaded: bring the model's weights in line with them, on every rank."""
        for bucket in self.buckets:
            bucket.start_gather()
        self.finish()


def _owned_parameters(chunks: Sequence[nn.Module]) -> list[list[ShardedParameter]]:
    """Each chunk's parameters. One that is used twice (a tied table) is listed once, with the first chunk that has it."""
    owned, seen = [], set()
    for chunk in chunks:
        new = [parameter for parameter in chunk.parameters() if id(parameter) not in seen]
        for parameter in new:
            assert isinstance(parameter, ShardedParameter), "every parameter must know its place"
        seen.update(map(id, new))
        owned.append(new)
    return owned


def _waiter(buckets: list[Bucket]):
    def wait(module: nn.Module, inputs: object) -> None:
        for bucket in buckets:
            bucket.wait_gather()

    return wait
