"""The norm of large gradients: torch's own, on a CPU, adds a whole tensor up in a few fp32 sums and loses digits."""

import math

import pytest
import torch
from torch.nn.utils import get_total_norm

from parallel.groups import Axis
from parallel.kernels.optimizer_kernels import ROW
from parallel.shards import Box, Segment, Shard
from parallel.tensor.parameter import ShardedParameter
from parallel.zero.buckets import Bucket, Sharding, make_buckets
from parallel.zero.grad_norm import local_squared_norm


def bucket_of(size):
    """One bucket of `size` elements, with gradients of about 1e-3."""
    shard = Shard((size,), (Segment("w", (size,), Box.whole((size,)), Box.whole((size,))),))
    parameters = [ShardedParameter(shard, torch.float32, torch.device("cpu"))]
    sharding = Sharding(Axis.single("shard"), Axis.single("copies"))
    (bucket,) = make_buckets(parameters, size, sharding, Bucket.start_reduction)
    generator = torch.Generator().manual_seed(0)
    bucket.main_grad[:size].copy_(torch.randn(size, generator=generator) * 1e-3)
    return bucket


@pytest.mark.parametrize("size", [1, ROW - 1, 2 * ROW, 3 * ROW + 5, 10_000_000])
def test_the_norm_is_right_whatever_the_size(size):
    bucket = bucket_of(size)
    right = bucket.main_grad.double().square().sum().item()
    assert local_squared_norm([bucket], 1).item() == pytest.approx(right, rel=1e-6)  # fp32 sums of ROW elements
    if size == 10_000_000:  # on a GPU torch's own is right
        assert abs(get_total_norm([bucket.main_grad]).item() / math.sqrt(right) - 1) > 1e-5, "torch's own is right now: use it"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 3 * ROW + 4], ids=["row", "rest"])
def test_a_gradient_that_is_not_finite_is_seen(bad, place):
    bucket = bucket_of(3 * ROW + 5)
    bucket.main_grad[place] = bad
    assert not math.isfinite(local_squared_norm([bucket], 1).item())
