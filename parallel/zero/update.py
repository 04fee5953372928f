"""The update of this rank's shards: fp32 master weights, AdamW's moments, and the model's weights made from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from parallel.kernels import optimizer_kernels
from parallel.kernels.providers import Kernel
from parallel.zero.buckets import Bucket
from parallel.zero.engine import OptimizerSettings
from parallel.zero.loss_scale import LossScale
from parallel.zero.storage import Master, Remainder, Rounded, Storage, Whole, slices

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardState:
    """What the update keeps of one bucket's shard: its master weights and moments, by kind."""

    def __init__(self, bucket: Bucket, settings: OptimizerSettings) -> None:
        self.bucket, weights = bucket, bucket.local_weights
        self.size, self.device = weights.numel(), weights.device
        master = Remainder(weights) if settings.master_weights == "remainder" else Master(weights)
        self.kinds: dict[str, Storage] = {MASTER: master}
        for moment in MOMENTS if settings.algorithm == "adamw" else ():
            if settings.moment_dtype == torch.bfloat16:
                self.kinds[moment] = Rounded(weights)
            else:
                self.kinds[moment] = Whole(torch.zeros(self.size, dtype=torch.float32, device=self.device))
        self.is_whole = all(storage.whole is not None for storage in self.kinds.values())

    def read(self, kind: str) -> Tensor:
        """All numbers of a kind in fp32: what is kept, or a copy of it in host memory, where there is room for it."""
        storage = self.kinds[kind]
        if storage.whole is not None:
            return storage.whole
        return torch.cat([storage.read(place).cpu() for place in slices(self.size, self.device)])

    def store(self, kind: str, numbers: Tensor, step: Tensor) -> None:
        """Take over what was written into the tensor that `read` gave."""
        storage = self.kinds[kind]
        for place in slices(self.size, self.device):
            storage.write(place, numbers[place].to(self.device), step)


class ShardedUpdate:
    """AdamW or SGD over the shards of all buckets. It is masked and clipped on the device: the host waits for nothing."""

    def __init__(self, buckets: Sequence[Bucket], settings: OptimizerSettings, adamw: Kernel = optimizer_kernels.adamw) -> None:
        self.settings, self._adamw = settings, adamw
        self.shards = [ShardState(bucket, settings) for bucket in buckets]
        self.moment_names = MOMENTS if settings.algorithm == "adamw" else ()
        device = buckets[0].weights.device
        self._step = torch.zeros((), dtype=torch.float32, device=device)
        self.loss_scale: LossScale | None = None
        if settings.loss_scale:
            self.loss_scale = LossScale(settings.loss_scale, settings.loss_scale_window, device)

    def tensors(self) -> list[Tensor]:
        """All that `apply` changes: a copy of them takes an update back. Weights are among them only as part of a master."""
        storages = [storage for shard in self.shards for storage in shard.kinds.values()]
        return [self._step, *(tensor for storage in storages for tensor in storage.tensors())]

    def kept(self) -> Iterator[tuple[str, Bucket, Tensor]]:
        """All flat tensors beside the model's weights, each with its kind, "master" or a moment, and its bucket."""
        for shard in self.shards:
            for kind, storage in shard.kinds.items():
                for tensor in storage.tensors():
                    if tensor is not shard.bucket.local_weights:
                        yield kind, shard.bucket, tensor

    @property
    def state_bytes(self) -> int:
        """Masters, as far as they are not the weights themselves, and moments."""
        return sum(storage.state_bytes for shard in self.shards for storage in shard.kinds.values())

    @property
    def steps(self) -> int:
        """Updates applied so far (skipped ones don't count). Reading it waits for the device."""
        return int(self._step.item())

    @steps.setter
    def steps(self, steps: int) -> None:
        self._step.fill_(steps)

    def read(self, kind: str) -> Iterator[Tensor]:
        """Of each shard its "master" or a moment, flat and fp32: what is kept, or a copy of it."""
        return (shard.read(kind) for shard in self.shards)

    @torch.no_grad()
    def store(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Take over what was written into the tensors that `read` gave, into this rank's part of the model's weights too."""
        for shard, tensor in zip(self.shards, tensors, strict=True):
            shard.store(kind, tensor, self._step)

    @torch.no_grad()
    def apply(self, learning_rate: float, norm: Tensor, skipped: Tensor) -> None:
        """Update masters and moments by the buckets' reduced gradients, clipped by their `norm`, and write the model's weights.

        The gradients bear the loss scale, `norm` does not. Where `skipped` is 1 nothing changes but the scale, and that only
        if the norm is not finite (device scalars both).
        """
        grad_scale = torch.ones_like(self._step) if self.loss_scale is None else self.loss_scale.value
        if self.settings.clip_norm > 0:
            grad_scale = grad_scale * (norm / self.settings.clip_norm).clamp(min=1.0).float()
        self._step += 1.0 - skipped
        for decay in (True, False):
            shards = [shard for shard in self.shards if shard.bucket.bucket_class.decay == decay]
            for parts in _batches(shards):
                self._apply(parts, decay, learning_rate, grad_scale, skipped)
        if self.loss_scale is not None:
            self.loss_scale.update(norm, skipped)

    def _apply(
        self,
        parts: list[tuple[ShardState, slice]],
        decay: bool,
        learning_rate: float,
        grad_scale: Tensor,
        skipped: Tensor,
    ) -> None:
        numbers = {kind: [shard.kinds[kind].read(place) for shard, place in parts] for kind in (MASTER, *self.moment_names)}
        grads = [shard.bucket.master_grad[place] for shard, place in parts]
        settings, common = self.settings, {"learning_rate": learning_rate, "grad_scale": grad_scale, "found_inf": skipped}
        if settings.algorithm == "sgd":
            optimizer_kernels.sgd(numbers[MASTER], grads, **common)
        else:
            self._adamw(
                numbers[MASTER],
                grads,
                *(numbers[moment] for moment in MOMENTS),
                self._step,
                beta1=settings.beta1,
                beta2=settings.beta2,
                eps=settings.eps,
                weight_decay=settings.weight_decay * decay,
                **common,
            )
        for kind, updated in numbers.items():
            for (shard, place), tensor in zip(parts, updated, strict=True):
                shard.kinds[kind].write(place, tensor, self._step)


def _batches(shards: Sequence[ShardState]) -> Iterator[list[tuple[ShardState, slice]]]:
    """What to update together: all that is kept in fp32 by one kernel, the rest in slices, of which fp32 copies are made."""
    whole = [(shard, slice(0, shard.size)) for shard in shards if shard.is_whole]
    if whole:
        yield whole
    for shard in shards:
        if not shard.is_whole:
            for place in slices(shard.size, shard.device):
                yield [(shard, place)]
