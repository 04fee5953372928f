"""The global norm counts each logical element once, whatever is split and whatever is copied."""

import pytest
import torch
from torch import nn

from parallel.collectives import all_reduce
from parallel.shards import Replica, Segment, Shard
from parallel.tensor.linear import Column, column_shard
from parallel.zero.engine import OptimizerSettings
from parallel.zero.grad_norm import local_squared_norm, sum_replicas
from parallel.zero.native import NativeZero
from tests.parallel.building import box_parts, coverage, grid, parameter, parts, randn, sum_of_parts, whole
from tests.ranks import run_ranks

HIDDEN = 6
LIKE = {"q": torch.zeros(8, HIDDEN), "k": torch.zeros(4, HIDDEN), "norm": torch.zeros(HIDDEN)}


class Holder(nn.Module):
    def __init__(self, *parameters):
        super().__init__()
        self.all = nn.ParameterList(parameters)


def replicated(name, shape, axis, partial_gradient=True):
    (segment,) = whole(name, shape).segments
    replica = Replica(axis.name, axis.rank, axis.size, partial_gradient)
    return Shard(shape, (Segment(name, shape, segment.box, segment.local, replica),), decay=False)


def reduce_and_measure(rank, world_size, tp_size, stage):
    """A split q, a k with two copies, a norm weight on every tensor rank; gradients differ on every rank."""
    runs = [(i, i + 1) for i in range(0, world_size, 2)]
    groups = grid(rank, {"kv": runs}, tp=tp_size, dp=world_size // tp_size)
    tp = groups.tp
    fused = column_shard(HIDDEN, [Column("q", 8), Column("k", 4, 2, "kv")], tp)
    chunk = Holder(parameter(fused, LIKE), parameter(replicated("norm", (HIDDEN,), tp), LIKE))
    engine = NativeZero([chunk], groups, OptimizerSettings(zero_stage=stage))
    own = []
    engine.begin_step()
    for index, p in enumerate(chunk.all):
        p.sink.main_grad.copy_(randn(*p.shape, seed=10 * rank + index))
        own += parts(p.shard, p.sink.main_grad)
    engine.reduce_gradients()
    squared = local_squared_norm(engine.buckets, engine.copies_axis.size)
    total = all_reduce(squared[None], groups.world).item()
    return own, total, box_parts(engine.gradient_boxes())


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("size", "tp_size"), [(2, 2), (4, 4), (4, 2)])
def test_gradients_are_summed_over_copies_and_data_and_normed_once(size, tp_size, stage):
    ranks = run_ranks(size, reduce_and_measure, tp_size, stage)
    full = sum_of_parts([part for own, _, _ in ranks for part in own], LIKE)
    squared = sum(tensor.double().square().sum().item() for tensor in full.values())
    for _, total, reduced in ranks:
        assert total == pytest.approx(squared, rel=1e-6)  # fp32 sums of some sixty elements
        for name, box, values in reduced:
            torch.testing.assert_close(values, full[name][box.slices()], rtol=1e-6, atol=1e-6)
    assert all((count > 0).all() for count in coverage([p for *_, r in ranks for p in r], LIKE).values())


def sum_one_kind(rank, world_size, partial_gradient):
    groups = grid(rank, tp=2)
    chunk = Holder(parameter(replicated("norm", (HIDDEN,), groups.tp, partial_gradient), LIKE))
    engine = NativeZero([chunk], groups, OptimizerSettings())
    engine.buckets[0].main_grad.fill_(rank + 1.0)
    groups.ledger.clear()
    sum_replicas(engine.buckets[0], groups)
    return chunk.all[0].sink.main_grad.tolist(), sum(groups.ledger.calls.values())


@pytest.mark.parametrize(("partial", "expected", "calls"), [(True, [3.0, 3.0], 1), (False, [1.0, 2.0], 0)])
def test_whole_gradients_of_copies_are_left_alone_and_partial_ones_summed_in_one_message(partial, expected, calls):
    results = run_ranks(2, sum_one_kind, partial)
    assert results == [([value] * HIDDEN, calls) for value in expected]
