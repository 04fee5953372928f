import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_llama.data import indexed
from megatron_llama.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_llama.data.merge import merge_datasets
from megatron_llama.data.preprocess import Settings, preprocess
from megatron_llama.data.tokenizer_training import train_tokenizer
from megatron_llama.data.verify import verify_ids, verify_text
from parallel.errors import DataError

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
DOCUMENTS = ["first", "", *(TEXT[i : i + 300] for i in range(0, 9000, 300)), ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([TEXT], tmp_path_factory.mktemp("tokenizer") / "t", 700, 10**6, 1)[0]


def make(tokenizer, directory, name, documents, **options):
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    keep = {"keep_parts": options.pop("keep_parts", False)}
    preprocess(
        [path], directory / name, Settings(str(tokenizer.path), **{"append_eos": True, **options}), piece_bytes=1500, **keep
    )
    return str(directory / name)


@pytest.mark.parametrize("link", [False, True])
def test_merged_equals_one_run(tokenizer, tmp_path, monkeypatch, link):
    monkeypatch.setattr(indexed, "BLOCK_ENTRIES", 7)
    monkeypatch.setattr("megatron_llama.data.merge.BLOCK_ENTRIES", 7)
    names = [make(tokenizer, tmp_path, f"p{n}", DOCUMENTS[n * 11 : n * 11 + 11], keep_parts=n == 1) for n in range(3)]
    whole = make(tokenizer, tmp_path, "whole", DOCUMENTS)
    moved = []
    merge_datasets(names, tmp_path / "out" / "all", link, moved.append)
    for suffix in (".idx", ".json", *([] if link else [".bin"])):
        assert Path(f"{tmp_path}/out/all{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()
    ours, other = IndexedDataset(tmp_path / "out" / "all"), IndexedDataset(whole)
    assert np.array_equal(ours.read(0, ours.num_tokens), other.read(0, other.num_tokens))
    assert sum(moved) == (0 if link else other.num_tokens * 2)
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".idx", ".json", ".parts"] if link else True


def test_merging_what_does_not_fit(tokenizer, tmp_path):
    first = make(tokenizer, tmp_path, "a", ["x"])
    with_bos = make(tokenizer, tmp_path, "b", ["y"], append_bos=True)
    with pytest.raises(DataError, match="b: append_bos is True, that of .*a False: datasets that were made differently"):
        merge_datasets([first, with_bos], tmp_path / "all")
    with pytest.raises(DataError, match="a: is one of the datasets"):
        merge_datasets([first, first], tmp_path / "a")
    with IndexedDatasetWriter(tmp_path / "c", np.int32) as writer:
        writer.add_document([1])
    with pytest.raises(DataError, match="c: holds int32, .*a uint16"):
        merge_datasets([first, str(tmp_path / "c")], tmp_path / "all")
    assert not list(tmp_path.glob("all*"))


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 7, 8])
def test_all_dtypes_of_megatron_are_read(tmp_path, code):
    dtype = np.dtype(indexed.DTYPES[code])
    with IndexedDatasetWriter(tmp_path / "d", dtype) as writer:
        writer.add_document(np.array([1, 100, 7], dtype))
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.dtype == dtype and dataset.read_raw(0, 3).dtype == dtype
    assert dataset.read(0, 3).tolist() == [1, 100, 7] and dataset.read(0, 3).dtype == np.int64
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDataset(str(tmp_path / "d"))
    assert theirs[0].tolist() == [1, 100, 7]


def verify(tokenizer, prefix, inputs, samples=1000):
    dataset = IndexedDataset(prefix)
    verify_ids(dataset, tokenizer.vocab_size, lambda tokens: None)
    return verify_text(dataset, tokenizer, inputs, "text", "files", samples, 0)


def test_verify(tokenizer, tmp_path):
    prefix = make(tokenizer, tmp_path, "a", DOCUMENTS)
    assert verify(tokenizer, prefix, [f"{prefix}.jsonl"]) == len(DOCUMENTS)
    assert verify(tokenizer, prefix, [f"{prefix}.jsonl"], 5) == 5
    (tmp_path / "long.txt").write_text(TEXT * 12, encoding="utf-8")
    preprocess([tmp_path / "long.txt"], tmp_path / "long", Settings(str(tokenizer.path), append_bos=True))
    assert verify(tokenizer, tmp_path / "long", [tmp_path / "long.txt"]) == 1
    (tmp_path / "long.json").unlink()  # as a dataset made elsewhere
    assert verify(tokenizer, tmp_path / "long", [tmp_path / "long.txt"]) == 1


def test_verify_both_parts_of_a_split(tokenizer, tmp_path):
    prefix = make(tokenizer, tmp_path, "a", DOCUMENTS, valid_fraction=0.3)
    numbers = [verify(tokenizer, part, [f"{prefix}.jsonl"]) for part in (prefix, f"{prefix}-valid")]
    assert sum(numbers) == len(DOCUMENTS) and min(numbers) > 0


def test_verify_finds_what_is_wrong(tokenizer, tmp_path):
    prefix = make(tokenizer, tmp_path, "a", DOCUMENTS)
    text = Path(f"{prefix}.jsonl").read_text()
    for changed, message in (
        (text.replace("first", "First"), "a: document 0 \\('First'...\\) differs from its text from token [0-9] on"),
        (text[: len(text) // 2].rpartition("\n")[0], "has 33 documents, the text only"),
    ):
        Path(f"{prefix}.jsonl").write_text(changed)
        with pytest.raises(DataError, match=message):
            verify(tokenizer, prefix, [f"{prefix}.jsonl"])
    other = train_tokenizer([TEXT], tmp_path / "other", 650, 10**6, 1)[0]
    with pytest.raises(DataError, match="outside the vocabulary of 650"):
        verify(other, prefix, [])
    with pytest.raises(DataError, match="was made with another tokenizer"):
        verify_text(IndexedDataset(prefix), other, [f"{prefix}.jsonl"], "text", "files", 5, 0)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[-4:-2] = os.urandom(1) + b"\xff"
    Path(f"{prefix}.bin").write_bytes(content)
    with pytest.raises(DataError, match="outside the vocabulary of 700"):
        verify(tokenizer, prefix, [])
