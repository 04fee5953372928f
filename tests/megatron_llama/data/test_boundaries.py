"""Document boundaries inside samples, from the index to positions and cu_seqlens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_llama.data.blend import build_blend
from megatron_llama.data.boundaries import PADDING_MULTIPLE, boundaries, document_starts
from megatron_llama.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_llama.data.loader import Loader, evaluation_micro_batches

LENGTHS = [5, 1, 0, 30, 8, 3, 3, 50, 2, 40]  # an empty document too
SEQUENCE_LENGTH = 16


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Token i of the stream is document number * 100 + its position in it, so a token tells where it stands."""
    prefix = str(tmp_path / "data")
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for number, length in enumerate(LENGTHS):
            writer.add_document(np.arange(length) + 100 * number)
    return prefix


def test_sequence_starts_within_any_window_are_those_of_a_scan(prefix: str) -> None:
    dataset = IndexedDataset(prefix)
    stream = dataset.read(0, dataset.num_tokens)
    first_tokens = np.flatnonzero(stream % 100 == 0)
    for start in range(dataset.num_tokens):
        for count in (1, 7, 40):
            count = min(count, dataset.num_tokens - start)
            inside = first_tokens[(first_tokens >= start) & (first_tokens < start + count)] - start
            assert np.array_equal(np.unique(dataset.starts_within(start, count)), inside)


@pytest.mark.parametrize("shuffle", [True, False])
def test_positions_and_documents_of_a_batch_are_what_its_tokens_say(prefix: str, shuffle: bool) -> None:
    blend = build_blend([(prefix, None)], SEQUENCE_LENGTH, 7, 1000, shuffle=shuffle)
    loader = Loader(blend, SEQUENCE_LENGTH, 2, 8, 0, 1, document_mask=True)
    for batch in loader.micro_batches(0):
        check_batch(batch)


def check_batch(batch) -> None:
    tokens, positions = batch.tokens.T, batch.positions.T  # [b, s]
    ids = batch.documents.ids(SEQUENCE_LENGTH, len(tokens))
    longest = 0
    for sample in range(len(tokens)):
        numbers = tokens[sample] // 100
        same = numbers[:, None] == numbers[None, :]
        assert torch.equal(ids[sample][:, None] == ids[sample][None, :], same)
        for number in numbers.unique():
            inside = positions[sample][numbers == number]
            assert inside.tolist() == list(range(len(inside)))
            longest = max(longest, len(inside))
    assert batch.documents.max_length == longest
    assert len(batch.documents.cu_seqlens) % PADDING_MULTIPLE == 0 and batch.documents.cu_seqlens.dtype == torch.int32
    assert len(ids.unique()) == sum(len((row // 100).unique()) for row in tokens)


def test_evaluation_pads_with_samples_of_one_document(prefix: str) -> None:
    blend = build_blend([(prefix, None)], SEQUENCE_LENGTH, 7, 1000, shuffle=False)
    (batch,) = evaluation_micro_batches(blend, 1, 2, 0, 1, document_mask=True)
    assert batch.documents.lengths(SEQUENCE_LENGTH, 2)[1] == [SEQUENCE_LENGTH] and batch.loss_mask[:, 1].sum() == 0


def test_starts_are_inside_the_sample(prefix: str) -> None:
    blend = build_blend([(prefix, None)], SEQUENCE_LENGTH, 7, 1000, shuffle=False)
    for inside in document_starts(blend, blend.pieces(np.arange(blend.num_windows))):
        assert ((inside > 0) & (inside < SEQUENCE_LENGTH)).all() and (np.diff(inside) > 0).all()


def test_boundaries_of_two_samples() -> None:
    positions, documents = boundaries([np.array([2, 5]), np.array([], np.int64)], 6)
    assert positions.T.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert documents.cu_seqlens.tolist() == [0, 2, 5, 6] + [12] * (PADDING_MULTIPLE - 4) and documents.max_length == 6
