"""Split backward passes of linears: the same bits as whole ones, what they keep alive, and what they send when."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from parallel.groups import Axis
from parallel.kernels.table import resolve_kernels
from parallel.recompute import recompute
from parallel.tensor import overlap as overlap_module
from parallel.tensor.deferred import WeightGradientQueue
from parallel.tensor.embedding import VocabularyParallelEmbedding, vocabulary_shard
from parallel.tensor.linear import Column, ColumnParallelLinear, RowParallelLinear, column_shard, row_shard
from tests.parallel.building import grid, parameter, randn
from tests.ranks import run_ranks

S, B, HIDDEN, FFN, MICRO_BATCHES = 8, 2, 6, 8, 5
FULL = {"up": randn(FFN, HIDDEN, seed=1), "down": randn(HIDDEN, FFN, seed=2)}


class Sink:
    def __init__(self, weight):
        self.main_grad, self.calls = torch.zeros(weight.shape), 0

    def ready(self):
        self.calls += 1


class Layer(nn.Module):
    """x + down(relu(up(x))), optionally recomputed: a block of the models that this serves."""

    def __init__(self, tp, sequence_parallel, recomputes=False, kernels=None):
        super().__init__()
        self.weight_gradients, kernels = WeightGradientQueue(), kernels or resolve_kernels()
        up = parameter(column_shard(HIDDEN, [Column("up", FFN)], tp), FULL)
        down = parameter(row_shard("down", FFN, HIDDEN, tp), FULL)
        self.up = ColumnParallelLinear(up, tp, sequence_parallel, kernels, self.weight_gradients)
        self.down = RowParallelLinear(down, tp, sequence_parallel, kernels, self.weight_gradients)
        self.recomputes, self.calls = recomputes, 0

    def _inner(self, x):
        self.calls += 1
        return self.down(self.up(x).relu())

    def forward(self, x):
        return x + (recompute(self._inner, x) if self.recomputes else self._inner(x))

    @property
    def weights(self):
        return [self.up.weight, self.down.weight]


def inputs(tp, sequence_parallel):
    """Each micro-batch's input and output gradient, this rank's tokens of them."""
    drawn = [(randn(S, B, HIDDEN, seed=10 + m), randn(S, B, HIDDEN, seed=20 + m)) for m in range(MICRO_BATCHES)]
    return [tuple(full.chunk(tp.size)[tp.rank] if sequence_parallel else full for full in pair) for pair in drawn]


def backward_passes(layer, pairs, delay):
    """Whole passes (delay None), or I with each W `delay` passes later. Returns the input gradients."""
    found, queue = [], layer.weight_gradients
    for m, (x, dy) in enumerate(pairs):
        x = x.clone().requires_grad_()
        y = layer(x)
        if delay is None:
            y.backward(dy)
        else:
            with queue.collect(m):
                y.backward(dy)
            if m >= delay:
                queue.drain(m - delay)
        found.append(x.grad)
    for m in range(len(pairs) - len(queue), len(pairs)):
        queue.drain(m)
    return found


def run_both(rank, world_size, sequence_parallel, recomputes, with_sink):
    tp = grid(rank, tp=world_size).tp
    results = []
    for delay in (None, 0, 2):
        layer = Layer(tp, sequence_parallel, recomputes)
        if with_sink:
            for weight in layer.weights:
                weight.sink = Sink(weight)
        dx = backward_passes(layer, inputs(tp, sequence_parallel), delay)
        gradients = [weight.sink.main_grad if with_sink else weight.grad for weight in layer.weights]
        told = [weight.sink.calls if with_sink else MICRO_BATCHES for weight in layer.weights]
        results.append((dx + gradients, told, layer.calls))
    return results


@pytest.mark.parametrize("with_sink", [False, True], ids=["grad", "main_grad"])
@pytest.mark.parametrize("recomputes", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["alone", "tp", "sp"])
def test_split_passes_make_the_same_bits_and_recompute_no_more(size, sequence_parallel, recomputes, with_sink):
    for whole, *splits in run_ranks(size, run_both, sequence_parallel, recomputes, with_sink):
        for split in splits:
            assert all(torch.equal(ours, right) for ours, right in zip(split[0], whole[0], strict=True))
            assert split[1] == [MICRO_BATCHES] * 2
            assert split[2] == whole[2] == MICRO_BATCHES * (2 if recomputes else 1)


def watch_memory(rank, world_size, sequence_parallel, recomputes):
    """Storages that are alive between I and W, and after W: of all that autograd ever kept, and of gathered inputs."""
    tp = grid(rank, tp=world_size).tp
    layer = Layer(tp, sequence_parallel, recomputes)
    seen = []

    def watch(tensor):
        if not any(tensor.untyped_storage().data_ptr() == w.untyped_storage().data_ptr() for w in layer.weights):
            seen.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    def alive_bytes():
        gc.collect()
        return sum({s.data_ptr(): s.nbytes() for ref in seen if (s := ref()) is not None}.values())

    (x, dy), *_ = inputs(tp, sequence_parallel)
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        y = layer(x.clone().requires_grad_())
    with layer.weight_gradients.collect(0):
        y.backward(dy)
    del y
    ((_, waiting),) = layer.weight_gradients._passes
    queued = sum(gradient.x.untyped_storage().nbytes() for gradient in waiting)
    seen += [weakref.ref(tensor.untyped_storage()) for gradient in waiting for tensor in (gradient.x, gradient.dy)]
    between, dys = alive_bytes(), sum(gradient.dy.untyped_storage().nbytes() for gradient in waiting)
    layer.weight_gradients.drain(0)
    del waiting
    return between, queued + dys, alive_bytes(), dy.nbytes


@pytest.mark.parametrize("recomputes", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, True)], ids=["alone", "sp"])
def test_between_i_and_w_only_the_queue_is_alive_and_after_w_nothing(size, sequence_parallel, recomputes):
    for between, queued, after, given in run_ranks(size, watch_memory, sequence_parallel, recomputes):
        assert between == queued
        tokens = S // size if sequence_parallel else S
        x, hidden = 4 * tokens * B * HIDDEN, 4 * S * B * FFN // size  # up's input is this rank's tokens, not gathered
        assert queued == x + hidden + hidden + 4 * S * B * HIDDEN
        assert after <= given  # the caller still holds dy where nothing was gathered


def order_of_a_drain(rank, world_size):
    """What W starts, waits for and computes, in order, over three column linears under sequence parallelism."""
    tp = grid(rank, tp=world_size).tp
    events, start = [], overlap_module.start_all_gather

    class Watched:
        def __init__(self, handle, number):
            self.handle, self.number = handle, number

        def wait(self):
            events.append(f"wait {self.number}")
            self.handle.wait()

    def watched(*arguments):
        number = sum(event.startswith("gather") for event in events)
        events.append(f"gather {number}")
        out, handle = start(*arguments)
        return out, Watched(handle, number)

    overlap_module.start_all_gather = watched
    kernels = replace(resolve_kernels(), wgrad=lambda *arguments: events.append("wgrad"))
    queue = WeightGradientQueue()
    layers = []
    for _ in range(3):
        weight = parameter(column_shard(HIDDEN, [Column("up", FFN)], tp), FULL)
        weight.sink = Sink(weight)
        layers.append(ColumnParallelLinear(weight, tp, True, kernels, queue))
    x = inputs(tp, True)[0][0].clone().requires_grad_()
    y = sum(layer(x) for layer in layers)
    with queue.collect(0):
        events.clear()
        y.sum().backward()
    in_i = list(events)
    events.clear()
    queue.drain(0)
    return in_i, events


def test_w_gathers_one_linear_ahead_and_i_gathers_no_input():
    expected = "gather 0, gather 1, wait 0, wgrad, gather 2, wait 1, wgrad, wait 2, wgrad"
    for in_i, events in run_ranks(2, order_of_a_drain):
        assert in_i == []
        assert ", ".join(events) == expected


@pytest.mark.parametrize("queued", [False, True], ids=["in I", "queued"])
def test_a_tied_tables_gradients_keep_their_order_only_where_both_wait(queued):
    """Why the embedding of a tied head waits too: else its rows would overtake the head's gradient."""
    tp = Axis.single("tp")
    tokens = [torch.randint(0, 16, (S, B), generator=torch.Generator().manual_seed(m)) for m in range(MICRO_BATCHES)]
    gradients = []
    for delay in (None, 2):
        queue = WeightGradientQueue()
        weight = parameter(vocabulary_shard("table", 16, HIDDEN, tp), {"table": randn(16, HIDDEN, seed=3)})
        weight.sink = Sink(weight)
        embedding = VocabularyParallelEmbedding(weight, tp, False, queue if queued else None)
        layer = nn.Sequential(embedding, nn.Tanh(), ColumnParallelLinear(weight, tp, False, resolve_kernels(), queue))
        layer.weight_gradients = queue
        for m, batch in enumerate(tokens):
            loss = layer(batch).square().sum()
            if delay is None:
                loss.backward()
                continue
            with queue.collect(m):
                loss.backward()
            if m >= delay:
                queue.drain(m - delay)
        for m in range(MICRO_BATCHES - len(queue), MICRO_BATCHES):
            queue.drain(m)
        gradients.append(weight.sink.main_grad)
        assert weight.sink.calls == 2 * MICRO_BATCHES
    whole, split = gradients
    torch.testing.assert_close(split, whole)
    assert torch.equal(split, whole) == queued


def test_what_a_failed_run_left_is_forgotten():
    queue = WeightGradientQueue()
    with pytest.raises(RuntimeError), queue.collect(0):
        raise RuntimeError("out of something")
    assert not queue.collecting and len(queue) == 1
    queue.clear()
    assert len(queue) == 0
