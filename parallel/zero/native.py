"""NativeZero: the default optimizer engine.

Stage 0: every data rank holds the whole optimizer state, gradients are all-reduced. Stage 1: the state is sharded over the
data ranks; gradients leave by reduce-scatter as buckets fill in the last backward pass of a step, weights come back by
all-gather behind the next forward pass. Stage 2: buckets leave in every backward pass and add to the rank's shard; nobody
keeps whole gradients. The state may be sharded over some of the data ranks only (those of a node), of which each such group has
a copy: then shards are added up across groups, and weights are gathered inside one.
Source: Rajbhandari et al. 2020 (ZeRO), stages 1 and 2; Zhang et al. 2022 (MiCS), section 3, for the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from parallel.collectives import all_reduce
from parallel.groups import Axis, ProcessGroups
from parallel.kernels.table import Kernels, resolve_kernels
from parallel.replica_audit import Replicated, Rounded
from parallel.shards import TensorBox
from parallel.tensor.parameter import ShardedParameter
from parallel.zero.boxes import state_boxes
from parallel.zero.buckets import Bucket, Sharding, make_buckets
from parallel.zero.copies import roundings, state_copies, weight_copies
from parallel.zero.engine import Capabilities, Judge, OptimizerSettings, StepInfo, not_finite
from parallel.zero.grad_norm import local_squared_norm, sum_replicas
from parallel.zero.traffic import REDUCTIONS_UNDER_WAY, Gathers, Reductions
from parallel.zero.update import MASTER, ShardedUpdate


class NativeZero:
    """Owns this rank's parameters, gradients and optimizer state.

    During a step linears and hooks add gradients to `main_grad`, and each bucket leaves with its last one; the executor says
    how many passes there are. `step` ends it. Nothing in a step makes the host wait for the device.
    """

    caps = Capabilities(any_schedule=True, main_grad=True, overlap=True)

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        groups: ProcessGroups,
        settings: OptimizerSettings,
        kernels: Kernels | None = None,
    ) -> None:
        self.chunks, self.groups, self.settings = chunks, groups, settings
        self.kernels = kernels or resolve_kernels()
        sharding = _sharding(groups, settings)
        self.copies_axis = sharding.copies_axis
        limit = REDUCTIONS_UNDER_WAY if sharding.holds_buffers else math.inf
        self._reductions = Reductions(limit if settings.overlap else 0)
        self.chunk_buckets = [
            make_buckets(parameters, settings.bucket_size, sharding, self._reductions.start)
            for parameters in _owned_parameters(chunks)
        ]
        self.buckets = [bucket for buckets in self.chunk_buckets for bucket in buckets]
        self.update = ShardedUpdate(self.buckets, settings, self.kernels.adamw)
        self.loss_scale = self.update.loss_scale
        self._gathers = Gathers([bucket for buckets in self.chunk_buckets for bucket in reversed(buckets)])
        owner = {id(parameter): bucket for bucket in self.buckets for parameter in bucket.parameters}
        for chunk in chunks:
            for module in chunk.modules():
                mine = {id(owner[id(p)]): owner[id(p)] for p in module.parameters(recurse=False)}
                if mine:
                    module.register_forward_pre_hook(partial(self._before_use, list(mine.values())))

    def _before_use(self, buckets: list[Bucket], module: nn.Module, inputs: object) -> None:
        for bucket in buckets:
            self._gathers.wait_for(bucket)

    # ---- during a step --------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Clear the gradients."""
        for bucket in self.buckets:
            bucket.begin_step()

    def expect_passes(self, count: int) -> None:
        """Every chunk makes the gradients of `count` backward passes in this step: buckets leave as they fill.

        Buckets with replicas wait for `step`: a copy may be on another stage, which is not done yet. So do all without overlap,
        but for those that leave in every pass.
        """
        for bucket in self.buckets:
            if bucket.every_pass or (self.settings.overlap and not bucket.bucket_class.replica_axes):
                bucket.expect_passes(count)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Finish the reduction: afterwards each shard holds the gradient of the global batch.

        What has not left yet leaves now: buckets with replicas, and those that did not fill (a parameter was not used).
        """
        for bucket in self.buckets:
            if not bucket.has_left:
                sum_replicas(bucket, self.groups)
                bucket.has_left = True
                self._reductions.start(bucket)
        self._reductions.finish()

    @torch.no_grad()
    def step(self, learning_rate: float, sums: Tensor, judge: Judge = not_finite) -> StepInfo:
        """Reduce what has not left yet, clip, update, and send the weights on their way.

        `sums` [n] fp64: the caller's values to add up over the world along with the squared norm, in the same message. The
        update is masked on the device where the `judge` of the step says so; the count of Adam's steps stands still then.
        """
        self.reduce_gradients()
        self._gathers.finish()  # of weights that no forward pass has used
        scale = None if self.loss_scale is None else self.loss_scale.value
        part = self._local_totals(sums)
        info = StepInfo(all_reduce(part.clone(), self.groups.world), part, judge, loss_scale=scale)
        self.update.apply(learning_rate, info.norm, info.skipped)
        self._start_gathers()
        return info

    def _local_totals(self, sums: Tensor) -> Tensor:  # [n] -> [1 + n]
        """This rank's part of a step's totals: its squared norm and `sums`."""
        squared_norm = local_squared_norm(self.buckets, self.copies_axis.size, self.kernels.l2_norm)
        return torch.cat([squared_norm[None], sums])

    def _start_gathers(self) -> None:
        """The shards have new weights: send them on their way."""
        self._gathers.start()
        if not self.settings.overlap:
            self._gathers.finish()

    def inspect_gradients(self, look: Callable[[ShardedParameter], None] | None) -> None:
        """From now on call `look` with each parameter whose gradient has got a part; None: no more."""
        for bucket in self.buckets:
            bucket.inspect = look

    def finish(self) -> None:
        """Wait for the gathers under way: before evaluating, saving or leaving."""
        self._gathers.finish()

    # ---- state ----------------------------------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """What this rank holds between steps: weights, gradients, fp32 masters where they are not the weights, moments.

        In stage 2 there are the buckets that fill and travel besides, during a step.
        """
        return sum(bucket.buffer_bytes for bucket in self.buckets) + self.update.state_bytes

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far (skipped steps don't count). Reading it waits for the device."""
        return self.update.steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        self.update.steps = steps

    def weight_boxes(self, write: bool) -> Iterator[TensorBox]:
        """The fp32 weights of this rank's shards as boxes of logical tensors.

        `write`: only what this rank is to store (of copies, its share); otherwise everything it holds.
        """
        yield from self._boxes(write, "", self.update.read("master"))

    def optimizer_boxes(self, write: bool) -> Iterator[TensorBox]:
        """The optimizer's moments likewise, named `exp_avg/NAME` and `exp_avg_sq/NAME`."""
        for kind in self.update.moment_names:
            yield from self._boxes(write, f"{kind}/", self.update.read(kind))

    def gradient_boxes(self) -> Iterator[TensorBox]:
        """The reduced gradients (fp32) of this rank's shards, between `reduce_gradients` and the update."""
        yield from self._boxes(False, "", [bucket.master_grad for bucket in self.buckets])

    def _boxes(self, write: bool, prefix: str, flats: Iterable[Tensor]) -> Iterator[TensorBox]:
        copies = self.copies_axis
        return state_boxes(self.buckets, flats, prefix, (copies.rank, copies.size) if write else None)

    def replicated(self) -> Iterator[Replicated]:
        """What other ranks hold too, after `finish`: all weights, and the state of shards and segments that have copies."""
        parameters = (parameter for bucket in self.buckets for parameter in bucket.parameters)
        yield from weight_copies(parameters, self.groups)
        for kind, bucket, flat in self.update.kept():
            yield from state_copies(kind, bucket, flat, self.groups, self.copies_axis)

    def rounded(self) -> Iterator[Rounded]:
        """The weights of this rank's shards and the fp32 masters that they are made from, where these are kept whole."""
        for kind, bucket, flat in self.update.kept():
            if kind == MASTER and flat.dtype == torch.float32:
                yield from roundings(bucket, bucket.local_weights, flat)

    @torch.no_grad()
    def load(self, fill: Callable[[Iterable[TensorBox]], object]) -> None:
        """Let `fill` write the boxes of this rank's weights and moments; then bring the model in line, on every rank."""
        tensors = {kind: list(self.update.read(kind)) for kind in ("master", *self.update.moment_names)}
        prefixes = {kind: "" if kind == "master" else f"{kind}/" for kind in tensors}
        fill(chain.from_iterable(self._boxes(False, prefixes[kind], flats) for kind, flats in tensors.items()))
        for kind, flats in tensors.items():
            self.update.store(kind, flats)
        self.publish_weights()

    @torch.no_grad()
    def publish_weights(self) -> None:
        """After the shards were written: bring the model's weights in line with them, on every rank."""
        self._gathers.start()
        self._gathers.finish()


def _sharding(groups: ProcessGroups, settings: OptimizerSettings) -> Sharding:
    """Who has which part of the optimizer. In stage 0 all data ranks have copies of the whole."""
    shard, copies = groups.shard, groups.copies
    if settings.zero_stage == 0:
        shard, copies = Axis.single("shard", groups.data.ranks[groups.data.rank], groups.ledger), groups.data
    narrower = min(settings.gradient_dtype, settings.reduce_dtype, key=lambda dtype: dtype.itemsize)
    return Sharding(shard, copies, settings.gradient_dtype, narrower, every_pass=settings.zero_stage == 2)


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
