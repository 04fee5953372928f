"""Recomputation: the same outputs and gradients, bit for bit, from fewer kept activations."""

import weakref

import torch

from parallel.recompute import recompute
from tests.parallel.building import randn


def count_calls_of(function):
    calls = []

    def counted(*inputs):
        calls.append(1)
        return function(*inputs)

    return counted, calls


def block(x, w):
    return torch.tanh(torch.sin(x @ w) @ w.t())


def gradients(run):
    x, w = randn(5, 4).requires_grad_(), randn(4, 4, seed=1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run(x, w)
    y.sum().backward()
    return [y.detach(), x.grad, w.grad], sum(t.numel() for t in kept)


def test_recomputing_changes_no_bit_and_runs_the_function_again_in_the_backward_pass():
    counted, calls = count_calls_of(block)
    plain, kept_plain = gradients(block)
    again, _ = gradients(lambda x, w: recompute(counted, x, w))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(calls) == 2 and kept_plain > 0


def test_intermediate_activations_die_after_the_forward_pass():
    references = []

    def watched(x, w):
        middle = torch.sin(x @ w)
        references.append(weakref.ref(middle))
        return middle @ w.t()

    y = recompute(watched, randn(5, 4).requires_grad_(), randn(4, 4, seed=1).requires_grad_())
    assert references[0]() is None
    y.sum().backward()


def test_without_gradients_it_is_a_plain_call():
    counted, calls = count_calls_of(block)
    with torch.no_grad():
        y = recompute(counted, randn(5, 4), randn(4, 4, seed=1))
    assert torch.equal(y, block(randn(5, 4), randn(4, 4, seed=1))) and len(calls) == 1
