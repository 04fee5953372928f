"""Vocabulary-parallel cross entropy against `F.cross_entropy` of the whole logits."""

import pytest
import torch
import torch.nn.functional as F

from parallel.groups import Axis
from parallel.tensor.cross_entropy import vocabulary_parallel_cross_entropy
from tests.parallel.building import grid, randn
from tests.ranks import run_ranks

S, B = 5, 3
PADDING = 1e30  # what padded columns hold: nothing of it may show


def full_logits(vocabulary, scale):
    logits = randn(S, B, vocabulary, seed=vocabulary) * scale
    logits[0] = 0.0  # all equal
    return logits


def targets_of(vocabulary):
    drawn = torch.randint(0, vocabulary, (S, B), generator=torch.Generator().manual_seed(2))
    drawn[1, 0], drawn[1, 1] = 0, vocabulary - 1
    return drawn


def dloss():
    return randn(S, B, seed=5)


def split_loss(rank, world_size, vocabulary, rows, scale, dtype):
    tp = grid(rank, tp=world_size).tp
    padded = torch.full((S, B, rows * world_size), PADDING)
    padded[..., :vocabulary] = full_logits(vocabulary, scale)
    local = padded[..., rank * rows : (rank + 1) * rows].to(dtype).requires_grad_()
    before = local.detach().clone()
    loss = vocabulary_parallel_cross_entropy(local, targets_of(vocabulary), vocabulary, tp)
    loss.backward(dloss())
    return loss.detach(), local.grad, torch.equal(local, before)


def whole_loss(vocabulary, scale, dtype):
    """In fp64, of the logits as rounded to `dtype`."""
    logits = full_logits(vocabulary, scale).to(dtype).double().requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), targets_of(vocabulary).flatten(), reduction="none").view(S, B)
    loss.backward(dloss().double())
    return loss.detach(), logits.grad


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["ordinary", "extreme"])
@pytest.mark.parametrize(
    ("size", "vocabulary", "rows"), [(1, 16, 16), (1, 13, 16), (2, 16, 8), (2, 13, 8), (3, 20, 8), (4, 10, 8)]
)
def test_loss_and_gradient_are_those_of_the_whole_logits(size, vocabulary, rows, scale):
    """10 rows over 4 ranks of 8: two ranks have nothing but padding."""
    loss, dlogits = whole_loss(vocabulary, scale, torch.float32)
    ranks = run_ranks(size, split_loss, vocabulary, rows, scale, torch.float32)
    gradient = torch.cat([rank[1] for rank in ranks], dim=-1)
    for ours, _, unchanged in ranks:
        assert ours.dtype == torch.float32 and unchanged
        assert torch.equal(ours, ranks[0][0])  # the same bits on each rank
        # fp32 logits of 1e4 have steps of 1e-3: the difference of two is exact to 1e-7 of their size
        torch.testing.assert_close(ours.double(), loss, rtol=1e-6, atol=1e-6 + 2e-7 * scale)
    atol = 1e-6 + 2e-7 * scale  # the softmax's relative error is the absolute error of its exponent
    torch.testing.assert_close(gradient[..., :vocabulary].double(), dlogits, rtol=1e-5, atol=atol)
    assert not gradient[..., vocabulary:].any()


def test_bf16_logits_give_an_fp32_loss_and_a_bf16_gradient():
    loss, dlogits = whole_loss(13, 3.0, torch.bfloat16)
    ranks = run_ranks(2, split_loss, 13, 8, 3.0, torch.bfloat16)
    for ours, gradient, unchanged in ranks:
        assert (ours.dtype, gradient.dtype, unchanged) == (torch.float32, torch.bfloat16, True)
        torch.testing.assert_close(ours.double(), loss, rtol=1e-6, atol=1e-6)
    gradient = torch.cat([rank[1] for rank in ranks], dim=-1)[..., :13]
    torch.testing.assert_close(gradient.double(), dlogits, rtol=2.0**-8, atol=1e-6)  # one rounding to 8 bits


def test_one_process_is_exact_at_the_extremes():
    """A token that is certain costs nothing and has no gradient; one that is impossible costs the gap."""
    logits = torch.tensor([[[1e4, -1e4, -1e4], [-1e4, 1e4, -1e4]]], requires_grad=True)
    loss = vocabulary_parallel_cross_entropy(logits, torch.tensor([[0, 0]]), 3, Axis.single("tp"))
    loss.sum().backward()
    assert loss.tolist() == [[0.0, 2e4]]
    assert logits.grad.tolist() == [[[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]]


def test_a_token_that_is_masked_out_of_the_loss_has_no_gradient():
    logits = randn(2, 1, 8).requires_grad_()
    loss = vocabulary_parallel_cross_entropy(logits, torch.tensor([[3], [4]]), 8, Axis.single("tp"))
    (loss * torch.tensor([[1.0], [0.0]])).sum().backward()
    assert logits.grad[0].any() and not logits.grad[1].any()
