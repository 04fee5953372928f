"""What the tests of `parallel/` build on each rank: parameters cut out of known full tensors, and full tensors from parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from parallel.groups import ProcessGroups, build_groups
from parallel.shards import Box, Segment, Shard, TensorBox
from parallel.tensor.parameter import ShardedParameter
from parallel.topology import Topology

CPU = torch.device("cpu")
Part = tuple[str, Box, Tensor]  # the full tensor's name, the place in it, the values


def grid(
    rank: int,
    replica_groups: Mapping[str, list[tuple[int, ...]]] | None = None,
    shard_group_size: int = 0,
    **sizes: int,
) -> ProcessGroups:
    """The process groups of a rank: `grid(rank, tp=2, dp=2)`."""
    return build_groups(Topology(**sizes), rank, replica_groups, shard_group_size=shard_group_size)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same normal values on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whole(name: str, shape: tuple[int, ...], **settings) -> Shard:
    """The place of a parameter that is one whole logical tensor."""
    return Shard(shape, (Segment(name, shape, Box.whole(shape), Box.whole(shape)),), **settings)


def parameter(shard: Shard, full: Mapping[str, Tensor]) -> ShardedParameter:
    """A parameter whose segments hold their boxes of the full tensors."""
    dtype = next((tensor.dtype for tensor in full.values()), torch.float32)
    made = ShardedParameter(shard, dtype, CPU)
    with torch.no_grad():
        for segment in shard.segments:
            made[segment.local.slices()] = full[segment.name][segment.box.slices()]
    return made


def parts(shard: Shard, local: Tensor) -> list[Part]:
    """A local tensor (weights, gradients) cut into parts of the full tensors."""
    return [(s.name, s.box, local.detach()[s.local.slices()].clone()) for s in shard.segments]


def box_parts(boxes: Sequence[TensorBox]) -> list[Part]:
    return [(box.name, box.box, box.tensor.detach().clone()) for box in boxes]


def sum_of_parts(all_parts: Sequence[Part], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors to which every part has been added: of disjoint parts the assembly, of replicas the sum."""
    full = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    for name, box, values in all_parts:
        full[name][box.slices()] += values
    return full


def coverage(all_parts: Sequence[Part], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How many parts hold each element."""
    return sum_of_parts([(name, box, torch.ones_like(values)) for name, box, values in all_parts], like)
