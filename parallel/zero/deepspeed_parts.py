"""What this rank updates under DeepSpeed, where its optimizers keep it, and how our gradients get there.

DeepSpeed's three optimizers (BF16_Optimizer, DeepSpeedZeroOptimizer for stages 1 and 2, DeepSpeedZeroOptimizer_Stage3) lay
parameter groups out in flat tensors under names of their own; `parts_of` gives them one face. Nothing here imports DeepSpeed;
every private name of its that we rely on is in this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import all_reduce
from parallel.groups import ProcessGroups
from parallel.shards import Piece, range_pieces
from parallel.tensor.parameter import ShardedParameter
from parallel.zero.buckets import BucketClass


@dataclass(frozen=True)
class Slice:
    """Elements [low, high) of a flattened parameter, which are [first, first + high - low) of a partition."""

    parameter: ShardedParameter
    low: int
    high: int
    first: int


class Partition:
    """What this rank updates of one parameter group: slices of parameters of one class, laid end to end.

    `master` (fp32) and `local_weights` (model dtype) hold them; `master_grad` does between reduction and update.
    """

    master_grad: Tensor

    def __init__(
        self, parameters: Sequence[ShardedParameter], slices: Sequence[Slice], master: Tensor, local_weights: Tensor
    ) -> None:
        self.parameters, self.slices = list(parameters), list(slices)
        self.master, self.local_weights = master, local_weights
        self.bucket_class = class_of(self.parameters[0])

    def pieces(self) -> Iterator[tuple[Piece, slice]]:
        """Parts of the partition in named global tensors, each with its place in it (`master[place]`)."""
        for part in self.slices:
            for piece in range_pieces(part.parameter.shard, part.low, part.high):
                first = part.first + piece.start - part.low
                yield piece, slice(first, first + piece.box.numel)


def class_of(parameter: ShardedParameter) -> BucketClass:
    """What all parameters of one group have in common."""
    return BucketClass(parameter.shard.decay, parameter.shard.replica_axes)


class FlatSink:
    """Collects one parameter's gradient in fp32 (a `GradientSink`); DeepSpeed gets it at the end of the step."""

    def __init__(self, parameter: ShardedParameter, main_grad: Tensor) -> None:
        self.main_grad = main_grad
        parameter.sink = self
        parameter.register_post_accumulate_grad_hook(self._fold)

    def ready(self) -> None:
        """Nothing leaves before the end of the step."""

    def _fold(self, parameter: Tensor) -> None:
        """After autograd has made `.grad` (norm weights): add it in fp32 and drop it."""
        if parameter.grad is not None:
            self.main_grad.add_(parameter.grad)
            parameter.grad = None


def flat_sinks(parameters: Sequence[ShardedParameter], flat: Tensor) -> None:
    """Give each parameter a sink in `flat`, end to end."""
    offset = 0
    for parameter in parameters:
        FlatSink(parameter, flat[offset : offset + parameter.numel()].view(parameter.shape))
        offset += parameter.numel()


def sum_replicas_by_hook(parameter: ShardedParameter, groups: ProcessGroups) -> None:
    """Sum the partial gradients of replicated segments over their axes in every backward pass, before DeepSpeed sees them."""
    partial = [s for s in parameter.shard.segments if s.replica is not None and s.replica.partial_gradient]
    if not partial:
        return

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        for segment in partial:
            view = gradient[segment.local.slices()]
            view.copy_(all_reduce(view.contiguous(), groups.axis(segment.replica.axis)))
        return gradient

    parameter.register_hook(summed)


class PartsInMemory:
    """What holds where all state stays in memory, and gradients are sums."""

    gradient_factor = 1  # what a `master_grad` is to be multiplied by

    def in_memory(self, number: int) -> AbstractContextManager[None]:
        """Inside this context the master and moments of a partition are in memory."""
        return nullcontext()

    def whole(self, partition: Partition, tensor: Tensor) -> Tensor:
        """A master or moment of the partition; where it lies in a file, that file as a tensor."""
        return tensor


class Bf16Parts(PartsInMemory):
    """BF16_Optimizer: stage 1 in bf16 with fp32 gradients. Our sinks are its own flat gradient buffer."""

    def __init__(self, optimizer: Any, rank: int) -> None:
        self.optimizer = optimizer
        lists = (optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, optimizer.bf16_partitioned_groups)
        self.partitions = [
            Partition(parameters, _flat_slices(parameters, rank, master.numel()), master, weights[rank])
            for parameters, master, weights in zip(*lists, strict=True)
        ]
        for partition, flat in zip(self.partitions, optimizer.fp32_groups_gradients_flat, strict=True):
            flat_sinks(partition.parameters, flat)

    @property
    def buffers(self) -> list[Tensor]:
        return self.optimizer.bf16_groups_flat

    @property
    def gradient_bytes(self) -> int:
        return sum(flat.nbytes for flat in self.optimizer.fp32_groups_gradients_flat)

    def clear(self) -> None:
        self.optimizer.zero_grad()

    def hand_over(self) -> None:
        """The gradients are there already; it only has to know."""
        for flags in self.optimizer.fp32_groups_has_gradients:
            flags[:] = [True] * len(flags)

    def take_gradients(self) -> None:
        for partition, gradient in zip(self.partitions, self.optimizer.fp32_groups_gradient_flat_partition, strict=True):
            partition.master_grad = gradient

    def publish(self) -> None:
        self.optimizer.update_lp_params()


class ZeroParts(PartsInMemory):
    """DeepSpeedZeroOptimizer: stage 2; stage 1 in fp32 or with the optimizer on the host.

    `flats`: in stage 1 our sinks' buffers, one per group; empty in stage 2, which reduces in every backward pass.
    """

    def __init__(self, optimizer: Any, rank: int, flats: Sequence[Tensor]) -> None:
        self.optimizer, self.flats = optimizer, flats
        masters = optimizer.single_partition_of_fp32_groups
        lists = (optimizer.bit16_groups, masters, optimizer.parallel_partitioned_bit16_groups)
        self.partitions = [
            Partition(parameters, _flat_slices(parameters, rank, master.numel()), master, weights[rank])
            for parameters, master, weights in zip(*lists, strict=True)
        ]

    @property
    def buffers(self) -> list[Tensor]:
        return self.optimizer.bit16_groups_flat

    @property
    def gradient_bytes(self) -> int:
        """The sinks' buffers, and in stage 2 or on the host this rank's part by itself."""
        part = 0 if self.flats and not self.optimizer.cpu_offload else sum(p.master.nbytes for p in self.partitions)
        return part + sum(flat.nbytes for flat in self.flats)

    def clear(self) -> None:
        self.optimizer.zero_grad()
        for flat in self.flats:
            flat.zero_()

    def hand_over(self) -> None:
        """Give it the gradients where it looks for them; it may move them, so it gets other tensors of the same memory."""
        if not self.flats:
            return
        name = "grad_accum" if self.optimizer.use_grad_accum_attribute else "grad"
        for partition in self.partitions:
            for parameter in partition.parameters:
                setattr(parameter, name, parameter.sink.main_grad.detach())
        self.optimizer.setup_buckets()

    def take_gradients(self) -> None:
        for i, partition in enumerate(self.partitions):
            if self.optimizer.cpu_offload:
                partition.master_grad = partition.master.grad
            else:
                partition.master_grad = torch.cat([part.reshape(-1) for part in self.optimizer.averaged_gradients[i]])

    def publish(self) -> None:
        self.optimizer.update_lp_params()


class Stage3Parts(PartsInMemory):
    """DeepSpeedZeroOptimizer_Stage3: every parameter is split over the data ranks by itself.

    It averages where we need sums: hence a factor, the number of data ranks, that the norm and the update make good for.
    """

    def __init__(self, optimizer: Any, rank: int, data_ranks: int) -> None:
        self.optimizer, self.gradient_factor = optimizer, data_ranks
        lists = (optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat)
        self.partitions = [
            Partition(parameters, _parameter_slices(parameters, rank), master, weights)
            for parameters, master, weights in zip(*lists, strict=True)
        ]

    @property
    def buffers(self) -> list[Tensor]:
        return self.optimizer.fp16_partitioned_groups_flat

    @property
    def gradient_bytes(self) -> int:
        return self.optimizer.grad_partitions_flat_buffer.nbytes

    def clear(self) -> None:
        self.optimizer.zero_grad()

    def hand_over(self) -> None:
        """Its hooks have taken the gradients in the backward passes."""

    def take_gradients(self) -> None:
        offset = 0
        for partition in self.partitions:
            size = partition.local_weights.numel()
            partition.master_grad = self.optimizer.grad_partitions_flat_buffer[offset : offset + size]
            offset += size

    def publish(self) -> None:
        """Write the masters into this rank's parts of the weights, and gather those that are always whole."""
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for number in range(len(self.partitions)):
            with self.in_memory(number):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


class Stage3FileParts(Stage3Parts):
    """Stage 3 with masters and moments in files, read and written for each update; partitions below 1 MiB stay in memory.

    A file holds a partition's fp32 numbers and padding, so a mapping of it is the tensor, of which the system keeps in memory
    what it likes.
    """

    @property
    def buffers(self) -> list[Tensor]:
        return [*super().buffers, *self.optimizer.optimizer_swapper.swap_buffer_manager.all_buffers]

    @contextmanager
    def in_memory(self, number: int) -> Iterator[None]:
        """Read the partition's files, and write them again at the end."""
        if not self.optimizer._swappable_optimizer_subgroup(number):
            yield
            return
        self.optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        self.optimizer._optimizer_states_and_gradient_swap_out(number)

    def whole(self, partition: Partition, tensor: Tensor) -> Tensor:
        if tensor.numel() > 0:
            return tensor
        path = self._folder / f"{tensor.ds_id}.tensor.swp"
        return torch.from_file(str(path), shared=True, size=partition.local_weights.numel(), dtype=tensor.dtype)

    def publish(self) -> None:
        """DeepSpeed's direct reads may go past what was written through mappings, so that goes to the disk first."""
        for path in self._folder.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        super().publish()

    @property
    def _folder(self) -> Path:
        return Path(self.optimizer.optimizer_swapper.swap_folder)


def _flat_slices(parameters: Sequence[ShardedParameter], rank: int, size: int) -> Iterator[Slice]:
    """The parameters lie end to end; this rank has elements [rank * size, (rank + 1) * size) of them."""
    start, offset = rank * size, 0
    for parameter in parameters:
        low, high = max(start - offset, 0), min(start + size - offset, parameter.numel())
        if low < high:
            yield Slice(parameter, low, high, offset + low - start)
        offset += parameter.numel()


def _parameter_slices(parameters: Sequence[ShardedParameter], rank: int) -> Iterator[Slice]:
    """Each parameter is cut into equal parts, the last one padded; this rank's parts lie end to end."""
    first = 0
    for parameter in parameters:
        size = parameter.partition_numel()
        low, high = rank * size, min((rank + 1) * size, parameter.ds_numel)
        if low < high:
            yield Slice(parameter, low, high, first)
        first += size
