"""The global gradient norm, counted once per logical element, and the sums over replicas before it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from parallel.collectives import all_reduce
from parallel.groups import ProcessGroups
from parallel.kernels import optimizer_kernels
from parallel.kernels.providers import Kernel
from parallel.zero.buckets import Bucket


def sum_replicas(bucket: Bucket, groups: ProcessGroups) -> None:
    """Add up, over each replica axis, the partial gradients of the bucket's replicated segments: one message per axis.

    Afterwards all copies of a segment have the same gradient, bit for bit. It is a message before that of the data ranks: one
    over both would need a communicator for each such pair of axes, and send whole gradients twice instead of shards once.
    """
    views: dict[str, list[Tensor]] = {}
    for parameter in bucket.parameters:
        assert parameter.sink is not None
        for segment in parameter.shard.segments:
            if segment.replica is not None and segment.replica.partial_gradient:
                view = parameter.sink.main_grad[segment.local.slices()]
                views.setdefault(segment.replica.axis, []).append(view)
    for name, members in sorted(views.items()):
        packed = torch.cat([view.reshape(-1) for view in members]).float()
        all_reduce(packed, groups.axis(name))
        parts = packed.split([view.numel() for view in members])
        for view, part in zip(members, parts, strict=True):
            view.copy_(part.view_as(view))


def local_squared_norm(buckets: Iterable[Bucket], data_copies: int, l2_norm: Kernel = optimizer_kernels.l2_norm) -> Tensor:
    """This rank's share of the squared norm of the reduced gradients (fp64 scalar): summed over the world, it is whole.

    A replicated segment counts 1/size on each copy, and everything 1/`data_copies` where the data ranks are not sharded.
    """
    by_weight: dict[int, list[Tensor]] = {}
    device = None
    for bucket in buckets:
        device = bucket.master_grad.device
        if not bucket.bucket_class.replica_axes:
            by_weight.setdefault(1, []).append(bucket.master_grad)
            continue
        for piece, place in bucket.pieces():
            copies = piece.segment.replica.size if piece.segment.replica else 1
            by_weight.setdefault(copies, []).append(bucket.master_grad[place])
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, gradients in by_weight.items():
        total += l2_norm(gradients).double().square() / (copies * data_copies)
    return total
