"""Each wrapper against a plain computation on real ranks; the ledger against the ring formula."""

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import (
    LARGE_BYTES,
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_narrow_all_reduce,
    start_receive,
    start_reduce_scatter,
    start_send,
)
from parallel.groups import Axis
from parallel.ledger import Ledger
from tests.parallel.building import CPU, grid, randn
from tests.ranks import run_ranks


def of_rank(rank, *shape):
    """Whole numbers, so that sums are exact in any order."""
    return randn(*shape, seed=rank).mul(8).round()


def call_each(rank, world_size):
    tp = grid(rank, tp=world_size).tp
    x, long = of_rank(rank, 3, 2), of_rank(rank, 3 * world_size, 2)
    return {
        "all_reduce": all_reduce(x.clone(), tp),
        "all_reduce max": all_reduce(x.clone(), tp, dist.ReduceOp.MAX),
        "all_gather": all_gather(x, tp),
        "all_gather of a transposed": all_gather(x.t(), tp),
        "reduce_scatter": reduce_scatter(long, tp),
        "reduce_scatter of a transposed": reduce_scatter(long.t().contiguous().t(), tp),
        "broadcast": broadcast(x.clone(), tp, source=1),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_each_collective_is_its_plain_computation(size):
    xs = torch.stack([of_rank(rank, 3, 2) for rank in range(size)])
    long = torch.stack([of_rank(rank, 3 * size, 2) for rank in range(size)]).sum(0)
    for rank, results in enumerate(run_ranks(size, call_each)):
        expected = {
            "all_reduce": xs.sum(0),
            "all_reduce max": xs.amax(0),
            "all_gather": xs.flatten(0, 1),
            "all_gather of a transposed": xs.transpose(1, 2).flatten(0, 1),
            "reduce_scatter": long[3 * rank : 3 * rank + 3],
            "reduce_scatter of a transposed": long[3 * rank : 3 * rank + 3],
            "broadcast": xs[1],
        }
        for name, right in expected.items():
            assert torch.equal(results[name], right), name


def record_bytes(rank, world_size):
    groups = grid(rank, tp=world_size)
    tp, ledger = groups.tp, groups.ledger
    all_reduce(torch.zeros(12, 5), tp)
    all_gather(torch.zeros(4, dtype=torch.bfloat16), tp)
    reduce_scatter(torch.zeros(12, dtype=torch.float64), tp)
    broadcast(torch.zeros(7), tp, source=1)
    if rank == 0:
        start_send(torch.zeros(9), tp, peer=1, tag=0).wait()
    if rank == 1:
        start_receive(torch.zeros(9), tp, peer=0, tag=0).wait()
    recorded = dict(ledger.sent_bytes), dict(ledger.calls)
    ledger.clear()
    return *recorded, dict(ledger.sent_bytes), dict(ledger.calls)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_ledger_has_the_bytes_of_the_ring(size):
    for rank, (sent, calls, cleared_bytes, cleared_calls) in enumerate(run_ranks(size, record_bytes)):
        expected = {
            ("all_reduce", "tp"): 2 * (12 * 5 * 4) * (size - 1) // size,
            ("all_gather", "tp"): (4 * 2 * size) * (size - 1) // size,
            ("reduce_scatter", "tp"): (12 * 8) * (size - 1) // size,
            ("broadcast", "tp"): 7 * 4 if rank == 1 else 0,
        }
        if rank == 0:
            expected["send", "tp"] = 9 * 4
        if rank == 1:
            expected["receive", "tp"] = 0
        assert sent == expected
        assert calls == dict.fromkeys(expected, 1)
        assert cleared_bytes == cleared_calls == {}


def use_buckets_in_place(rank, world_size, n):
    tp = grid(rank, tp=world_size).tp
    part = slice(n * rank, n * rank + n)
    gathered = torch.full((n * world_size,), -1.0)
    gathered[part] = of_rank(rank, n)
    out, handle = start_all_gather(gathered[part], tp, out=gathered)
    handle.wait()
    scattered = of_rank(rank, n * world_size)
    mine, handle = start_reduce_scatter(scattered, tp, out=scattered[part])
    handle.wait()
    shared = out.data_ptr() == gathered.data_ptr() and mine.data_ptr() == scattered[part].data_ptr()
    return shared, gathered, scattered[part].clone()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("n", [4, LARGE_BYTES // 4], ids=["small", "large"])
def test_gather_into_and_scatter_out_of_one_buffer(size, n):
    """What a bucket does: the shard is a view of the whole."""
    gathered = torch.cat([of_rank(rank, n) for rank in range(size)])
    total = torch.stack([of_rank(rank, n * size) for rank in range(size)]).sum(0)
    for rank, (shared, ours, mine) in enumerate(run_ranks(size, use_buckets_in_place, n)):
        assert shared
        assert torch.equal(ours, gathered)
        assert torch.equal(mine, total[n * rank : n * rank + n])


def reduce_in_fp32_what_travels_in_bf16(rank, world_size):
    groups = grid(rank, dp=world_size)
    gradients = randn(5 * world_size, seed=rank).bfloat16()
    shard = torch.empty(5)
    start_reduce_scatter(gradients, groups.data, out=shard)[1].wait()
    return shard, dict(groups.ledger.sent_bytes)


@pytest.mark.parametrize("size", [2, 4])
def test_a_wider_result_is_summed_in_its_own_dtype_and_travels_in_the_narrow_one(size):
    """A sum of bf16 numbers in bf16 would lose digits at each addition."""
    gradients = [randn(5 * size, seed=rank).bfloat16() for rank in range(size)]
    exact = torch.stack(gradients).double().sum(0)
    in_bf16 = sum(gradients[1:], gradients[0])
    assert (in_bf16.double() - exact).abs().max() > 1e-3, "the sample shows no rounding"
    for rank, (shard, sent) in enumerate(run_ranks(size, reduce_in_fp32_what_travels_in_bf16)):
        torch.testing.assert_close(shard.double(), exact[5 * rank : 5 * rank + 5], rtol=1e-6, atol=1e-6)  # fp32
        assert sent == {("reduce_scatter", "data"): 5 * 2 * (size - 1)}


def all_reduce_fp32_in_bf16(rank, world_size):
    groups = grid(rank, dp=world_size)
    tensor = randn(3 * world_size, seed=rank)
    start_narrow_all_reduce(tensor, groups.data, torch.bfloat16).wait()
    return tensor, dict(groups.ledger.sent_bytes)


@pytest.mark.parametrize("size", [2, 3])
def test_a_narrow_all_reduce_rounds_what_it_sends_and_nothing_else(size):
    rounded = torch.stack([randn(3 * size, seed=rank).bfloat16() for rank in range(size)]).double().sum(0)
    ranks = run_ranks(size, all_reduce_fp32_in_bf16)
    for tensor, sent in ranks:
        assert torch.equal(tensor, ranks[0][0]), "all members have the same sums"
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, rounded.float().bfloat16().float())
        assert sent == {(kind, "data"): 3 * 2 * (size - 1) for kind in ("reduce_scatter", "all_gather")}


def count_calls(rank, world_size):
    """What torch.distributed is asked for by a reduce-scatter."""
    tp, asked = grid(rank, tp=world_size).tp, []
    start_messages = dist.batch_isend_irecv

    def call(messages):
        asked.extend((message.op.__name__, message.tensor.numel()) for message in messages)
        return start_messages(messages)

    dist.batch_isend_irecv = call
    for name in ("all_to_all_single", "all_reduce", "reduce_scatter_tensor"):
        setattr(dist, name, None)
    reduce_scatter(torch.ones(6), tp)
    return asked


def test_on_gloo_a_reduce_scatter_moves_its_pieces_once():
    """gloo's own is a whole all-reduce, of which each rank keeps a part. Its all-to-all sends before it receives, which makes a
    slow link go one way at a time."""
    assert run_ranks(2, count_calls) == [[("irecv", 3), ("isend", 3)]] * 2


def exchange(rank, world_size):
    """Both directions at once, two messages each; receives posted in the opposite order of the sends."""
    pp = grid(rank, pp=2).pp_forward
    peer = 1 - rank
    outgoing = {tag: torch.full((3,), 10.0 * rank + tag) for tag in (1, 2)}
    incoming = {tag: torch.zeros(3) for tag in (1, 2)}
    sends = [start_send(outgoing[tag], pp, peer, tag) for tag in (1, 2)]
    receives = [start_receive(incoming[tag], pp, peer, tag) for tag in (2, 1)]
    for work in sends + receives:
        work.wait()
    return {tag: values.tolist() for tag, values in incoming.items()}


def test_messages_find_their_receiver_by_tag_in_both_directions():
    assert run_ranks(2, exchange) == [{1: [11.0] * 3, 2: [12.0] * 3}, {1: [1.0] * 3, 2: [2.0] * 3}]


def reduce_in_the_background(rank, world_size):
    tp = grid(rank, tp=world_size).tp
    tensor = torch.ones(5)
    start_all_reduce(tensor, tp).wait()
    barrier(tp, CPU)
    return tensor.tolist()


def test_a_started_reduction_is_done_after_wait():
    assert run_ranks(2, reduce_in_the_background) == [[2.0] * 5] * 2


def leave_breadcrumbs(rank, world_size):
    groups = grid(rank, tp=2)
    crumbs = [groups.ledger.last]
    all_reduce(torch.zeros(4), groups.tp)
    all_reduce(torch.zeros(4), groups.tp)
    crumbs.append(groups.ledger.last)
    groups.ledger.clear()
    return [*crumbs, groups.ledger.last]


def test_the_last_call_is_a_breadcrumb_that_outlives_clear():
    crumb = "all_reduce over tp (0, 1), 16 bytes, call 2"
    assert run_ranks(2, leave_breadcrumbs) == [["none", crumb, crumb]] * 2


def test_an_axis_of_one_makes_no_call():
    """There is no process group here, so any call would raise."""
    ledger = Ledger()
    axis = Axis.single("tp", ledger=ledger)
    x = randn(4, 2)
    started = [start_all_gather(x, axis), start_reduce_scatter(x, axis)]
    for result, handle in started:
        assert result is x
        handle.wait()
    assert all_reduce(x, axis) is x and all_gather(x, axis) is x and reduce_scatter(x, axis) is x
    assert broadcast(x, axis, source=0) is x
    barrier(axis, CPU)
    assert not ledger.calls and ledger.last == "none"


def test_a_dim_that_does_not_split_is_named():
    axis = Axis("tp", 0, 2, (0, 1), None, Ledger())
    with pytest.raises(AssertionError, match=r"dim 0 of \(3, 2\) does not split over 2 ranks"):
        start_reduce_scatter(torch.zeros(3, 2), axis)


def test_a_reduction_in_place_wants_a_contiguous_tensor():
    """On a copy the sum would be lost."""
    axis = Axis("tp", 0, 2, (0, 1), None, Ledger())
    with pytest.raises(AssertionError):
        start_all_reduce(torch.zeros(3, 2).t(), axis)


def ranges_of_a_profile(rank, world_size):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call_each(rank, world_size)
    return {event.name for event in profile.events()}


def test_a_profile_names_kind_and_axis():
    names = run_ranks(2, ranges_of_a_profile)[0]
    assert {"all_reduce/tp", "all_gather/tp", "reduce_scatter/tp", "broadcast/tp"} <= names
