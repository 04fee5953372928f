"""The head and its loss in chunks of tokens, against torch's cross entropy of whole logits in fp64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parallel.groups import Axis
from parallel.kernels.providers import Workload
from parallel.kernels.table import resolve_kernels
from parallel.tensor import head_loss
from parallel.tensor.deferred import WeightGradientQueue
from parallel.tensor.embedding import VocabularyParallelEmbedding, vocabulary_shard
from parallel.tensor.head_loss import VocabularyParallelHead, chunk_tokens
from tests.parallel.building import grid, parameter, parts, randn, sum_of_parts
from tests.parallel.largest_tensor import LargestTensor
from tests.ranks import run_ranks

S, B, HIDDEN, VOCABULARY = 12, 3, 6, 20
CHUNK = 16  # tokens at most: 36 are chunks of 12, 12, 12
SCALE = 8.0  # what the loss is multiplied by: a power of two changes no bit


class Sink:
    def __init__(self, weight):
        self.main_grad, self.calls = torch.zeros(weight.shape), 0

    def ready(self):
        self.calls += 1


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """16 tokens of the widest part of a vocabulary in these tests."""
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", CHUNK * 24 * 4)


def full_weight(dtype=torch.float32):
    return randn(VOCABULARY, HIDDEN, seed=1).to(dtype)


def micro_batch(number=0):
    """x [s, b, h], targets and the tokens' weights [s, b], one of which is 0."""
    targets = torch.randint(0, VOCABULARY, (S, B), generator=torch.Generator().manual_seed(30 + number))
    weights = torch.rand(S, B, generator=torch.Generator().manual_seed(40 + number))
    targets[0, 0], targets[-1, -1], weights[1, 1] = 0, VOCABULARY - 1, 0.0
    return randn(S, B, HIDDEN, seed=20 + number), targets, weights


def make_head(tp, sequence_parallel=False, dtype=torch.float32, with_sink=True, queue=None, kernels=None):
    full = {"output": full_weight(dtype)}
    weight = parameter(vocabulary_shard("output", VOCABULARY, HIDDEN, tp), full)
    weight.sink = Sink(weight) if with_sink else None
    return VocabularyParallelHead(weight, VOCABULARY, tp, sequence_parallel, kernels or resolve_kernels(), queue)


def this_ranks(x, tp, sequence_parallel):
    return (x.chunk(tp.size)[tp.rank] if sequence_parallel else x).clone().requires_grad_()


def chunked(rank, world_size, sequence_parallel, dtype, with_sink):
    tp = grid(rank, tp=world_size).tp
    x, targets, weights = micro_batch()
    head = make_head(tp, sequence_parallel, dtype, with_sink)
    x = this_ranks(x.to(dtype), tp, sequence_parallel)
    loss = head(x, targets, weights)
    (loss * SCALE).backward()
    dw = head.weight.sink.main_grad if with_sink else head.weight.grad
    assert not with_sink or head.weight.sink.calls == 1
    return loss.detach(), x.grad, dw.dtype, parts(head.weight.shard, dw)


def whole(dtype):
    x, targets, weights = micro_batch()
    x, w = x.to(dtype).double().requires_grad_(), full_weight(dtype).double().requires_grad_()
    losses = F.cross_entropy((x @ w.t()).flatten(0, 1), targets.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum()
    (loss * SCALE).backward()
    return loss.detach(), x.grad, w.grad


# of the whole, by norm; bf16 rounds logits of about 5, and so the exponents of the softmax, to 8 bits
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def off_by(ours, right):
    return ((ours.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_sink", [False, True], ids=["grad", "main_grad"])
@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_loss_and_gradients_are_those_of_whole_logits(size, sequence_parallel, with_sink, dtype):
    """20 rows over 4 ranks of 8: the third has 4 of padding, the fourth nothing else."""
    loss, dx, dw = whole(dtype)
    ranks = run_ranks(size, chunked, sequence_parallel, dtype, with_sink)
    for ours, gradient, dw_dtype, _ in ranks:
        assert ours.dtype == torch.float32 and torch.equal(ours, ranks[0][0])  # the same bits on each rank
        assert (gradient.dtype, dw_dtype) == (dtype, torch.float32 if with_sink else dtype)
        assert off_by(ours, loss) < TOLERANCES[dtype]
    found = torch.cat([rank[1] for rank in ranks]) if sequence_parallel else ranks[0][1]
    assert off_by(found, dx) < TOLERANCES[dtype]
    found = sum_of_parts([part for rank in ranks for part in rank[3]], {"output": dw})["output"]
    assert off_by(found, dw) < TOLERANCES[dtype]


def test_chunks_are_equal_parts_below_the_bound():
    logits = 24 * 4
    assert [chunk_tokens(tokens, logits) for tokens in (1, 16, 17, 36, 1000)] == [1, 16, 9, 12, 16]
    assert chunk_tokens(36, 4 * 10**6) == 1  # never none
    assert chunk_tokens(64, logits // 2) == 32


def test_logits_never_exist_whole():
    """What is made in both passes, beside dW and dx, is a chunk's logits and their fp32 values; small logits are whole."""
    tokens, hidden, vocabulary = 64, 2, 6_000
    weight = parameter(vocabulary_shard("output", vocabulary, hidden, Axis.single("tp")), {"output": randn(vocabulary, hidden)})
    head = VocabularyParallelHead(weight, vocabulary, Axis.single("tp"), False, resolve_kernels())
    x, targets = randn(tokens, 1, hidden).requires_grad_(), torch.zeros(tokens, 1, dtype=torch.long)
    largest = []
    for head_loss.CHUNK_BYTES in (8 * vocabulary * 4, tokens * vocabulary * 4):
        with LargestTensor() as seen:
            head(x, targets, torch.ones(tokens, 1)).backward()
        largest.append(seen.bytes)
    assert largest == [8 * vocabulary * 4, tokens * vocabulary * 4]


def passes(head, order):
    """Forward (F) and backward (B) passes of micro-batches, first in, first out. Returns losses and gradients of x."""
    losses, flights, gradients = [], [], []
    for kind in order:
        if kind == "F":
            x, targets, weights = micro_batch(len(losses))
            x.requires_grad_()
            loss = head(x, targets, weights)
            losses.append(loss.detach())
            flights.append((x, loss))
        else:
            x, loss = flights.pop(0)
            loss.backward()
            gradients.append(x.grad)
    return losses + gradients


class Counted:
    """The products that a head makes."""

    def __init__(self):
        kernels, self.counts = resolve_kernels(), {"fprop": 0, "dgrad": 0, "wgrad": 0}
        self.kernels = replace(kernels, **{name: self._counting(name, getattr(kernels, name)) for name in self.counts})

    def _counting(self, name, kernel):
        def counted(*arguments, **options):
            self.counts[name] += 1
            return kernel(*arguments, **options)

        return counted


def test_what_waits_for_its_backward_pass_makes_the_same_bits_and_keeps_one_weight_gradient():
    results = []
    for order, products in (("FBFBFB", 9), ("FFFBBB", 9 + 6), ("FFBFBB", 9 + 3)):
        counted = Counted()
        head = make_head(Axis.single("tp"), kernels=counted.kernels)
        results.append([*passes(head, order), head.weight.sink.main_grad])
        # three chunks each, and the logits again of those that found a weight gradient waiting
        assert counted.counts == {"fprop": products, "dgrad": 9, "wgrad": 9}
        assert head.weight.sink.calls == 3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_forward_pass_that_is_dropped_leaves_nothing_waiting():
    counted = Counted()
    head = make_head(Axis.single("tp"), kernels=counted.kernels)
    passes(head, "F")
    passes(head, "FB")
    assert counted.counts == {"fprop": 6, "dgrad": 6, "wgrad": 6}
    assert head.weight.sink.calls == 1


def test_without_gradients_there_is_the_loss_alone():
    counted = Counted()
    head = make_head(Axis.single("tp"), kernels=counted.kernels)
    x, targets, weights = micro_batch()
    with torch.no_grad():
        loss = head(x, targets, weights)
    assert counted.counts == {"fprop": 3, "dgrad": 0, "wgrad": 0}
    assert torch.equal(loss, head(x.requires_grad_(), targets, weights))


def test_without_targets_there_are_logits():
    x = randn(S, B, HIDDEN, seed=20)
    torch.testing.assert_close(make_head(Axis.single("tp"))(x)[..., :VOCABULARY], x @ full_weight().t())


class Tied(nn.Module):
    """A table that is embedding and head."""

    def __init__(self):
        super().__init__()
        tp, self.weight_gradients = Axis.single("tp"), WeightGradientQueue()
        self.head = make_head(tp, queue=self.weight_gradients)
        self.head.weight.shard = replace(self.head.weight.shard, uses=2)
        self.embedding = VocabularyParallelEmbedding(self.head.weight, tp, False, self.weight_gradients)

    def forward(self, number):
        _, targets, weights = micro_batch(number)
        return self.head(self.embedding(targets.flip(0)).tanh(), targets, weights)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_tied_tables_gradients_keep_their_order_in_split_passes(delay):
    gradients = []
    for split in (False, True):
        model = Tied()
        queue = model.weight_gradients
        for number in range(4):
            loss = model(number)
            if not split:
                loss.backward()
                continue
            with queue.collect(number):
                loss.backward()
            if number >= delay:
                queue.drain(number - delay)
        for number in range(4 - len(queue), 4):
            queue.drain(number)
        gradients.append(model.head.weight.sink.main_grad)
        assert model.head.weight.sink.calls == 8
    assert torch.equal(*gradients)


def test_an_untied_head_leaves_nothing_for_w():
    queue = WeightGradientQueue()
    head = make_head(Axis.single("tp"), queue=queue)
    x, targets, weights = micro_batch()
    with queue.collect(0):
        head(x.requires_grad_(), targets, weights).backward()
    assert head.weight.sink.calls == 1
    queue.drain(0)
    assert head.weight.sink.calls == 1


def messages(rank, world_size, sequence_parallel):
    groups = grid(rank, tp=world_size)
    x, targets, weights = micro_batch()
    head = make_head(groups.tp, sequence_parallel)
    head(this_ranks(x, groups.tp, sequence_parallel), targets, weights).backward()
    return {kind: sent for (kind, _), sent in groups.ledger.sent_bytes.items() if sent}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_x_travels_once_each_way_whatever_the_number_of_chunks(sequence_parallel):
    half, statistics = 4 * S * B * HIDDEN // 2, 3 * 4 * S * B
    expected = {"all_gather": statistics, "all_reduce": 2 * half}
    if sequence_parallel:
        expected = {"all_gather": statistics + half, "reduce_scatter": half}
    for sent in run_ranks(2, messages, sequence_parallel):
        assert sent == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("provider", ["torch", "triton"])
def test_on_a_gpu_without_waiting_for_it(provider):
    """It has not run yet: there was no GPU."""
    device = torch.device("cuda")
    kernels = resolve_kernels({"head_loss": provider}, Workload(device))
    head = make_head(Axis.single("tp"), kernels=kernels)
    head.weight.data = head.weight.data.to(device)
    head.weight.sink.main_grad = head.weight.sink.main_grad.to(device)
    x, targets, weights = (tensor.to(device) for tensor in micro_batch())
    x.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = head(x, targets, weights)
        (loss * SCALE).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = loss, x.grad, head.weight.sink.main_grad[:VOCABULARY]
    for ours, right in zip(found, whole(torch.float32), strict=True):
        assert off_by(ours.detach().cpu(), right) < TOLERANCES[torch.float32]
