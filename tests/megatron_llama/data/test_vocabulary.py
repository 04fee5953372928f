import json

import numpy as np
import pytest

from megatron_llama.data import vocabulary
from megatron_llama.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_llama.data.vocabulary import check_token_ids, read_sidecar
from parallel.errors import DataError


def dataset_of(tmp_path, tokens, sidecar=None, dtype=np.uint16):
    with IndexedDatasetWriter(tmp_path / "d", dtype) as writer:
        writer.add_document(tokens)
        writer.finish(sidecar)
    return IndexedDataset(tmp_path / "d")


def test_scan_finds_the_first_id(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "BLOCK_TOKENS", 8)
    dataset = dataset_of(tmp_path, [1] * 30 + [9, 12, 11])
    check_token_ids(dataset, 13)
    with pytest.raises(DataError, match="d.bin: token id 12 at position 31 is outside the vocabulary of 11"):
        check_token_ids(dataset, 11)


def test_negative_ids(tmp_path):
    with pytest.raises(DataError, match="token id -5 at position 1"):
        check_token_ids(dataset_of(tmp_path, [1, -5], dtype=np.int32), 100)


def test_sidecar_spares_the_scan(tmp_path, monkeypatch):
    dataset = dataset_of(tmp_path, [1, 2, 3], {"tokens": 3, "max_token_id": 3})
    monkeypatch.setattr(IndexedDataset, "read_raw", None)  # any read fails
    check_token_ids(dataset, 4)


def test_sidecar_that_says_too_much_leads_to_the_id(tmp_path):
    dataset = dataset_of(tmp_path, [1, 2, 3], {"tokens": 3, "max_token_id": 3})
    with pytest.raises(DataError, match="token id 3 at position 2"):
        check_token_ids(dataset, 3)


def test_sidecar_of_other_tokens_is_not_trusted(tmp_path):
    dataset = dataset_of(tmp_path, [1, 2, 3], {"tokens": 4, "max_token_id": 2})
    with pytest.raises(DataError, match="token id 3 at position 2"):
        check_token_ids(dataset, 3)


def test_of_a_large_file_the_ends_are_scanned(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "WHOLE_SCAN_BYTES", 100)
    monkeypatch.setattr(vocabulary, "END_SCAN_BYTES", 20)
    for position, found in ((9, True), (10, False), (89, False), (90, True)):
        tokens = np.ones(100, int)
        tokens[position] = 50
        dataset = dataset_of(tmp_path, tokens)
        if found:
            with pytest.raises(DataError, match=f"token id 50 at position {position} "):
                check_token_ids(dataset, 50)
        else:
            check_token_ids(dataset, 50)


def test_a_dtype_that_holds_no_larger_id_needs_no_scan(tmp_path, monkeypatch):
    dataset = dataset_of(tmp_path, [65535])
    monkeypatch.setattr(IndexedDataset, "read_raw", None)
    check_token_ids(dataset, 65536)


@pytest.mark.parametrize("content", ["{", json.dumps([1])])
def test_broken_sidecar_is_named(tmp_path, content):
    dataset = dataset_of(tmp_path, [1])
    assert read_sidecar(dataset.prefix) is None
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(DataError, match="d.json: .*write it again or remove it"):
        check_token_ids(dataset, 10)
