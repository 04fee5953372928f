"""Conjugate pairs: with inner products over all ranks, <f(x), y> = <x, f*(y)>."""

import pytest
import torch

from parallel.groups import Axis
from parallel.tensor.mappings import copy_to_tensor, gather_sequence, reduce_from_tensor, scatter_sequence
from tests.parallel.building import grid, randn
from tests.ranks import run_ranks

S, B, H = 12, 2, 3
MAPPINGS = {f.__name__: f for f in (copy_to_tensor, reduce_from_tensor, gather_sequence, scatter_sequence)}
CONJUGATES = {
    "copy_to_tensor": "reduce_from_tensor",
    "reduce_from_tensor": "copy_to_tensor",
    "gather_sequence": "scatter_sequence",
    "scatter_sequence": "gather_sequence",
}


def of_rank(rank, shape, seed):
    return randn(*shape, seed=100 * seed + rank).mul(8).round()  # whole numbers: sums are exact


def shapes(name, size):
    """Local shapes into and out of a mapping."""
    whole, part = (S, B, H), (S // size, B, H)
    return {"gather_sequence": (part, whole), "scatter_sequence": (whole, part)}.get(name, (whole, whole))


def apply_both_ways(rank, world_size, name):
    tp = grid(rank, tp=world_size).tp
    into, out = shapes(name, world_size)
    x, y = of_rank(rank, into, seed=1).requires_grad_(), of_rank(rank, out, seed=2)
    fx = MAPPINGS[name](x, tp)
    fx.backward(y)
    conjugate_y = MAPPINGS[CONJUGATES[name]](y, tp)
    unchanged = torch.equal(x, of_rank(rank, into, seed=1)) and torch.equal(y, of_rank(rank, out, seed=2))
    return fx.detach(), x.grad, conjugate_y, unchanged


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", sorted(MAPPINGS))
def test_backward_is_the_conjugate_and_inner_products_agree(name, size):
    ranks = run_ranks(size, apply_both_ways, name)
    into, out = shapes(name, size)
    left = right = 0.0
    for rank, (fx, dx, conjugate_y, unchanged) in enumerate(ranks):
        assert unchanged
        assert torch.equal(dx, conjugate_y)
        left += (fx * of_rank(rank, out, seed=2)).sum().item()
        right += (of_rank(rank, into, seed=1) * dx).sum().item()
    if name == "copy_to_tensor" or name == "reduce_from_tensor":
        assert left != right or size == 1 or name == "copy_to_tensor"
    assert left == right


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", sorted(MAPPINGS))
def test_forward_is_what_the_table_says(name, size):
    into, _ = shapes(name, size)
    xs = torch.stack([of_rank(rank, into, seed=1) for rank in range(size)])
    for rank, (fx, *_) in enumerate(run_ranks(size, apply_both_ways, name)):
        expected = {
            "copy_to_tensor": lambda rank: xs[rank],
            "reduce_from_tensor": lambda rank: xs.sum(0),
            "gather_sequence": lambda rank: xs.flatten(0, 1),
            "scatter_sequence": lambda rank: xs.sum(0).chunk(size)[rank],
        }
        assert torch.equal(fx, expected[name](rank))


@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=sorted(MAPPINGS))
def test_on_one_rank_a_mapping_is_the_tensor_itself(mapping):
    x = randn(S, B, H)
    assert mapping(x, Axis.single("tp")) is x
