"""The audit of replicated state: what several ranks hold must be the same, bit for bit.

A memory, a link or a core that errs without a word leaves one copy unlike the others. Each rank takes a checksum of every copy
on its device; one small message per axis compares them. Where they differ, the majority tells which rank it is; two copies
cannot, but a rank that differs along several axes gives itself away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import all_gather, all_reduce, broadcast, gather_objects
from parallel.groups import Axis
from parallel.shards import Box

SLICE = {"cuda": 1 << 23, "cpu": 1 << 17}  # elements that are 64 bits wide at a time: on CPUs what stays in the cache
LOOKED_AT = 8  # of the tensors that differ along an axis: one message or more for each


@dataclass(frozen=True)
class Replicated:
    """`tensor` (contiguous) is `box` of what `name` says, and the same on all ranks of each of the `axes`."""

    name: str
    box: Box
    tensor: Tensor
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Rounded:
    """`tensor`, which is `box` of the global tensor `name`, is this rank's fp32 `master`, rounded."""

    name: str
    box: Box
    tensor: Tensor
    master: Tensor


@dataclass(frozen=True)
class Finding:
    """Copies of `box` of `name` that differ: those of `ranks`, along `axis`; without one, the two on a rank alone.

    `suspects`: the ranks that the majority does not agree with; all of them where there is none. `differing` elements are not
    those of the copy most trusted, the first of them at `first` in the global tensor.
    """

    name: str
    box: Box
    axis: str
    ranks: tuple[int, ...]
    suspects: tuple[int, ...]
    differing: int
    first: tuple[int, ...]

    def __str__(self) -> str:
        if self.axis:
            what = f"{self.name} over {self.axis} (ranks {', '.join(map(str, self.ranks))})"
        else:
            what = f"{self.name} on rank {self.ranks[0]}, which is not its master weights rounded"
        return f"{what}: {self.differing:,} of {self.box.numel:,} elements differ, the first at {list(self.first)}"


@dataclass(frozen=True)
class Audit:
    """What an audit has found, the same on every rank: `count` differences, of which `findings` are the first."""

    count: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def culprits(self) -> tuple[int, ...]:
        """The ranks that most findings suspect: one, or several that nothing tells apart."""
        suspected = Counter(rank for finding in self.findings for rank in finding.suspects)
        most = max(suspected.values(), default=0)
        return tuple(sorted(rank for rank, times in suspected.items() if times == most))


@torch.no_grad()
def audit(replicated: Iterable[Replicated], rounded: Iterable[Rounded], world: Axis, device: torch.device) -> Audit:
    """Compare all copies; all ranks call it together, while nothing writes to them. `device`: where the ranks' messages are.

    An axis costs one all-reduce of 32 bytes per tensor, the world one of 8; where nothing differs, that is all.
    """
    copies, roundings = list(replicated), list(rounded)
    checksums = torch.stack([checksum(copy.tensor).to(device) for copy in copies]) if copies else None
    axes: dict[str, tuple[Axis, list[int]]] = {}  # by name, each with the places of its copies in the list
    for place, copy in enumerate(copies):
        for axis in copy.axes:
            axes.setdefault(axis.name, (axis, []))[1].append(place)
    unequal = {name: _unequal(checksums[places], axis) for name, (axis, places) in sorted(axes.items())}
    wrong = [_count(_pairs(pair), device) for pair in roundings]
    count = torch.zeros(1, dtype=torch.int64, device=device)
    for name, flags in unequal.items():
        if axes[name][0].rank == 0:  # each difference counts once
            count += flags.sum()
    for differing in wrong:
        count += differing > 0
    total = int(all_reduce(count, world).item())
    if total == 0:
        return Audit()
    mine = []
    for pair in [pair for pair, differing in zip(roundings, wrong, strict=True) if differing > 0][:LOOKED_AT]:
        mine.append(_finding(pair, "", (world.rank,), (world.rank,), *_differences(_pairs(pair), device).tolist()))
    for name, flags in unequal.items():
        axis, places = axes[name]
        for i in flags.nonzero().flatten().tolist()[:LOOKED_AT]:
            finding = _look_closer(copies[places[i]], checksums[places[i]], axis)
            mine += [finding] if axis.rank == 0 else []
    return Audit(total, tuple(finding for findings in gather_objects(mine, world) for finding in findings))


def checksum(tensor: Tensor) -> Tensor:
    """Two numbers [2] int64 of a contiguous tensor's bits: the sum of its 32-bit words, and that of words times their places.

    In exact integers, so one or two words that changed, in whichever bits, and two that changed places are always found. Of
    further changes it misses those that cancel out in both sums modulo 2^64. Words have 16 bits where the tensor's bytes don't
    divide into more.
    """
    words = _bits(tensor.reshape(-1))
    if words.dtype == torch.int16 and words.numel() % 2 == 0:
        words = (words.clone() if words.storage_offset() % 2 else words).view(torch.int32)
    size = SLICE[words.device.type]
    places = torch.arange(min(size, words.numel()), device=words.device)
    sums = torch.zeros(2, dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), size):
        part = words[start : start + size].long()
        plain = part.sum()
        sums[0] += plain
        sums[1] += part.mul_(places[: part.numel()]).sum() + plain * start
    return sums


def _bits(tensor: Tensor) -> Tensor:
    """The numbers as integers of their size, so that NaN equals itself and -0.0 is not 0.0."""
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def _unequal(checksums: Tensor, axis: Axis) -> Tensor:  # [n, 2] -> [n] bool
    """Which checksums are not the same on all members: their largest is above their smallest."""
    extremes = all_reduce(torch.stack([checksums, ~checksums]), axis, dist.ReduceOp.MAX)  # ~x falls as x rises
    return (extremes[0] != ~extremes[1]).any(dim=1)


def _look_closer(copy: Replicated, own: Tensor, axis: Axis) -> Finding:
    """Which members have the unlike copy, and where; all of them call it together. `own` is this one's checksum [2]."""
    values = [tuple(row) for row in all_gather(own[None], axis).tolist()]
    value, count = Counter(values).most_common(1)[0]
    trusted = values.index(value)
    is_majority = 2 * count > axis.size
    suspects = [rank for rank, sums in zip(axis.ranks, values, strict=True) if not is_majority or sums != value]
    differing, first = all_gather(_differences(_received(copy.tensor, axis, trusted, own.device), own.device)[None], axis).T
    return _finding(copy, axis.name, axis.ranks, tuple(suspects), int(differing.max()), int(first.min()))


def _finding(
    pair: Replicated | Rounded, axis: str, ranks: tuple[int, ...], suspects: tuple[int, ...], differing: int, first: int
) -> Finding:
    """`first`: the place of the first differing element in the flattened tensor."""
    local = np.unravel_index(first, pair.box.shape)
    place = tuple(int(i) + offset for i, offset in zip(local, pair.box.offset, strict=True))
    return Finding(pair.name, pair.box, axis, ranks, suspects, differing, place)


def _pairs(pair: Rounded) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of the weights and of what they should be."""
    size = SLICE[pair.tensor.device.type]
    for part, master in zip(pair.tensor.reshape(-1).split(size), pair.master.reshape(-1).split(size), strict=True):
        yield part, master.to(part.dtype)


def _received(tensor: Tensor, axis: Axis, source: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of this rank's copy and of that of the member with index `source`, which sends them as bytes."""
    for part in tensor.reshape(-1).split(SLICE[tensor.device.type]):
        part = part.to(device)
        yield part, broadcast(part.clone().view(torch.uint8), axis, source).view(part.dtype)


def _count(pairs: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """How many elements of the slices differ: a number on `device`."""
    count = torch.zeros((), dtype=torch.int64, device=device)
    for one, other in pairs:
        count += torch.count_nonzero(_bits(one) != _bits(other)).to(device)
    return count


def _differences(pairs: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """How many elements of the slices differ, and the place of the first one: [2] int64, on `device`."""
    count = torch.zeros((), dtype=torch.int64, device=device)
    first, start = torch.full_like(count, torch.iinfo(torch.int64).max), 0
    for one, other in pairs:
        unlike = (_bits(one) != _bits(other)).to(device)
        count += torch.count_nonzero(unlike)
        place = unlike.to(torch.uint8).argmax() + start
        first = torch.where(unlike.any(), torch.minimum(first, place), first)
        start += one.numel()
    return torch.stack([count, first])
