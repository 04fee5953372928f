"""Recomputation: the same outputs and gradients, bit for bit, from fewer kept activations."""

import weakref
from contextlib import nullcontext

import numpy as np
import torch

from parallel.recompute import Rematerializer, recompute
from tests.alive import AliveMemory
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


class Square(torch.autograd.Function):
    """x w, which keeps both: a linear of the models that this serves."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy @ w.t(), x.t() @ dy


def norm_and_linear(norm, x, w):
    return Square.apply(norm(Square.apply(norm(x), w)), w).sum()


def test_outputs_of_cheap_functions_are_made_again_and_change_no_bit():
    rematerializer = Rematerializer()
    counted, calls = count_calls_of(torch.tanh)
    cheap = rematerializer.cheap(counted)

    def saving(x, w):
        with rematerializer.saving():
            return norm_and_linear(cheap, x, w)

    plain, _ = gradients(lambda x, w: norm_and_linear(torch.tanh, x, w))
    again, _ = gradients(saving)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(calls) == 4  # two forward, two in the backward pass


def test_what_is_made_again_is_not_alive_and_its_inputs_are():
    def alive(saves):
        rematerializer, x, w = Rematerializer(), randn(5, 4).requires_grad_(), randn(4, 4, seed=1).requires_grad_()
        norm = rematerializer.cheap(torch.nn.functional.silu)
        with AliveMemory(apart=[x, w]) as memory, rematerializer.saving() if saves else nullcontext():
            y = norm_and_linear(norm, x, w)
        return memory.bytes(), y

    (few, _), (many, _) = alive(True), alive(False)
    assert many - few == 2 * 5 * 4 * 4  # two outputs [5, 4] in fp32


def test_memory_that_is_used_again_is_not_mistaken_for_what_lay_there():
    rematerializer, w, memory = Rematerializer(), randn(4, 4, seed=1).requires_grad_(), np.zeros((5, 4), np.float32)

    def tanh(x):
        memory[:] = torch.tanh(x).numpy()
        return torch.from_numpy(memory)

    with rematerializer.saving():
        rematerializer.cheap(tanh)(randn(5, 4))  # gone at once
        memory[:] = 2.0
        y = Square.apply(torch.from_numpy(memory), w)
    y.sum().backward()
    assert torch.equal(w.grad, torch.full((4, 4), 10.0))


def test_what_was_written_in_place_since_is_kept():
    rematerializer, w = Rematerializer(), randn(4, 4, seed=1).requires_grad_()
    with rematerializer.saving():
        y = Square.apply(rematerializer.cheap(torch.tanh)(randn(5, 4)).fill_(3.0), w)
    y.sum().backward()
    assert torch.equal(w.grad, torch.full((4, 4), 15.0))


def test_a_view_of_what_is_made_again_is_made_again():
    rematerializer, x, w = Rematerializer(), randn(4, 5).requires_grad_(), randn(4, 4, seed=1).requires_grad_()
    counted, calls = count_calls_of(torch.tanh)
    with rematerializer.saving():
        y = Square.apply(rematerializer.cheap(counted)(x).t(), w)
    y.sum().backward()
    assert len(calls) == 2 and torch.equal(w.grad, torch.tanh(x.detach()) @ torch.ones(5, 4))
