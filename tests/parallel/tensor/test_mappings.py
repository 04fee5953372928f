"""Conjugate pairs: with inner products over all ranks, <f(x), y> = <x, f*(y)>.

Two of the four have a side that is one tensor with the same values on every rank, the input of copy_to_tensor and the output
of reduce_from_tensor: its inner product counts once.
"""

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


def side(name, which, rank, size):
    """The tensor (whole numbers, so that sums are exact) of one side of a mapping on a rank, `which` being "in" or "out"."""
    rows = S // size if (name, which) in (("gather_sequence", "in"), ("scatter_sequence", "out")) else S
    same_everywhere = (name, which) in (("copy_to_tensor", "in"), ("reduce_from_tensor", "out"))
    seed = (0 if same_everywhere else 1 + rank) + (100 if which == "out" else 0)
    return randn(rows, B, H, seed=seed).mul(8).round(), 1 / size if same_everywhere else 1


def apply_both_ways(rank, world_size, name):
    tp = grid(rank, tp=world_size).tp
    (x, x_weight), (y, y_weight) = side(name, "in", rank, world_size), side(name, "out", rank, world_size)
    before = x.clone(), y.clone()
    fx = MAPPINGS[name](x.requires_grad_(), tp)
    fx.backward(y)
    conjugate_y = MAPPINGS[CONJUGATES[name]](y, tp)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]), "a mapping leaves its input alone"
    assert torch.equal(x.grad, conjugate_y), "the backward pass is the conjugate"
    return fx.detach(), (fx * y).sum().item() * y_weight, (x * x.grad).sum().item() * x_weight


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", sorted(MAPPINGS))
def test_backward_is_the_conjugate_and_inner_products_agree(name, size):
    ranks = run_ranks(size, apply_both_ways, name)
    left, right = sum(rank[1] for rank in ranks), sum(rank[2] for rank in ranks)
    assert left == pytest.approx(right, rel=1e-12) and abs(left) > 1  # whole numbers, but thirds of them are rounded


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", sorted(MAPPINGS))
def test_forward_is_what_the_table_says(name, size):
    xs = torch.stack([side(name, "in", rank, size)[0] for rank in range(size)])
    for rank, (fx, *_) in enumerate(run_ranks(size, apply_both_ways, name)):
        expected = {
            "copy_to_tensor": xs[rank],
            "reduce_from_tensor": xs.sum(0),
            "gather_sequence": xs.flatten(0, 1),
            "scatter_sequence": xs.sum(0)[rank * (S // size) : (rank + 1) * (S // size)],
        }
        assert torch.equal(fx, expected[name])


@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=sorted(MAPPINGS))
def test_on_one_rank_a_mapping_is_the_tensor_itself(mapping):
    x = randn(S, B, H)
    assert mapping(x, Axis.single("tp")) is x
