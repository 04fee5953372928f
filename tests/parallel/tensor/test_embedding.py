"""Vocabulary-parallel embedding against `F.embedding`, also where the vocabulary does not divide."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from parallel.groups import Axis
from parallel.ledger import Ledger
from parallel.tensor.embedding import ROW_MULTIPLE, VocabularyParallelEmbedding, vocabulary_shard
from tests.parallel.building import coverage, grid, parameter, parts, randn, sum_of_parts
from tests.ranks import run_ranks

HIDDEN, S, B = 6, 12, 2


def table(vocabulary):
    return {"table": randn(vocabulary, HIDDEN, seed=vocabulary)}


def tokens(vocabulary):
    drawn = torch.randint(0, vocabulary, (S, B), generator=torch.Generator().manual_seed(1))
    drawn[0, 0], drawn[1, 0], drawn[2, 0], drawn[3, 0] = 0, vocabulary - 1, vocabulary - 1, 0  # the ends, and repeated
    return drawn


def look_up(rank, world_size, vocabulary, sequence_parallel):
    tp = grid(rank, tp=world_size).tp
    weight = parameter(vocabulary_shard("table", vocabulary, HIDDEN, tp), table(vocabulary))
    y = VocabularyParallelEmbedding(weight, tp, sequence_parallel)(tokens(vocabulary))
    dy = randn(S, B, HIDDEN, seed=3)
    y.backward(dy.chunk(tp.size)[tp.rank] if sequence_parallel else dy)
    real = weight.shard.segments[0].box.shape[0] if weight.shard.segments else 0
    return y.detach(), parts(weight.shard, weight.grad), weight.grad[real:]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize(("size", "vocabulary"), [(1, 32), (2, 32), (3, 50), (4, 10)])
def test_rows_and_gradients_are_those_of_one_table(size, vocabulary, sequence_parallel):
    """10 rows over 4 ranks of 8: the last two hold nothing but padding."""
    full = table(vocabulary)
    weight = full["table"].clone().requires_grad_()
    right = F.embedding(tokens(vocabulary), weight)
    right.backward(randn(S, B, HIDDEN, seed=3))
    ranks = run_ranks(size, look_up, vocabulary, sequence_parallel)
    ys = [torch.cat([rank[0] for rank in ranks])] if sequence_parallel else [rank[0] for rank in ranks]
    for y in ys:
        assert torch.equal(y, right)  # a row plus zeros: exact
    gradients = [part for rank in ranks for part in rank[1]]
    assert torch.equal(sum_of_parts(gradients, full)["table"], weight.grad)
    assert (coverage(gradients, full)["table"] == 1).all()
    assert all(not padding.any() for _, _, padding in ranks)


class Sink:
    def __init__(self, main_grad):
        self.main_grad = main_grad

    def ready(self):
        pass


@pytest.mark.parametrize("with_sink", [False, True])
def test_gradients_of_repeated_tokens_add_up_in_a_fixed_order_on_several_threads(with_sink):
    """Else two runs of one seed differ in their last bits."""
    tp = Axis.single("tp")
    weight = parameter(vocabulary_shard("table", 32, 64, tp), {"table": randn(32, 64)})
    embedding = VocabularyParallelEmbedding(weight, tp, sequence_parallel=False)
    drawn = torch.randint(0, 32, (2048, 2), generator=torch.Generator().manual_seed(1))
    dy, threads, results = randn(2048, 2, 64), torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        for _ in range(8):
            weight.grad, weight.sink = None, Sink(torch.zeros(32, 64)) if with_sink else None
            embedding(drawn).backward(dy)
            results.append(weight.sink.main_grad if with_sink else weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@given(st.integers(1, 300_000), st.integers(1, 512))
def test_the_shards_of_a_vocabulary_cover_it_once_with_equal_local_rows(vocabulary, size):
    ledger, next_row = Ledger(), 0
    for rank in range(size):
        shard = vocabulary_shard("table", vocabulary, HIDDEN, Axis("tp", rank, size, tuple(range(size)), None, ledger))
        assert shard.shape == vocabulary_shard("table", vocabulary, HIDDEN, Axis("tp", 0, size, (), None, ledger)).shape
        assert shard.shape[0] % ROW_MULTIPLE == 0
        for segment in shard.segments:
            assert segment.box.offset == (next_row, 0) and segment.local.offset == (0, 0)
            assert segment.global_shape == (vocabulary, HIDDEN)
            next_row = segment.box.end[0]
    assert next_row == vocabulary
