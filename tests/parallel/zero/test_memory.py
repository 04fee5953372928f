"""What a rank holds: bytes per parameter between steps, and whole gradients during them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from parallel.groups import build_groups
from parallel.kernels.table import resolve_kernels
from parallel.tensor.linear import RowParallelLinear
from parallel.topology import Topology
from parallel.zero.buckets import Bucket
from parallel.zero.engine import OptimizerSettings
from parallel.zero.native import NativeZero
from tests.parallel.building import grid, parameter, randn, whole
from tests.ranks import run_ranks

WIDTH, LAYERS = 64, 6
SIZE = LAYERS * WIDTH * WIDTH  # parameters, without padding for the numbers of ranks here


def chain(groups, dtype=torch.float32):
    """Linears, one after the other."""
    kernels = resolve_kernels()
    layers = []
    for index in range(LAYERS):
        name = f"layers.{index}"
        weight = parameter(whole(name, (WIDTH, WIDTH)), {name: randn(WIDTH, WIDTH, seed=index).to(dtype) / WIDTH**0.5})
        layers.append(RowParallelLinear(weight, groups.tp, False, kernels))
    return nn.Sequential(*layers)


def state_bytes(rank, world_size, shard_group_size, dtype, settings):
    groups = grid(rank, shard_group_size=shard_group_size, dp=world_size)
    return NativeZero([chain(groups, dtype)], groups, settings).state_bytes / SIZE


BF16_GRADIENTS = {"gradient_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("ranks", "shard_group_size", "changes", "bytes_per_parameter"),
    [
        (1, 0, {"zero_stage": 0}, 2 + 4 + 12),
        (2, 0, {"zero_stage": 0}, 2 + 4 + 12),
        (2, 0, {}, 2 + 4 + 12 / 2),
        (4, 0, {}, 2 + 4 + 12 / 4),
        (4, 2, {}, 2 + 4 + 12 / 2),
        (2, 0, BF16_GRADIENTS, 2 + 2 + 12 / 2),
        (4, 0, BF16_GRADIENTS, 2 + 2 + 12 / 4),
        (1, 0, BF16_GRADIENTS, 2 + 2 + 4 + 12),  # nothing is split: an fp32 gradient has no room in the bf16 ones
        (4, 0, {"zero_stage": 2}, 2 + 16 / 4),
        (4, 2, {"zero_stage": 2}, 2 + 16 / 2),
        (4, 0, {"zero_stage": 2, **BF16_GRADIENTS}, 2 + 16 / 4),
    ],
)
def test_bytes_per_parameter_of_a_bf16_model(ranks, shard_group_size, changes, bytes_per_parameter):
    """Weights 2; gradients 4, or 2; fp32 master and two moments 12. Sources: the tables of ZeRO and of MiCS."""
    settings = replace(OptimizerSettings(bucket_size=2 * WIDTH * WIDTH), **changes)
    assert run_ranks(ranks, state_bytes, shard_group_size, torch.bfloat16, settings) == [bytes_per_parameter] * ranks


def test_bytes_per_parameter_in_fp32():
    """The masters are the weights."""
    groups = build_groups(Topology(), 0)
    assert NativeZero([chain(groups)], groups, OptimizerSettings()).state_bytes == 16 * SIZE


def most_buffers(rank, world_size, stage, overlap):
    """The most whole-gradient buffers that are there at once, filling or under way, and those after the steps."""
    groups = grid(rank, dp=world_size)
    net = chain(groups)
    engine = NativeZero([net], groups, OptimizerSettings(zero_stage=stage, bucket_size=1, overlap=overlap))
    counts = []

    def count():
        filling = [bucket for bucket in engine.buckets if bucket._main_grad is not None]
        under_way = [bucket for bucket in engine.buckets if bucket._scatter is not None and bucket.every_pass]
        counts.append(len(filling) + len(under_way))

    gradient_ready = Bucket.gradient_ready

    def count_and_go_on(bucket):
        count()
        gradient_ready(bucket)

    Bucket.gradient_ready = count_and_go_on
    for step in range(2):
        engine.begin_step()
        engine.expect_passes(3)
        for index in range(3):
            net(randn(2, 1, WIDTH, seed=10 * step + index)).sum().backward()
        engine.step(1e-3, torch.zeros(1, dtype=torch.float64))
    count()
    return max(counts), counts[-1]


@pytest.mark.parametrize(("stage", "overlap", "most", "after"), [(1, True, LAYERS, LAYERS), (2, True, 3, 0), (2, False, 1, 0)])
def test_whole_gradients_of_stage_2_are_those_that_fill_and_travel(stage, overlap, most, after):
    """One bucket fills; with overlap, two are under way."""
    assert run_ranks(2, most_buffers, stage, overlap) == [(most, after)] * 2
