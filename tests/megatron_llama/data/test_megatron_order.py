"""Against megatron-core's own GPTDataset and BlendedDataset, bit for bit."""

import warnings

import numpy as np
import pytest
import torch.distributed as dist

from megatron_llama.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_llama.data.megatron_order import MegatronBlend, MegatronSamples
from parallel.errors import ConfigError, DataError

LENGTH = 16


class Tokenizer:
    """All that GPTDataset asks of one."""

    vocab_size, eod, pad = 1000, 2, -1
    unique_identifiers = {"class": "Tokenizer"}


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    for number, (name, documents) in enumerate((("a", 101), ("b", 57), ("c", 30))):
        random = np.random.default_rng(number)
        with IndexedDatasetWriter(folder / name, np.int32 if name == "b" else np.uint16) as writer:
            for _ in range(documents):
                writer.add_document(random.integers(3, 1000, random.integers(1, 40)))
    return {name: str(folder / name) for name in "abc"}


@pytest.fixture(scope="module")
def build(prefixes, tmp_path_factory):
    """A training dataset as Megatron builds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")
        builder = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_builder")
    cache = tmp_path_factory.mktemp("cache")

    def build(blend, num_samples, split="1,0,0"):
        config = gpt_dataset.GPTDatasetConfig(
            random_seed=1234, sequence_length=LENGTH, tokenizer=Tokenizer(), reset_position_ids=False,
            reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, path_to_cache=str(cache),
            blend=blend, split=split,
        )  # fmt: skip
        sizes = [num_samples, 0, 0]
        return builder.BlendedMegatronDatasetBuilder(gpt_dataset.GPTDataset, sizes, lambda: True, config).build()[0]

    # BlendedDataset asks for its rank where it has a cache, so even one process needs a group.
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield build
    if started:
        dist.destroy_process_group()


def tokens_of(dataset, numbers):
    items = [dataset[number] for number in numbers]
    assert all((item["tokens"][1:] == item["labels"][:-1]).all() for item in items)
    return np.array([[*item["tokens"].tolist(), item["labels"][-1].item()] for item in items])


@pytest.mark.parametrize("split", ["1", "948,31,21", "90,5,5"])
@pytest.mark.parametrize("num_samples", [20, 100, 126, 150, 230, 250, 300, 1000])
def test_one_dataset(build, prefixes, num_samples, split):
    """Fewer samples than an epoch, and several: with the last epoch apart and not."""
    theirs = build(([prefixes["a"]], None), num_samples, split if "," in split else "1,0,0")
    ours = MegatronBlend([(IndexedDataset(prefixes["a"]), None)], LENGTH, num_samples, 1234, split=split)
    (samples,) = ours.sources
    for name in ("document_index", "sample_index", "shuffle_index"):
        mine, reference = getattr(samples, name), getattr(theirs, name)
        assert mine.dtype == reference.dtype and np.array_equal(mine, reference), name
    assert len(samples) == len(theirs) >= num_samples
    assert np.array_equal(ours.samples(np.arange(num_samples)), tokens_of(theirs, range(num_samples)))


def test_both_kinds_of_last_epoch_are_among_the_cases(prefixes):
    dataset = IndexedDataset(prefixes["a"])
    kinds = {MegatronSamples(dataset, LENGTH, n, 1, 101).separate_last_epoch for n in (150, 230, 250, 300)}
    assert kinds == {False, True}


@pytest.mark.parametrize(
    "weights", [(0.3, 0.7, None), (0.67, 0.045, 0.285), (1, 1, 1), (4.5, 4.5, 2.5), (0.123, 0.456, 0.421), (5, None, None)]
)
def test_a_weighted_blend(build, prefixes, weights):
    entries = [(name, weight) for name, weight in zip("abc", weights, strict=True) if weight is not None]
    num_samples = 777
    theirs = build(([prefixes[name] for name, _ in entries], [weight for _, weight in entries]), num_samples)
    ours = MegatronBlend([(IndexedDataset(prefixes[name]), weight) for name, weight in entries], LENGTH, num_samples, 1234)
    assert np.array_equal(ours.dataset_index, theirs.dataset_index) and ours.dataset_index.dtype == theirs.dataset_index.dtype
    assert np.array_equal(ours.dataset_sample_index, theirs.dataset_sample_index)
    numbers = np.arange(num_samples)
    assert np.array_equal(ours.samples(numbers), tokens_of(theirs, numbers))
    assert ours.tokens_read(700) == [16 * int((theirs.dataset_index[:700] == n).sum()) for n in range(len(entries))]
    assert any(len(pieces) > 1 for pieces in ours.pieces(numbers))


def test_a_blend_by_size(build, prefixes):
    names = list("abc")
    theirs = build(([prefixes[name] for name in names], None), 150)
    entries = [(IndexedDataset(prefixes[name]), None) for name in names]
    ours = MegatronBlend(entries, LENGTH, 150, 1234)
    assert np.array_equal(ours.dataset_index, theirs.dataset_index)
    assert np.array_equal(ours.samples(np.arange(150)), tokens_of(theirs, range(150)))
    with pytest.raises(ConfigError, match="reads 5000 samples, but one epoch of the datasets has"):
        MegatronBlend(entries, LENGTH, 5000, 1234)


def test_memory_is_what_the_arrays_hold(prefixes):
    ours = MegatronBlend([(IndexedDataset(prefixes["a"]), 1.0)], LENGTH, 500, 1234)
    (source,) = ours.sources
    assert ours.index_bytes == 4 * 101 * source.num_epochs + 8 * (len(source) + 1) + 4 * len(source) + 10 * 500


def test_what_cannot_be(prefixes):
    dataset = IndexedDataset(prefixes["c"])
    with pytest.raises(DataError, match="too few for one sample of train.sequence_length"):
        MegatronBlend([(dataset, None)], 10_000, 5, 1)
    for split in ("a,b", "0,1", ""):
        with pytest.raises(ConfigError, match="data.megatron_split = .* is not a split"):
            MegatronBlend([(dataset, None)], LENGTH, 5, 1, split=split)
