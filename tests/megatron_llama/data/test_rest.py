import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.data import samples
from megatron_llama.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_llama.data.rest import Rest, merge, subtract
from megatron_llama.data.samples import Cursor, Source

BLOCK, GROUP = 48, 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """1,000 tokens, token i is i: with small blocks, 20 full ones and a tail, in 7 groups."""
    prefix = tmp_path_factory.mktemp("rest") / "d"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(1000))
    return IndexedDataset(prefix)


@pytest.fixture(autouse=True, scope="module")
def small_groups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "BLOCK_TOKENS", BLOCK)
        patch.setattr(samples, "GROUP_BLOCKS", GROUP)
        yield


def covered(runs):
    return sorted(
        token for start, length in zip(*map(np.ndarray.tolist, runs), strict=True) for token in range(start, start + length)
    )


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 300), max_size=120), st.integers(1, 9), st.data())
def test_rest_holds_every_token_once(tokens, length, data):
    tokens = np.array(sorted(tokens), np.int64)
    runs = merge((tokens, np.ones_like(tokens)))
    assert covered(runs) == tokens.tolist()
    rest = Rest(runs, length, key=7)
    assert rest.num_samples == len(tokens) // length
    if not rest.num_samples:
        return
    count = data.draw(st.integers(0, rest.num_samples))
    drawn = rest.pieces(np.arange(rest.num_samples))
    assert len(set(covered(drawn))) == rest.num_samples * length and set(covered(drawn)) <= set(tokens.tolist())
    taken = rest.pieces(np.arange(count))
    assert covered(subtract(rest.runs, taken)) == sorted(set(tokens.tolist()) - set(covered(taken)))


def inputs(source, draws):
    """The input tokens of each draw; every piece is followed by its true next token as the target."""
    found = []
    for pieces in map(source.pieces, draws):
        assert sum(count for _, count in pieces) == source.sequence_length + 1
        last = len(pieces) - 1
        found.append([t for n, (start, count) in enumerate(pieces) for t in range(start, start + count - (n == last))])
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([3, 4, 6, 8, 12, 16, 24, 48]), st.integers(0, 60)), min_size=1, max_size=5))
def test_no_token_twice_in_an_epoch_however_the_length_changes(dataset, legs):
    """All lengths divide the blocks, so that what is left out is the remainder of a change and the end of the stream."""
    cursor, read, draws = Cursor(), [], 0
    for length, draws in [*legs, (4, 500)]:
        source = Source(dataset, length, 1, 0, cursor=cursor)
        read += inputs(source, range(draws))
        cursor = Cursor.from_state(json.loads(json.dumps(asdict(source.cursor_after(draws)))))
    assert cursor.tokens == sum(map(len, read))
    tokens = [token for sample in read for token in sample]
    left_out = sum(2 * length for length, _ in legs) + 4  # at a change, and at the end of the stream
    first_epoch = tokens[: 999 - left_out]
    assert len(set(first_epoch)) == len(first_epoch)


def test_growing_windows_are_whole_after_the_group(dataset):
    """At most one group is left in pieces; then windows of the new length follow."""
    before = Source(dataset, 8, 1, 0)
    after = Source(dataset, 24, 1, 0, cursor=before.cursor_after(7))
    pieces = [after.pieces(draw) for draw in range(40)]
    left_in_group = (GROUP * BLOCK - 7 * 8) // 24
    assert any(len(sample) > 1 for sample in pieces[:left_in_group])
    assert all(len(sample) == 1 for sample in pieces[left_in_group:])
    seen = [token for sample in inputs(before, range(7)) + inputs(after, range(left_in_group + 10)) for token in sample]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("draws", [0, 5, 17, 18, 100, 124, 125, 300])
def test_going_on_with_the_same_length_changes_nothing(dataset, draws):
    source = Source(dataset, 8, 1, 0)
    again = Source(dataset, 8, 1, 0, cursor=source.cursor_after(draws))
    assert all(again.pieces(draw) == source.pieces(draws + draw) for draw in range(50))
    assert again.cursor_after(30) == source.cursor_after(draws + 30)


def test_going_on_in_the_middle_of_a_rest(dataset):
    rest = Source(dataset, 24, 1, 0, cursor=Source(dataset, 8, 1, 0).cursor_after(7))
    again = Source(dataset, 24, 1, 0, cursor=rest.cursor_after(2))
    assert all(again.pieces(draw) == rest.pieces(draw + 2) for draw in range(30))
    assert again.cursor_after(20) == rest.cursor_after(22)


@pytest.mark.parametrize("length", [8, 7])
def test_an_epoch_of_many_groups_is_complete(dataset, length):
    source = Source(dataset, length, 1, 0)
    per_block = BLOCK // length
    assert source.num_windows == 20 * per_block + (999 - 20 * BLOCK) // length
    starts = [source.pieces(draw)[0][0] for draw in range(3 * source.num_windows)]
    epochs = np.array(starts).reshape(3, -1)
    expected = sorted(
        [48 * block + length * k for block in range(20) for k in range(per_block)]
        + [960 + length * k for k in range(39 // length)]
    )
    assert all(sorted(epoch) == expected for epoch in epochs.tolist())
    assert len({epoch.tobytes() for epoch in epochs}) == 3
    backwards = [source.pieces(draw)[0][0] for draw in reversed(range(30))]
    assert backwards == epochs[0][:30][::-1].tolist()
