"""The modes of tensor-parallel overlap: the same results, the same bytes, and an order of work in which messages hide."""

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from parallel.errors import ConfigError
from parallel.groups import Axis
from parallel.kernels.table import resolve_kernels
from parallel.tensor import overlap as module
from parallel.tensor.deferred import WeightGradientQueue
from parallel.tensor.linear import Column, ColumnParallelLinear, RowParallelLinear, column_shard, row_shard
from parallel.tensor.overlap import NoOverlap, Overlap, SymmetricMemoryOverlap, make_overlap, row_pieces
from tests.parallel.building import grid, parameter, randn
from tests.ranks import run_ranks

CPU = torch.device("cpu")
S, B, INPUTS, FFN, OUTPUTS = 24, 2, 12, 24, 10
FULL = {"up": randn(FFN, INPUTS, seed=1), "down": randn(OUTPUTS, FFN, seed=2)}
X, DY = randn(S, B, INPUTS, seed=3), randn(S, B, OUTPUTS, seed=4)
MODES = ("none", "backward", "chunks")
# By blocks of rows a matrix library may add up a row's products in another order.
TOLERANCE = dict(rtol=1e-6, atol=1e-5)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Tiny messages go in pieces too: of 3 and more rows of a rank's 24 / tp."""
    monkeypatch.setattr(module, "PIECE_BYTES", {"cpu": 3 * B * OUTPUTS * 4})


def build_pair(tp, sequence_parallel, mode, queue=None, kernels=None):
    kernels = kernels or resolve_kernels()
    up = parameter(column_shard(INPUTS, [Column("up", FFN)], tp), FULL)
    down = parameter(row_shard("down", FFN, OUTPUTS, tp), FULL)
    column = ColumnParallelLinear(up, tp, sequence_parallel, kernels, queue, mode)
    return column, RowParallelLinear(down, tp, sequence_parallel, kernels, queue, mode)


def local_rows(full, tp, sequence_parallel):
    return full.chunk(tp.size)[tp.rank] if sequence_parallel else full


def run_modes(rank, world_size, sequence_parallel, split):
    """Outputs, gradients and bytes of two passes in each mode; `split` leaves the weight gradients to a W."""
    tp = grid(rank, tp=world_size).tp
    results = {}
    for mode in MODES:
        tp.ledger.clear()
        queue = WeightGradientQueue()
        column, row = build_pair(tp, sequence_parallel, mode, queue)
        tensors = []
        for number, rows in enumerate((X, X.flip(0))):
            x = local_rows(rows, tp, sequence_parallel).clone().requires_grad_()
            y = row(column(x).square())
            dy = local_rows(DY, tp, sequence_parallel)
            if split:
                with queue.collect(number):
                    y.backward(dy)
            else:
                y.backward(dy)
            tensors += [y.detach(), x.grad]
        for number in range(2 if split else 0):
            queue.drain(number)
        results[mode] = [*tensors, column.weight.grad, row.weight.grad], Counter(tp.ledger.sent_bytes), Counter(tp.ledger.calls)
    return results


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize("size", [2, 3])
def test_modes_give_the_same_results_and_send_the_same_bytes(size, sequence_parallel, split):
    for results in run_ranks(size, run_modes, sequence_parallel, split):
        right, sent, calls = results["none"]
        assert all(torch.equal(*pair) for pair in zip(results["backward"][0], right, strict=True))
        torch.testing.assert_close(results["chunks"][0], right, **TOLERANCE)
        for mode in MODES:
            assert sum(results[mode][1].values()) == sum(sent.values()) > 0
        assert results["backward"][2] == calls
        kind = "exchange" if sequence_parallel else "all_reduce"
        assert results["chunks"][2][kind, "tp"] > calls[kind, "tp"]  # in pieces


def test_rows_that_do_not_divide_into_pieces_are_all_there():
    for rows in range(1, 40):
        pieces = row_pieces(rows, row_bytes=45, piece_bytes=100)
        assert [row for piece in pieces for row in range(rows)[piece]] == list(range(rows))
        assert len(pieces) == max(1, min(4, rows * 45 // 100))
        assert all(45 * len(range(rows)[piece]) > 100 - 45 for piece in pieces) or len(pieces) == 1


class Recorder:
    """What a rank starts, waits for and multiplies, in order. Products are named by their rows."""

    def __init__(self):
        self.events, self.numbers = [], Counter()

    def started(self, name, handle):
        number = self.numbers[name]
        self.numbers[name] += 1
        self.events.append(f"start {name} {number}")
        return Waited(self.events, f"wait {name} {number}", handle)

    def watch(self, monkeypatch, name):
        start = getattr(module, name)

        def started(*arguments):
            result = start(*arguments)
            short = name.removeprefix("start_")
            if isinstance(result, tuple):
                return result[0], self.started(short, result[1])
            return self.started(short, result)

        monkeypatch.setattr(module, name, started)

    def kernels(self):
        """The kernel table, its products recorded."""

        def recorded(name, kernel):
            def product(x, weight, out=None):
                self.events.append(f"{name} of {math.prod(x.shape[:-1])}")
                return kernel(x, weight, out)

            return product

        kernels = resolve_kernels()
        return replace(kernels, fprop=recorded("fprop", kernels.fprop), dgrad=recorded("dgrad", kernels.dgrad))


class Waited:
    def __init__(self, events, name, handle):
        self.events, self.name, self.handle = events, name, handle

    def wait(self):
        self.events.append(self.name)
        self.handle.wait()


def order_in_chunks(rank, world_size, sequence_parallel):
    monkeypatch, recorder = pytest.MonkeyPatch(), Recorder()
    for name in ("start_exchange", "start_all_gather", "start_all_reduce", "start_reduce_scatter"):
        recorder.watch(monkeypatch, name)
    tp = grid(rank, tp=world_size).tp
    column, row = build_pair(tp, sequence_parallel, "chunks", kernels=recorder.kernels())
    phases = []
    x = local_rows(X, tp, sequence_parallel).clone().requires_grad_()
    hidden = column(x)
    phases.append(recorder.events[:])
    recorder.events.clear()
    recorder.numbers.clear()
    y = row(hidden.detach().requires_grad_())
    phases.append(recorder.events[:])
    recorder.events.clear()
    recorder.numbers.clear()
    y.backward(local_rows(DY, tp, sequence_parallel))
    phases.append(recorder.events[:])
    recorder.events.clear()
    recorder.numbers.clear()
    hidden.backward(torch.ones_like(hidden))
    phases.append(recorder.events[:])
    return phases


def test_pieces_travel_behind_the_products_of_others():
    """24 rows of 2 samples over 2 ranks: pieces of 3 rows. A rank's own product comes first in a gather, last in a sum."""
    column, row, row_backward, column_backward = run_ranks(2, order_in_chunks, True)[0]
    starts = [f"start exchange {i}" for i in range(4)]
    gathered = [event for i in range(4) for event in (f"wait exchange {i}", "{} of 6")]
    assert column == [*starts, "fprop of 24", *(event.format("fprop") for event in gathered)]
    assert row_backward == [*starts[:4], "dgrad of 24", *(event.format("dgrad") for event in gathered)]
    scattered = [event for i in range(4) for event in ("{} of 6", f"start exchange {i}")]
    waits = [f"wait exchange {i}" for i in range(4)]
    assert row == [*(event.format("fprop") for event in scattered), "fprop of 24", *waits]
    behind = [*(event.format("dgrad") for event in scattered), "dgrad of 24", "wait all_gather 0", *waits]
    assert column_backward == ["start all_gather 0", *behind]


def test_without_sequence_parallelism_sums_leave_by_pieces():
    column, row, row_backward, column_backward = run_ranks(2, order_in_chunks, False)[0]
    assert (column, row_backward) == (["fprop of 48"], ["dgrad of 48"])
    pieces = [event for i in range(4) for event in ("{} of 12", f"start all_reduce {i}")]
    waits = [f"wait all_reduce {i}" for i in range(4)]
    assert row == [*(event.format("fprop") for event in pieces), *waits]
    assert column_backward == [*(event.format("dgrad") for event in pieces), *waits]


def test_none_waits_for_each_message_before_it_goes_on(monkeypatch):
    """Its handles have nothing left to wait for."""
    done = []

    class Pending:
        def wait(self):
            done.append(True)

    tp = Axis("tp", 0, 2, (0, 1), None, Axis.single("tp").ledger)
    for name in ("start_all_gather", "start_reduce_scatter"):
        monkeypatch.setattr(module, name, lambda tensor, axis: (tensor, Pending()))
    x, product = randn(4, 1, 3), module.Product.fprop(resolve_kernels().fprop, randn(2, 3))
    for hides in (False, True):
        done.clear()
        overlap = make_overlap("backward" if hides else "none", tp, True, CPU)
        handles = [overlap.start_gather(x)[1], overlap.product_sum(x, product)[1]]
        assert len(done) == (0 if hides else 2)
        for handle in handles:
            handle.wait()
        assert len(done) == 2


def test_one_rank_has_nothing_to_hide():
    tp = Axis.single("tp")
    assert type(make_overlap("async", tp, False, CPU)) is type(make_overlap("chunks", tp, False, CPU)) is Overlap
    assert isinstance(make_overlap("none", tp, False, CPU), NoOverlap)


# ---- async: torch's symmetric memory ------------------------------------------------------------------------------------


@contextmanager
def operators_on_the_cpu():
    """torch's fused operators by torch's own fallbacks, which gather, multiply and reduce in turn."""
    import torch.distributed._symmetric_memory as symmetric_memory

    library = torch.library.Library("symm_mem", "IMPL")
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        library.impl(name, getattr(symmetric_memory, f"_{name}_fallback"), "CPU")
    yield
    library._destroy()


def run_async(rank, world_size):
    tp = grid(rank, tp=world_size).tp
    results = []
    with operators_on_the_cpu():
        for mode in ("none", "async"):
            column, row = build_pair(tp, True, "none")
            if mode == "async":
                column.overlap = row.overlap = SymmetricMemoryOverlap(tp, True)
            x = local_rows(X, tp, True).clone().requires_grad_()
            y = row(column(x).square())
            y.backward(local_rows(DY, tp, True))
            results.append([y.detach(), x.grad, column.weight.grad, row.weight.grad])
    return results


def test_async_calls_torchs_operators_as_they_are():
    for right, ours in run_ranks(2, run_async):
        torch.testing.assert_close(ours, right, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(sequence_parallel=False), "parallel.sequence_parallel = false"),
        (dict(device=CPU), "it needs CUDA devices joined by NVLink, and this run is on the cpu"),
        (dict(count=2), "the 4 tensor ranks are not on one node, which has 2 CUDA devices"),
        (dict(device=torch.device("cuda", 0)), "the 4 tensor ranks are not on one node, which has 4 CUDA devices"),
        (dict(reachable=False), "cuda:1 cannot reach the memory of cuda:0"),
        ({}, None),
    ],
)
def test_async_is_refused_where_it_cannot_be_had(monkeypatch, change, reason):
    settings = dict(sequence_parallel=True, device=torch.device("cuda", 1), count=4, reachable=True) | change
    monkeypatch.setattr(torch.cuda, "device_count", lambda: settings["count"])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: settings["reachable"])
    tp = Axis("tp", 1, 4, (0, 1, 2, 3), None, Axis.single("tp").ledger)
    if reason is None:
        assert isinstance(make_overlap("async", tp, True, settings["device"]), SymmetricMemoryOverlap)
        return
    with pytest.raises(ConfigError) as error:
        make_overlap("async", tp, settings["sequence_parallel"], settings["device"])
    assert reason in str(error.value) and str(error.value).endswith("set --parallel.tp_overlap chunks")


# ---- on GPUs: not run yet -----------------------------------------------------------------------------------------------

DELAY_CYCLES = 50_000_000  # some 30 ms


def run_delayed(rank, world_size):
    """The pair in each mode, one rank or the other late with each message.

    Memory that nobody has written holds NaN, so that whoever reads before a message is there shows.
    """
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", "tcp://localhost:29513", rank=rank, world_size=world_size)
    tp, results = grid(rank, tp=world_size).tp, {}
    module.PIECE_BYTES = {"cuda": 3 * B * OUTPUTS * 4}
    torch.use_deterministic_algorithms(True, warn_only=True)
    messages = Counter()
    for name in ("start_exchange", "start_all_gather", "start_reduce_scatter"):
        start = getattr(module, name)

        def slow(*arguments, start=start):
            messages[rank] += 1
            if messages[rank] % world_size == rank:
                torch.cuda._sleep(DELAY_CYCLES)  # what is sent is not there yet when the message is started
            return start(*arguments)

        setattr(module, name, slow)
    for mode in (*MODES, "async"):
        column, row = build_pair(tp, True, "none")
        for layer in (column, row):
            layer.weight.data = layer.weight.data.to(device)
            layer.overlap = make_overlap(mode, tp, True, device)
        x = local_rows(X, tp, True).to(device).requires_grad_()
        y = row(column(x).square())
        y.backward(local_rows(DY, tp, True).to(device))
        results[mode] = [t.cpu() for t in (y.detach(), x.grad, column.weight.grad, row.weight.grad)]
    dist.destroy_process_group()
    return results


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_streams_are_ordered_by_events_alone():
    for results in run_ranks(2, run_delayed, joined=False):
        for mode in (*MODES[1:], "async"):
            torch.testing.assert_close(results[mode], results["none"], **TOLERANCE)
