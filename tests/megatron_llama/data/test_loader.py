import threading

import numpy as np
import pytest
import torch

from megatron_llama.data.blend import build_blend
from megatron_llama.data.indexed import IndexedDatasetWriter
from megatron_llama.data.loader import Loader, Prefetcher, evaluation_micro_batches, target_count
from parallel.errors import ConfigError, DataError


@pytest.fixture
def prefix(tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document(np.arange(1001))
    return str(tmp_path / "d")


@pytest.fixture
def blend(prefix):
    return build_blend([(prefix, None)], 10, 1, 2000)


def test_layout_of_a_micro_batch(blend):
    (micro_batch,) = Loader(blend, 10, 4, 4, 0, 1).micro_batches(8)
    samples = torch.from_numpy(blend.samples(np.arange(8, 12)))  # [b, s + 1]
    assert torch.equal(micro_batch.tokens, samples[:, :-1].T) and torch.equal(micro_batch.targets, samples[:, 1:].T)
    assert micro_batch.tokens.dtype == micro_batch.targets.dtype == micro_batch.positions.dtype == torch.int64
    assert micro_batch.tokens.is_contiguous() and micro_batch.targets.is_contiguous()
    assert micro_batch.loss_mask.dtype == torch.float32 and micro_batch.loss_mask.eq(1).all()
    assert micro_batch.loss_mask.shape == (10, 4) and micro_batch.positions[:, 0].tolist() == list(range(10))
    assert torch.equal(micro_batch.to("cpu").targets, micro_batch.targets)
    assert micro_batch.to("meta").tokens.device.type == "meta"


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_global_batch_is_the_same_for_any_layout(blend, dp_size, micro_batch_size):
    for first_sample in (0, 8, 16, 96):  # the last one crosses the end of the epoch
        parts = []
        for dp_rank in range(dp_size):
            loader = Loader(blend, 10, micro_batch_size, 8, dp_rank, dp_size)
            micro_batches = loader.micro_batches(first_sample)
            assert len(micro_batches) == loader.num_micro_batches == 8 // (dp_size * micro_batch_size)
            assert target_count(micro_batches) == 80 // dp_size
            parts += [torch.cat([micro_batch.tokens, micro_batch.targets[-1:]]).T for micro_batch in micro_batches]
        assert np.array_equal(torch.cat(parts).numpy(), blend.samples(np.arange(first_sample, first_sample + 8)))


@pytest.mark.parametrize(("global_batch_size", "nearest"), [(9, "8 or 12"), (3, "nearest: 4"), (0, "nearest: 4")])
def test_global_batch_that_does_not_divide(blend, global_batch_size, nearest):
    with pytest.raises(ConfigError, match=f"multiple of train.micro_batch_size 2 x dp 2; .*{nearest}$"):
        Loader(blend, 10, 2, global_batch_size, 0, 2)


@pytest.mark.parametrize(("num_samples", "dp_size"), [(7, 1), (7, 2), (7, 4), (1, 4), (8, 2), (100, 4)])
def test_evaluation_reads_each_sample_once_in_any_layout(prefix, num_samples, dp_size):
    blend = build_blend([(prefix, None)], 10, 1, 2000, shuffle=False)
    ranks = [evaluation_micro_batches(blend, num_samples, 2, dp_rank, dp_size) for dp_rank in range(dp_size)]
    assert len({len(micro_batches) for micro_batches in ranks}) == 1
    assert sum(map(target_count, ranks)) == 10 * num_samples
    seen = []
    for micro_batch in (micro_batch for micro_batches in ranks for micro_batch in micro_batches):
        assert micro_batch.tokens.shape == (10, 2)
        valid = micro_batch.loss_mask[0] == 1
        assert (micro_batch.loss_mask == valid).all()  # a sample counts whole or not at all
        assert micro_batch.tokens[:, ~valid].eq(0).all()
        seen += micro_batch.tokens[0, valid].tolist()
    assert sorted(seen) == list(range(0, 10 * num_samples, 10))


def test_prefetcher_gives_the_steps_of_the_loader(blend):
    loader = Loader(blend, 10, 2, 8, 1, 2)
    with Prefetcher(loader, 16, 16 + 3 * 8 + 7) as steps:
        found = list(steps)
        assert next(steps, None) is None
    assert len(found) == 3
    for step, micro_batches in enumerate(found):
        expected = loader.micro_batches(16 + 8 * step)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(micro_batches, expected, strict=True))


def test_prefetcher_reads_two_steps_ahead_and_no_further(blend):
    started, go_on = [], threading.Semaphore(0)
    loader = Loader(blend, 10, 2, 2, 0, 1)
    read = loader.micro_batches

    def spy(first_sample):
        started.append(first_sample)
        go_on.release()
        return read(first_sample)

    loader.micro_batches = spy
    with Prefetcher(loader, 0, 1000):
        assert go_on.acquire(timeout=10) and go_on.acquire(timeout=10)  # one waits in the queue, one in the thread's hand
        assert not go_on.acquire(timeout=0.3)
        assert started == [0, 2]


def test_error_of_the_thread_reaches_the_consumer(prefix):
    blend = build_blend([(prefix, None)], 10, 1, 2000, shuffle=False)
    blend.vocab_size = 155
    with Prefetcher(Loader(blend, 10, 1, 8, 0, 1), 0, 1000) as steps:
        next(steps)
        with pytest.raises(DataError, match="token id 155"):
            next(steps)
        with pytest.raises(StopIteration):
            next(steps)


def test_closing_ends_the_thread(blend):
    steps = Prefetcher(Loader(blend, 10, 2, 8, 0, 1), 0, 10**9)
    next(steps)
    steps.close()
    steps.close()
    assert not steps._thread.is_alive()
    assert list(steps) == []
