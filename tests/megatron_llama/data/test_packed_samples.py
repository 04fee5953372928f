"""Packed samples as training reads them: sources, mixtures, ranks, restarts, other lengths, masks and padding."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.config import DataConfig, DataSource
from megatron_llama.data import packing
from megatron_llama.data.indexed import IndexedDatasetWriter
from megatron_llama.data.loader import Loader, target_count
from megatron_llama.data.training_data import open_training_data
from parallel.errors import ConfigError, DataError

DOCUMENTS = {"a": 120, "b": 70}  # in blocks of 50
FIRST_ID = {"a": 1, "b": 20_000}  # 0 is padding alone
VOCABULARY = 40_000


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_DOCUMENTS", 50)
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Name -> (prefix, ids that are targets): the ids of a source ascend from one document to the next."""
    folder, found = tmp_path_factory.mktemp("packed"), {}
    for name, documents in DOCUMENTS.items():
        lengths = np.random.default_rng(documents).integers(0, 70, documents)
        ids = FIRST_ID[name] + np.arange(lengths.sum())
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            writer.add_documents(ids, lengths)
        firsts = (np.cumsum(lengths) - lengths)[lengths > 0]
        found[name] = str(folder / name), sorted(set(ids.tolist()) - set(ids[firsts].tolist()))
    return found


def config(texts, entries, **fields):
    """`entries`: name -> (weight, max_epochs)."""
    sources = tuple(DataSource(texts[name][0], *entry) for name, entry in entries.items())
    return DataConfig(train=sources, **{"packing": "best_fit", **fields})


def begin(data, length, end=1000):
    return open_training_data(data, length, VOCABULARY, end)


def resume(run, data, sample, length, end=1000):
    """Opens `data` from the checkpoint that a run would have at `sample`."""
    return open_training_data(data, length, VOCABULARY, end, sample, json.loads(json.dumps(run.state(sample))))


def read(run, length, first, end, dp_size=1):
    """The micro-batches of one sample each of one global batch, as all ranks read them."""
    loaders = [Loader(run.blend, length, 1, end - first, rank, dp_size, document_mask=True) for rank in range(dp_size)]
    return [micro_batch for loader in loaders for micro_batch in loader.micro_batches(first)]


def targets(micro_batches):
    """The targets that count, in order; each has to follow its input in the text."""
    found = []
    for batch in micro_batches:
        counted = batch.loss_mask == 1
        assert torch.equal(batch.targets[counted], batch.tokens[counted] + 1)
        found += batch.targets[counted].tolist()
    return found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 60)), max_size=5), st.integers(1, 90))
def test_every_target_once_in_an_epoch_however_the_length_changes(texts, legs, last_length):
    """Nothing is left out either. Each leg begins from the checkpoint of the one before, some in the middle of a rest."""
    data = config(texts, {"a": (None,)})
    expected = np.array(texts["a"][1]) - FIRST_ID["a"]
    run, sample, found = None, 0, []
    for length, count in [*legs, (last_length, None)]:
        run = begin(data, length) if run is None else resume(run, data, sample, length)
        end = sample + (2 * run.blend.num_windows + 200 if count is None else count)
        pieces = [piece for pieces in run.blend.pieces(np.arange(sample, end)) for piece in pieces]
        found += [token for _, start, tokens in pieces for token in range(start + 1, start + tokens)]
        sample = end
    for epoch in range(2):
        assert sorted(found[epoch * len(expected) : (epoch + 1) * len(expected)]) == expected.tolist()


def test_masks_positions_and_padding_of_a_micro_batch(texts):
    run = begin(config(texts, {"a": (0.7,), "b": (0.3,)}), 64)
    batches = read(run, 64, 0, 40)
    assert target_count(batches) == sum(len(targets([batch])) for batch in batches)
    for sample, batch in enumerate(batches):
        (pieces,) = run.blend.pieces(np.array([sample]))
        tokens, positions, ids = batch.tokens[:, 0], batch.positions[:, 0], batch.documents.ids(64, 1)[0]
        begins = np.cumsum([0, *(piece.num_tokens for piece in pieces)]).tolist()
        for begin_, piece in zip(begins, pieces, strict=False):
            inside = slice(begin_, begin_ + piece.num_tokens)
            size = len(tokens[inside])  # the last token of a full sample is a target alone
            assert positions[inside].tolist() == list(range(size)) and (ids == ids[begin_]).sum() == size
            assert batch.loss_mask[inside, 0].tolist() == [1.0] * (piece.num_tokens - 1) + [0.0] * (size - piece.num_tokens + 1)
        padding = 64 - begins[-1]
        if padding > 0:
            assert not tokens[-padding:].any() and not batch.loss_mask[-padding:].any()
            assert positions[-padding:].tolist() == list(range(padding)) and (ids == ids[-1]).sum() == padding


def test_the_share_of_padding_is_what_training_reads(texts):
    run = begin(config(texts, {"a": (None,)}), 64)
    order = run.blend.sources[0].order
    rows = [torch.cat([b.tokens, b.targets[-1:]]) for b in read(run, 64, 0, order.num_samples)]
    share = torch.cat(rows).eq(0).double().mean().item()
    assert 0 < share == pytest.approx(order.padding)
    assert run.notes == [f"{texts['a'][0]}: packed into {order.num_samples} samples, {share:.3%} padding"]


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_any_number_of_ranks_reads_the_same_global_batches(texts, dp_size):
    """Also after a restart with another number of ranks, another mixture and another length."""
    first, second = config(texts, {"a": (0.7,), "b": (0.3,)}), config(texts, {"b": (0.5,), "a": (0.5,)})
    run = begin(first, 32)
    assert_equal(read(run, 32, 0, 24, dp_size), read(run, 32, 0, 24))
    again = resume(run, first, 24, 32)
    assert again.leg == run.leg
    assert_equal(read(again, 32, 24, 48, 8 // dp_size), read(run, 32, 24, 48))
    other = resume(again, second, 48, 48)
    text = [text for part in ((run, 32, 0, 48), (other, 48, 48, 64)) for text in targets(read(*part))]
    assert len(set(text)) == len(text)
    assert_equal(read(resume(other, second, 56, 48), 48, 56, 64, dp_size), read(other, 48, 56, 64))


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("tokens", "targets", "loss_mask", "positions"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.documents.cu_seqlens, theirs.documents.cu_seqlens)


def test_a_source_that_is_gone_and_comes_back_goes_on(texts):
    both, alone = config(texts, {"a": (0.5,), "b": (0.5,)}), config(texts, {"b": (1.0,)})
    run = begin(both, 32)
    rest = resume(run, alone, 20, 32)
    back = resume(rest, both, 30, 40)
    text = targets(read(run, 32, 0, 20)) + targets(read(rest, 32, 20, 30)) + targets(read(back, 40, 30, 50))
    assert len(set(text)) == len(text)
    assert [read for _, read in back.state(50)["tokens_read"]] == [10 * 32 + 10 * 40, 20 * 32 + 10 * 40]


def test_limits_on_epochs_count_samples(texts):
    data = config(texts, {"a": (0.5,), "b": (0.5, 1)})
    samples = begin(data, 64, 0).blend.sources[1].num_windows
    assert [row.epochs for row in begin(data, 64, 2 * samples).rows][1] == 1
    with pytest.raises(ConfigError, match="max_epochs"):
        begin(data, 64, 2 * samples + 4)
    run = begin(replace(data, on_cap="redistribute"), 64, 3 * samples)
    assert run.blend.draws_before(3 * samples) == [2 * samples, samples] and "packed into" in run.notes[-1]
    drawn = targets(read(run, 64, 0, 3 * samples))
    assert sorted(token for token in drawn if token >= FIRST_ID["b"]) == texts["b"][1]


def test_packing_is_not_switched_in_silence(texts):
    packed, windows = config(texts, {"a": (None,)}), config(texts, {"a": (None,)}, packing="none")
    for before, after in ((packed, windows), (windows, packed)):
        run = begin(before, 32)
        change = f"data.packing {before.packing} in the checkpoint, now {after.packing}"
        with pytest.raises(DataError, match=f"{change}; restore what it was, or set --data.allow_changed true"):
            resume(run, after, 10, 32)
        allowed = resume(run, replace(after, allow_changed=True), 10, 32)
        assert allowed.notes[0] == f"{change}: text may be read again" and allowed.blend.first_sample == 10


def test_a_source_without_text_to_pack(tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_documents(np.arange(3), np.array([1, 1, 1]))
    with pytest.raises(DataError, match="d.bin: found 3 documents, none of them with 2 tokens"):
        begin(DataConfig(train=(DataSource(str(tmp_path / "d")),), packing="best_fit"), 32)
