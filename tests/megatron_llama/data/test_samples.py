import numpy as np
import pytest

from megatron_llama.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_llama.data.samples import Source
from parallel.errors import DataError


def dataset_of(tmp_path, num_tokens, name="d"):
    """Token i is i; documents of 7 tokens."""
    with IndexedDatasetWriter(tmp_path / name, np.int32) as writer:
        for start in range(0, num_tokens, 7):
            writer.add_document(np.arange(start, min(start + 7, num_tokens)))
    return IndexedDataset(tmp_path / name)


def test_windows_overlap_by_one_token_and_cover_the_data(tmp_path):
    source = Source(dataset_of(tmp_path, 101), 10, seed=1, source_key=0)
    assert source.num_windows == 10
    windows = np.stack([source.sample(draw) for draw in range(10)])
    assert windows.shape == (10, 11) and windows.dtype == np.int64
    assert np.array_equal(windows[np.argsort(windows[:, 0])], np.arange(0, 100, 10)[:, None] + np.arange(11))


def starts(source, draws):
    """The first token of each draw."""
    return np.array([source.pieces(draw)[0][0] for draw in draws])


def test_last_window_needs_its_target(tmp_path):
    assert Source(dataset_of(tmp_path, 100), 10, 1, 0).num_windows == 9


def test_every_epoch_is_complete_and_its_own(tmp_path):
    source = Source(dataset_of(tmp_path, 1001), 10, seed=1, source_key=0)
    draws = (starts(source, np.arange(300)) // 10).reshape(3, 100)
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in draws)
    assert len({epoch.tobytes() for epoch in draws}) == 3
    assert (starts(source, np.array([0, 99, 100, 250])) // 10).tolist() == draws.reshape(-1)[[0, 99, 100, 250]].tolist()


def test_order_depends_on_seed_and_source_alone(tmp_path):
    first, second = dataset_of(tmp_path, 1001), dataset_of(tmp_path, 1001, "moved")
    order = starts(Source(first, 10, 1, 0), np.arange(100)).tolist()
    assert starts(Source(second, 10, 1, 0), np.arange(100)).tolist() == order
    assert starts(Source(first, 10, 2, 0), np.arange(100)).tolist() != order
    assert starts(Source(first, 10, 1, 1), np.arange(100)).tolist() != order


def test_sequential_order(tmp_path):
    source = Source(dataset_of(tmp_path, 51), 10, 1, 0, shuffle=False)
    assert (starts(source, np.arange(12)) // 10).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_too_little_text(tmp_path):
    with pytest.raises(DataError, match=r"d.bin: 10 tokens are too few for one sample of sequence_length \+ 1 = 11"):
        Source(dataset_of(tmp_path, 10), 10, 1, 0)
