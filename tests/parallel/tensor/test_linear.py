"""Column- and row-parallel linears against plain `nn.Linear`, forward and backward, on real ranks.

The pair under test: y = row(gate(x) * up(x)), gate and up fused in one column-parallel weight. fp64, so that a tolerance of
1e-12 leaves room for nothing but the order of sums.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from parallel.groups import Axis
from parallel.kernels.table import resolve_kernels
from parallel.recompute import recompute
from parallel.tensor.linear import Column, ColumnParallelLinear, RowParallelLinear, column_shard, row_shard
from tests.parallel.building import coverage, grid, parameter, parts, randn, sum_of_parts
from tests.ranks import run_ranks

S, B, INPUTS, FFN, OUTPUTS = 12, 2, 6, 24, 5
TOLERANCE = dict(rtol=1e-12, atol=1e-12)

SHAPES = {
    "gate": (FFN, INPUTS),
    "up": (FFN, INPUTS),
    "down": (OUTPUTS, FFN),
    "q": (24, INPUTS),
    "k": (6, INPUTS),
    "v": (6, INPUTS),
}
FULL = {name: randn(*shape, seed=i, dtype=torch.float64) for i, (name, shape) in enumerate(SHAPES.items(), start=1)}
X = randn(S, B, INPUTS, seed=8, dtype=torch.float64)
DY = randn(S, B, OUTPUTS, seed=9, dtype=torch.float64)


class CountingSink:
    """A gradient sink that counts how often it is told."""

    def __init__(self, shape):
        self.main_grad = torch.zeros(shape, dtype=torch.float32)
        self.calls = 0

    def ready(self):
        self.calls += 1


def local_sequence(full, axis, sequence_parallel):
    return full.chunk(axis.size)[axis.rank] if sequence_parallel else full


def build_pair(tp, sequence_parallel, dtype=torch.float64):
    full = {name: tensor.to(dtype) for name, tensor in FULL.items()}
    fused = column_shard(INPUTS, [Column("gate", FFN), Column("up", FFN)], tp)
    kernels = resolve_kernels()
    column = ColumnParallelLinear(parameter(fused, full), tp, sequence_parallel, kernels)
    row = RowParallelLinear(parameter(row_shard("down", FFN, OUTPUTS, tp), full), tp, sequence_parallel, kernels)
    return column, row


def run_pair(rank, world_size, sequence_parallel):
    tp = grid(rank, tp=world_size).tp
    column, row = build_pair(tp, sequence_parallel)
    x = local_sequence(X, tp, sequence_parallel).clone().requires_grad_()
    gate, up = column(x).chunk(2, -1)
    y = row(gate * up)
    y.backward(local_sequence(DY, tp, sequence_parallel))
    gradients = [part for p in (column.weight, row.weight) for part in parts(p.shard, p.grad)]
    return y.detach(), x.grad, gradients


def plain_pair():
    gate, up, down = nn.Linear(INPUTS, FFN, bias=False), nn.Linear(INPUTS, FFN, bias=False), nn.Linear(FFN, OUTPUTS, bias=False)
    for linear, name in ((gate, "gate"), (up, "up"), (down, "down")):
        linear.weight.data = FULL[name].clone()
    x = X.clone().requires_grad_()
    y = down(gate(x) * up(x))
    y.backward(DY)
    return y.detach(), x.grad, {"gate": gate.weight.grad, "up": up.weight.grad, "down": down.weight.grad}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_column_and_a_row_linear_are_two_plain_linears(size, sequence_parallel):
    y, dx, dw = plain_pair()
    ranks = run_ranks(size, run_pair, sequence_parallel)
    for index, right in ((0, y), (1, dx)):
        if sequence_parallel:
            torch.testing.assert_close(torch.cat([rank[index] for rank in ranks]), right, **TOLERANCE)
        else:
            for rank in ranks:
                torch.testing.assert_close(rank[index], right, **TOLERANCE)
    gradients = [part for rank in ranks for part in rank[2]]
    assert all((count == 1).all() for count in coverage(gradients, dw).values())
    torch.testing.assert_close(sum_of_parts(gradients, dw), dw, **TOLERANCE)


def run_grouped_heads(rank, world_size, replicas, sequence_parallel):
    """One fused weight of q, k and v in which each run of `replicas` ranks holds the same rows of k and v."""
    runs = [tuple(range(i, i + replicas)) for i in range(0, world_size, replicas)]
    groups = grid(rank, {"kv": runs}, tp=world_size)
    columns = [Column("q", 24), Column("k", 6, replicas, "kv"), Column("v", 6, replicas, "kv")]
    shard = column_shard(INPUTS, columns, groups.tp)
    weight = parameter(shard, FULL)
    x = local_sequence(X, groups.tp, sequence_parallel).clone().requires_grad_()
    y = ColumnParallelLinear(weight, groups.tp, sequence_parallel, resolve_kernels())(x)
    # Each rank's loss is its own part of the whole: every copy of a kv head sees other query heads.
    coefficients = randn(*y.shape, seed=100 + rank, dtype=torch.float64)
    (y * coefficients).sum().backward()
    pieces = [(s.name, s.box.offset[0], s.box.shape[0], s.local.offset[0]) for s in shard.segments]
    replica = [(s.replica.index, s.replica.size, s.replica.partial_gradient) if s.replica else None for s in shard.segments]
    return y.detach(), coefficients, x.grad, parts(shard, weight.grad), pieces, replica


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize(("size", "replicas"), [(2, 2), (4, 2), (4, 4), (3, 1)])
def test_fused_heads_with_replicas_are_plain_linears(size, replicas, sequence_parallel):
    """Outputs are the named rows'; the replicas' gradients are partial and sum to the whole."""
    ranks = run_ranks(size, run_grouped_heads, replicas, sequence_parallel)
    plain = {name: FULL[name].clone().requires_grad_() for name in ("q", "k", "v")}
    x = X.clone().requires_grad_()
    loss = 0.0
    for index, (y, coefficients, _, _, pieces, replica) in enumerate(ranks):
        q_rows, kv_rows = 24 // size, 6 * replicas // size
        kv = index // replicas * kv_rows  # a run of consecutive ranks has the same rows, next to their query heads
        expected_k, expected_v = ("k", kv, kv_rows, q_rows), ("v", kv, kv_rows, q_rows + kv_rows)
        assert pieces == [("q", index * q_rows, q_rows, 0), expected_k, expected_v]
        rows = [plain[name][offset : offset + count] for name, offset, count, _ in pieces]
        right = x @ torch.cat(rows).t()
        torch.testing.assert_close(y, right.detach(), **TOLERANCE)
        loss = loss + (right * coefficients).sum()
        expected = (index % replicas, replicas, True) if replicas > 1 else None
        assert replica == [None, expected, expected]
    loss.backward()
    full = {name: tensor.grad for name, tensor in plain.items()}
    gradients = [part for rank in ranks for part in rank[3]]
    torch.testing.assert_close(sum_of_parts(gradients, full), full, **TOLERANCE)
    counts = coverage(gradients, full)
    assert (counts["q"] == 1).all() and (counts["k"] == replicas).all() and (counts["v"] == replicas).all()
    dx = torch.cat([rank[2] for rank in ranks]) if sequence_parallel else ranks[-1][2]
    torch.testing.assert_close(dx, x.grad, **TOLERANCE)


def run_both_routes(rank, world_size, sequence_parallel):
    """Two backward passes: the second adds to the first."""
    tp = grid(rank, tp=world_size).tp
    results, calls = [], []
    for with_sink in (False, True):
        column, row = build_pair(tp, sequence_parallel, torch.float32)
        weights = (column.weight, row.weight)
        if with_sink:
            for weight in weights:
                weight.sink = CountingSink(weight.shape)
        for x in (X.float(), X.float().flip(0)):
            x = local_sequence(x, tp, sequence_parallel).clone().requires_grad_()
            gate, up = column(x).chunk(2, -1)
            row(gate * up).backward(local_sequence(DY.float(), tp, sequence_parallel))
            calls.append([weight.sink.calls for weight in weights] if with_sink else None)
        assert not with_sink or all(weight.grad is None for weight in weights)
        results.append([weight.sink.main_grad if with_sink else weight.grad for weight in weights])
    return results, calls


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "sp"])
def test_gradients_in_the_sink_equal_gradients_in_grad_and_the_sink_is_told_once_per_backward(sequence_parallel):
    for results, calls in run_ranks(2, run_both_routes, sequence_parallel):
        without, within = results
        # the same products; addmm may round its sum with what is there once more or less than a separate addition
        torch.testing.assert_close(within, without, rtol=1e-5, atol=1e-5)
        assert calls == [None, None, [1, 1], [2, 2]]


def test_a_weight_used_twice_in_one_pass_tells_its_sink_twice():
    tp = Axis.single("tp")
    linear = ColumnParallelLinear(
        parameter(column_shard(INPUTS, [Column("w", INPUTS)], tp), {"w": randn(INPUTS, INPUTS)}), tp, False, resolve_kernels()
    )
    linear.weight.sink = CountingSink(linear.weight.shape)
    linear(linear(X.float())).sum().backward()
    assert linear.weight.sink.calls == 2


def run_with_an_expanded_gradient(rank, world_size):
    tp = grid(rank, tp=world_size).tp
    column, row = build_pair(tp, False)
    x = X.transpose(0, 1).clone().requires_grad_()
    gate, up = column(x.transpose(0, 1)).chunk(2, -1)
    row(gate * up).transpose(0, 2).sum().backward()
    return x.grad


def test_gradients_that_are_not_contiguous_are_reduced_too():
    """`sum` hands down an expanded gradient, `transpose` a strided one."""
    x = X.clone().requires_grad_()
    (((x @ FULL["gate"].t()) * (x @ FULL["up"].t())) @ FULL["down"].t()).sum().backward()
    for dx in run_ranks(2, run_with_an_expanded_gradient):
        torch.testing.assert_close(dx, x.grad.transpose(0, 1), **TOLERANCE)


def test_rows_and_columns_that_do_not_split_are_named():
    tp = Axis("tp", 0, 4, (0, 1, 2, 3), None, Axis.single("tp").ledger)
    with pytest.raises(AssertionError, match="q: 6 rows over 4 ranks"):
        column_shard(INPUTS, [Column("q", 6)], tp)
    with pytest.raises(AssertionError, match="down: 6 inputs over 4 ranks"):
        row_shard("down", 6, OUTPUTS, tp)


def order_of_a_backward_pass(rank, world_size, sequence_parallel):
    """What a column linear's backward pass starts, waits for and computes, in order."""
    import parallel.tensor.overlap as module

    events = []

    class Watched:
        def __init__(self, handle, name):
            self.handle, self.name = handle, name

        def wait(self):
            events.append(f"wait {self.name}")
            self.handle.wait()

    def watch(name):
        start = getattr(module, f"start_{name}")

        def started(*arguments):
            events.append(f"start {name}")
            result = start(*arguments)
            return (result[0], Watched(result[1], name)) if isinstance(result, tuple) else Watched(result, name)

        setattr(module, f"start_{name}", started)

    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        watch(name)
    tp = grid(rank, tp=world_size).tp
    kernels = replace(resolve_kernels(), wgrad=lambda *arguments: events.append("wgrad"))
    weight = parameter(column_shard(INPUTS, [Column("gate", FFN)], tp), {"gate": FULL["gate"].float()})
    weight.sink = CountingSink(weight.shape)
    x = local_sequence(X.float(), tp, sequence_parallel).clone().requires_grad_()
    y = ColumnParallelLinear(weight, tp, sequence_parallel, kernels)(x)
    events.clear()
    y.sum().backward()
    return events


def products_of_a_recomputed_pair(rank, world_size):
    """Which products the forward pass makes, and which its recomputation makes again; and what the latter sends."""
    tp, events = grid(rank, tp=world_size).tp, []
    kernels = resolve_kernels()

    def fprop(x, weight, out=None):
        events.append(tuple(weight.shape))
        return kernels.fprop(x, weight, out)

    column, row = build_pair(tp, True, torch.float32)
    column.kernels = row.kernels = replace(kernels, fprop=fprop)
    x = local_sequence(X.float(), tp, True).clone().requires_grad_()
    y = recompute(lambda x: row(column(x).square()[..., : FFN // tp.size]), x)
    forward = events[:]
    events.clear()
    tp.ledger.clear()
    y.sum().backward()
    return forward, events, tp.ledger.calls


def test_recomputation_ends_before_the_last_product():
    """What a row linear keeps is made again; its output is not, nor is the output's sum sent once more."""
    for forward, again, calls in run_ranks(2, products_of_a_recomputed_pair):
        assert forward == [(FFN, INPUTS), (OUTPUTS, FFN // 2)] and again == forward[:1]
        assert calls == {("all_gather", "tp"): 3, ("reduce_scatter", "tp"): 1}  # x again, x for dW, dy; dx


def test_communication_of_the_backward_pass_is_behind_the_weight_gradient():
    """The input's gather runs behind dgrad, the input gradient's reduction behind wgrad."""
    sequence = ["start all_gather", "start reduce_scatter", "wait all_gather", "wgrad", "wait reduce_scatter"]
    assert run_ranks(2, order_of_a_backward_pass, True) == [sequence] * 2
    assert run_ranks(2, order_of_a_backward_pass, False) == [["start all_reduce", "wgrad", "wait all_reduce"]] * 2
