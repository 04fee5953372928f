"""Vocabulary-parallel cross entropy against `F.cross_entropy` of the whole logits."""

import pytest
import torch
import torch.nn.functional as F

from parallel.groups import Axis
from parallel.kernels import cross_entropy_kernels, reference_kernels
from parallel.kernels.cross_entropy_kernels import BLOCKED
from parallel.tensor.cross_entropy import vocabulary_parallel_cross_entropy
from tests.parallel.building import grid, randn
from tests.parallel.largest_tensor import LargestTensor
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


def split_losses(rank, world_size, vocabulary, rows, scale, dtype):
    """Of each provider: losses, the logits' gradient, and whether the forward pass left them unchanged."""
    tp = grid(rank, tp=world_size).tp
    return [split_loss(tp, vocabulary, rows, scale, dtype, kernels) for kernels in (BLOCKED, reference_kernels.head_loss)]


def split_loss(tp, vocabulary, rows, scale, dtype, kernels):
    padded = torch.full((S, B, rows * tp.size), PADDING)
    padded[..., :vocabulary] = full_logits(vocabulary, scale)
    leaf = padded[..., tp.rank * rows : (tp.rank + 1) * rows].to(dtype).requires_grad_()
    local = leaf.clone()
    loss = vocabulary_parallel_cross_entropy(local, targets_of(vocabulary), vocabulary, tp, kernels)
    unchanged = torch.equal(local, leaf)
    loss.backward(dloss())
    return loss.detach(), leaf.grad, unchanged


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
def test_loss_and_gradient_are_those_of_the_whole_logits(size, vocabulary, rows, scale, monkeypatch):
    """10 rows over 4 ranks of 8: two ranks have nothing but padding."""
    monkeypatch.setattr(cross_entropy_kernels, "CPU_BLOCK_BYTES", 4 * rows * 4)  # 4 tokens, and 3 in the last block
    loss, dlogits = whole_loss(vocabulary, scale, torch.float32)
    # fp32 logits of 1e4 have steps of 1e-3: the difference of two is exact to 1e-7 of their size, which is the error of the
    # loss, and, as it is that of the softmax's exponent, the relative one of the softmax
    atol = 1e-6 + 2e-7 * scale
    for ranks in zip(*run_ranks(size, split_losses, vocabulary, rows, scale, torch.float32), strict=True):
        for ours, _, unchanged in ranks:
            assert ours.dtype == torch.float32 and unchanged
            assert torch.equal(ours, ranks[0][0])  # the same bits on each rank
            torch.testing.assert_close(ours.double(), loss, rtol=1e-6, atol=atol)
        gradient = torch.cat([rank[1] for rank in ranks], dim=-1)
        torch.testing.assert_close(gradient[..., :vocabulary].double(), dlogits, rtol=1e-5, atol=atol)
        assert not gradient[..., vocabulary:].any()


def test_bf16_logits_give_an_fp32_loss_and_a_bf16_gradient():
    loss, dlogits = whole_loss(13, 3.0, torch.bfloat16)
    ranks = [providers[0] for providers in run_ranks(2, split_losses, 13, 8, 3.0, torch.bfloat16)]
    for ours, gradient, unchanged in ranks:
        assert (ours.dtype, gradient.dtype, unchanged) == (torch.float32, torch.bfloat16, True)
        torch.testing.assert_close(ours.double(), loss, rtol=1e-6, atol=1e-6)
    gradient = torch.cat([rank[1] for rank in ranks], dim=-1)[..., :13]
    torch.testing.assert_close(gradient.double(), dlogits, rtol=2.0**-8, atol=1e-6)  # one rounding to 8 bits


def test_one_process_is_exact_at_the_extremes():
    """A token that is certain costs nothing and has no gradient; one that is impossible costs the gap."""
    logits = torch.tensor([[[1e4, -1e4, -1e4], [-1e4, 1e4, -1e4]]], requires_grad=True)
    loss = vocabulary_parallel_cross_entropy(logits.clone(), torch.tensor([[0, 0]]), 3, Axis.single("tp"))
    loss.sum().backward()
    assert loss.tolist() == [[0.0, 2e4]]
    assert logits.grad.tolist() == [[[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]]


def test_a_token_that_is_masked_out_of_the_loss_has_no_gradient():
    logits = randn(2, 1, 8).requires_grad_()
    loss = vocabulary_parallel_cross_entropy(logits.clone(), torch.tensor([[3], [4]]), 8, Axis.single("tp"))
    (loss * torch.tensor([[1.0], [0.0]])).sum().backward()
    assert logits.grad[0].any() and not logits.grad[1].any()


def test_logits_that_somebody_else_keeps_are_not_overwritten_unnoticed():
    logits = randn(2, 1, 8).requires_grad_().clone()
    other = (logits * logits).sum()
    loss = vocabulary_parallel_cross_entropy(logits, torch.tensor([[3], [4]]), 8, Axis.single("tp"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss.sum() + other).backward()


def sent_for_the_loss(rank, world_size):
    groups = grid(rank, tp=world_size)
    logits = randn(S, B, 8, seed=rank).requires_grad_()
    vocabulary_parallel_cross_entropy(logits.clone(), targets_of(16), 16, groups.tp).sum().backward()
    return {key: value for key, value in groups.ledger.sent_bytes.items() if value}


def test_one_message_of_three_values_a_token_is_all_that_is_sent():
    assert run_ranks(2, sent_for_the_loss) == [{("all_gather", "tp"): 3 * S * B * 4}] * 2


def test_the_gradient_takes_no_memory_of_its_own():
    """Beside the logits there are values of one block of tokens only."""
    tokens, columns = 64, 40_000
    logits = randn(tokens, 1, columns).requires_grad_().clone()
    with LargestTensor() as seen:
        loss = vocabulary_parallel_cross_entropy(logits, torch.zeros(tokens, 1).long(), columns, Axis.single("tp"))
        torch.autograd.grad(loss.sum(), logits)
    assert seen.bytes <= cross_entropy_kernels.CPU_BLOCK_BYTES
