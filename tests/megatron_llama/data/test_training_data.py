import json
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from megatron_llama.config import DataConfig, DataSource
from megatron_llama.data import samples, training_data
from megatron_llama.data.indexed import IndexedDatasetWriter
from megatron_llama.data.loader import Loader
from megatron_llama.data.training_data import open_training_data
from parallel.errors import ConfigError, DataError

SIZES = {"a": 401, "b": 201, "c": 101}  # 40, 20 and 10 windows of 10


def write(prefix, num_tokens, first):
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(first + np.arange(num_tokens))
    return str(prefix)


@pytest.fixture
def prefixes(tmp_path):
    """Token i of a is i, of b 1000 + i, of c 2000 + i."""
    return {name: write(tmp_path / name, size, 1000 * number) for number, (name, size) in enumerate(SIZES.items())}


def config(prefixes, entries, **fields):
    """`entries`: name -> weight, or (weight, max_epochs)."""
    given = {name: value if isinstance(value, tuple) else (value,) for name, value in entries.items()}
    return DataConfig(train=tuple(DataSource(prefixes[name], *value) for name, value in given.items()), **fields)


def resume(now, data, sample, length=10, end=1000):
    """Opens `data` from the checkpoint that a run would have at `sample`."""
    return open_training_data(data, length, 4000, end, sample, json.loads(json.dumps(now.state(sample))))


def starts(run, first, end):
    return run.blend.samples(np.arange(first, end))[:, 0].tolist()


def test_the_past_does_not_depend_on_the_end(prefixes):
    """Extending a run, and resuming it anywhere, never reshuffles."""
    data = config(prefixes, {"a": 0.7, "b": 0.3})
    short, long = (open_training_data(data, 10, 4000, end) for end in (40, 4000))
    assert starts(short, 0, 40) == starts(long, 0, 40)
    resumed = resume(short, data, 40, end=4000)
    assert starts(resumed, 40, 200) == starts(long, 40, 200) and resumed.notes == []
    assert resumed.state(150) == long.state(150)
    again = resume(resumed, data, 150)
    assert starts(again, 150, 300) == starts(long, 150, 300) and again.blend.first_sample == 0


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_any_number_of_ranks_reads_the_same_global_batches(prefixes, dp_size):
    """Also after a restart with another number of ranks and another batch size, in another leg."""
    first = config(prefixes, {"a": 0.7, "b": 0.3})
    second = config(prefixes, {"a": 0.5, "c": 0.5})

    def batches(run, sizes, position):
        found = []
        for batch_size, ranks in sizes:
            parts = [Loader(run.blend, 10, 1, batch_size, rank, ranks).micro_batches(position) for rank in range(ranks)]
            found += [micro_batch.tokens[0].item() for part in parts for micro_batch in part]
            position += batch_size
        return found, position

    run = open_training_data(first, 10, 4000, 1000)
    before, position = batches(run, [(8, dp_size)] * 3 + [(16, dp_size)] * 2, 0)
    assert before == starts(run, 0, 56) and position == 56
    other = resume(run, second, position)
    after, _ = batches(other, [(8, 8 // dp_size), (24, dp_size)], position)
    reference = resume(open_training_data(first, 10, 4000, 1000), second, 56)
    assert after == starts(reference, 56, 88)


def test_another_mixture_goes_on_where_each_source_stopped(prefixes):
    first = open_training_data(config(prefixes, {"a": 0.7, "b": 0.3}), 10, 4000, 1000)
    second = resume(first, config(prefixes, {"b": 0.5, "a": 0.25, "c": 0.25}), 20)
    assert any("joins the mixture" in note for note in second.notes) and "changes at sample 20" in second.notes[-1]
    seen = starts(first, 0, 20) + starts(second, 20, 46)
    by_source = [[token for token in seen if token // 1000 == number] for number in range(3)]
    assert all(len(set(tokens)) == len(tokens) for tokens in by_source)  # nobody is at the end of an epoch yet
    assert [len(tokens) for tokens in by_source] == [14 + 7, 6 + 13, 6]
    # In a leg of its own position, and away and back again: as if the source had been read without a break.
    third = resume(second, config(prefixes, {"a": 1.0}), 46)
    assert "b leaves the mixture after 190 tokens" in " ".join(third.notes)
    fourth = resume(third, config(prefixes, {"b": 1.0, "a": 1.0}), 56)
    alone = open_training_data(config(prefixes, {"a": 1.0, "b": 1.0}), 10, 4000, 1000)
    b = [token for token in starts(alone, 0, 200) if token // 1000 == 1]
    assert [token for token in starts(fourth, 56, 66) if token // 1000 == 1] == b[19:24]
    assert dict(fourth.state(66)["tokens_read"])[prefixes["a"]] == 10 * (14 + 7 + 10 + 5)


def test_a_mixture_that_rests_in_a_checkpoint_survives_several_legs(prefixes):
    run = open_training_data(config(prefixes, {"a": 1.0, "b": 1.0}), 10, 4000, 1000)
    for sample, names in ((10, "a"), (15, "ac"), (21, "c")):
        run = resume(run, config(prefixes, dict.fromkeys(names, 1.0)), sample)
    assert [source["prefix"] for source in run.state(21)["resting"]] == [prefixes["a"], prefixes["b"]]
    back = resume(run, config(prefixes, {"b": 1.0}), 25)
    alone = open_training_data(config(prefixes, {"a": 1.0, "b": 1.0}), 10, 4000, 1000)
    assert starts(back, 25, 35) == [token for token in starts(alone, 0, 50) if token // 1000 == 1][5:15]


def test_another_sequence_length_reads_no_token_twice(prefixes):
    data = config(prefixes, {"a": 0.5, "b": 0.5})
    short = open_training_data(data, 5, 4000, 1000)
    long = resume(short, data, 20, length=20)
    assert "changes from 5 to 20 at sample 20" in long.notes[-1]
    tokens = short.blend.samples(np.arange(20))[:, :-1].ravel().tolist()
    for number in range(20, 30):
        pieces = long.blend.pieces(np.array([number]))[0]
        assert sum(piece.num_tokens for piece in pieces) == 21
        tokens += long.blend.sample(number)[:-1].tolist()
    assert len(set(tokens)) == len(tokens) == 100 + 200
    assert [read for _, read in long.state(30)["tokens_read"]] == [150, 150]


def test_moved_and_reordered_datasets_are_recognised(prefixes, tmp_path):
    data = config(prefixes, {"a": 0.7, "b": 0.3})
    run = open_training_data(data, 10, 4000, 1000)
    for name in "ab":
        for suffix in (".bin", ".idx"):
            (tmp_path / f"{name}{suffix}").rename(tmp_path / f"moved-{name}{suffix}")
    moved = {name: str(tmp_path / f"moved-{name}") for name in "ab"}
    assert starts(resume(run, config(moved, {"a": 0.7, "b": 0.3}), 30), 30, 60) == starts(run, 30, 60)
    swapped = resume(run, config(moved, {"b": 0.3, "a": 0.7}), 30)
    seen = starts(run, 0, 30) + starts(swapped, 30, 50)
    assert len(set(seen)) == len(seen)


def test_a_changed_dataset_is_refused_or_read_anew(prefixes, tmp_path):
    data = config(prefixes, {"a": 0.7, "b": 0.3})
    run = open_training_data(data, 10, 4000, 1000)
    state = json.loads(json.dumps(run.state(20)))
    write(tmp_path / "b", 301, 3000)
    with pytest.raises(DataError, match="b: tokens 201 in the checkpoint, now 301, .*content_crc32.*--data.allow_changed true"):
        open_training_data(data, 10, 4000, 1000, 20, state)
    allowed = open_training_data(replace(data, allow_changed=True), 10, 4000, 1000, 20, state)
    assert "b: tokens 201 in the checkpoint, now 301" in allowed.notes[0] and "new source" in allowed.notes[0]
    seen = starts(run, 0, 20) + starts(allowed, 20, 50)
    assert len(set(seen)) == len(seen)  # a goes on
    with pytest.raises(DataError, match="data.seed 1234 in the checkpoint, now 7"):
        open_training_data(config(prefixes, {"a": 0.7, "c": 0.3}, seed=7), 10, 4000, 1000, 20, state)
    with pytest.raises(DataError, match="data.order megatron in the checkpoint, now windows"):
        open_training_data(data, 10, 4000, 1000, 20, {**state, "order": "megatron"})


def test_a_limit_on_epochs_is_an_error_with_the_table(prefixes):
    data = config(prefixes, {"a": (0.5, 4), "b": (0.5, 1.5)})
    assert not any(row.exceeds for row in open_training_data(data, 10, 4000, 60).rows)
    with pytest.raises(ConfigError, match="max_epochs; shorten it(.|\n)*b +50.00% +2.00 .*1.50 exceeded"):
        open_training_data(data, 10, 4000, 80)


def test_a_limit_without_weights_takes_exactly_an_epoch(prefixes):
    data = config(prefixes, {name: (None, 1) for name in SIZES})
    rows = open_training_data(data, 10, 4000, 70).rows
    assert [row.epochs for row in rows] == [1, 1, 1] and not any(row.exceeds for row in rows)
    with pytest.raises(ConfigError):
        open_training_data(data, 10, 4000, 78)


def test_redistribution_keeps_limits_and_proportions(prefixes):
    data = config(prefixes, {"a": 0.4, "b": (0.2, 1), "c": (0.4, 2)}, on_cap="redistribute")
    run = open_training_data(data, 10, 4000, 200)
    draws = run.blend.draws_before(200)
    assert draws == [160, 20, 20] and not any(row.exceeds for row in run.rows)
    assert any("as configured" in note for note in run.notes) and any("as read" in note for note in run.notes)
    resumed = resume(run, data, 100, end=200)
    assert starts(resumed, 100, 200) == starts(run, 100, 200) and resumed.blend.first_sample == 0
    longer = resume(run, data, 100, end=400)  # a new leg, with what room is left
    assert longer.blend.draws_before(400) == [280, 10, 10] and not any(row.exceeds for row in longer.rows)
    with pytest.raises(ConfigError, match="too few tokens within their max_epochs"):
        open_training_data(config(prefixes, {"a": (1, 1), "b": (1, 1)}, on_cap="redistribute"), 10, 4000, 100)


def test_a_full_source_is_not_read_any_more(prefixes):
    data = config(prefixes, {"a": 0.5, "b": (0.5, 1)})
    run = open_training_data(data, 10, 4000, 40)
    longer = resume(run, replace(data, on_cap="redistribute"), 40, end=100)
    assert longer.blend.weights[1] == 0 and longer.blend.draws_before(100) == [60, 0]
    assert starts(resume(longer, replace(data, on_cap="redistribute"), 70, end=100), 70, 100) == starts(longer, 70, 100)


def test_megatron_order_is_resumed_or_refused(prefixes):
    data = config(prefixes, {"a": 0.7, "b": 0.3}, order="megatron")
    run = open_training_data(data, 10, 4000, 100)
    assert "MB on each rank" in run.notes[0] and [row.tokens for row in run.rows] == [700, 300]
    same = resume(run, data, 30, end=100)
    assert starts(same, 30, 100) == starts(run, 30, 100) and same.state(30) == run.state(30)
    with pytest.raises(DataError, match="a: 2 epochs shuffled together in the checkpoint's run, now 13"):
        resume(run, data, 30, end=700)
    with pytest.raises(DataError, match="data.order megatron in the checkpoint, now windows"):
        resume(run, replace(data, order="windows"), 30)
    windows = resume(run, replace(data, order="windows", allow_changed=True), 30)
    assert windows.blend.first_sample == 30 and len(starts(windows, 30, 60)) == 30
    for changed in (
        replace(data, seed=5),
        replace(data, megatron_split="9,1"),
        config(prefixes, {"a": 1, "c": 1}, order="megatron"),
    ):
        with pytest.raises(DataError, match="in the checkpoint, now"):
            resume(run, changed, 30, end=100)
    with pytest.raises(ConfigError, match="megatron cannot redistribute"):
        open_training_data(config(prefixes, {"a": (1, 1)}, order="megatron"), 10, 4000, 100)


class Corpus:
    """A dataset of a size alone."""

    bin_path = dtype = prefix = "corpus"

    def __init__(self, prefix):
        self.num_tokens = int(float(prefix))

    def fingerprint(self):
        return {"tokens": self.num_tokens}


def test_a_corpus_of_the_size_of_llamas_starts_in_no_memory(monkeypatch):
    monkeypatch.setattr(training_data, "IndexedDataset", Corpus)
    monkeypatch.setattr(training_data, "check_token_ids", lambda dataset, vocab_size: None)
    billions = (852.7, 198.1, 98.4, 25.7, 28.3, 33.0, 27.2)
    weights = (67, 15, 4.5, 4.5, 4.5, 2.5, 2)
    data = DataConfig(train=tuple(DataSource(f"{1e9 * size}", weight) for size, weight in zip(billions, weights, strict=True)))
    batch = 2048
    end = -(-int(1.4e12) // (2048 * batch)) * batch
    tracemalloc.start()
    run = open_training_data(data, 2048, 32000, end)
    pieces = run.blend.pieces(np.arange(end - batch, end))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert [round(row.epochs, 2) for row in run.rows] == [1.10, 1.06, 0.64, 2.45, 2.23, 1.06, 1.03]
    assert len({tuple(sample) for sample in pieces}) == batch
    started = time.perf_counter()
    state = run.state(end // 2)
    open_training_data(data, 2048, 32000, end, end // 2, state)
    print(f"resumed in {time.perf_counter() - started:.3f} s, {peak / 1e6:.1f} MB at the start")
    # Another length has to look at one group of each source, at most 2^30 tokens.
    tracemalloc.start()
    longer = open_training_data(data, 8192, 32000, end, end // 2, state)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert {source.sequence_length for source in longer.blend.sources} == {8192}


def test_windows_that_are_too_long(prefixes):
    with pytest.raises(ConfigError, match="train.sequence_length = .* is too large"):
        open_training_data(config(prefixes, {"a": 1.0}), samples.BLOCK_TOKENS + 1, 4000, 10)
