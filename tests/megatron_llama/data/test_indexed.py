import filecmp
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.data import indexed, token_files
from megatron_llama.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from parallel.errors import DataError

DOCUMENTS = [[5, 6, 7], [], [8], [], [], list(range(3, 300)), []]


def write(prefix, documents=DOCUMENTS, dtype=np.uint16):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def write_with_megatron(prefix, documents, dtype):
    builder = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("block", [2, 1 << 20])
def test_bytes_equal_those_of_megatron(tmp_path, monkeypatch, dtype, block):
    monkeypatch.setattr(indexed, "BLOCK_ENTRIES", block)
    random = np.random.default_rng(0)
    documents = [random.integers(0, 60000, random.integers(0, 40)).tolist() for _ in range(50)] + DOCUMENTS
    write_with_megatron(tmp_path / "theirs", documents, dtype)
    write(tmp_path / "ours", documents, dtype)
    for suffix in (".bin", ".idx"):
        assert filecmp.cmp(f"{tmp_path}/ours{suffix}", f"{tmp_path}/theirs{suffix}", shallow=False)
    dataset = IndexedDataset(tmp_path / "theirs")
    assert [dataset.document(number).tolist() for number in range(len(documents))] == documents


def test_megatron_reads_ours(tmp_path):
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "ours")
    dataset = theirs.IndexedDataset(str(tmp_path / "ours"))
    assert [sequence.tolist() for sequence in dataset[0:3]] == [document for document in DOCUMENTS if document]
    assert dataset.document_indices.tolist() == [0, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("vocab_size", [65499, 65500, 128256])
def test_dtype_is_that_of_megatron(vocab_size):
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    assert best_dtype(vocab_size) == theirs.DType.optimal_dtype(vocab_size)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=12), st.data())
def test_round_trip(tmp_path_factory, documents, data):
    dataset = IndexedDataset(write(tmp_path_factory.mktemp("data") / "d.v1", documents))  # a dot in the prefix
    stream = [token for document in documents for token in document]
    assert (dataset.num_tokens, dataset.num_documents) == (len(stream), len(documents))
    assert dataset.num_sequences == sum(map(bool, documents)) and dataset.dtype == np.uint16
    assert [dataset.document(number).tolist() for number in range(len(documents))] == documents
    start = data.draw(st.integers(0, len(stream)))
    count = data.draw(st.integers(0, len(stream) - start))
    tokens = dataset.read(start, count)
    assert tokens.dtype == np.int64 and tokens.tolist() == stream[start : start + count]


def test_documents_in_parts(tmp_path):
    write(tmp_path / "whole", [[1, 2, 3, 4], [5], [6, 7]])
    with IndexedDatasetWriter(tmp_path / "parts", np.uint16) as writer:
        writer.add_documents([1, 2], np.array([2]), ends=False)
        writer.add_documents([], np.array([0]), ends=False)
        writer.add_documents([3, 4, 5, 6], np.array([2, 1, 1]), ends=False)
        writer.add_documents([7], np.array([1]))
    for suffix in (".bin", ".idx"):
        assert filecmp.cmp(f"{tmp_path}/whole{suffix}", f"{tmp_path}/parts{suffix}", shallow=False)


def test_the_document_of_each_token(tmp_path):
    lengths = [0, 3, 1, 0, 0, 4, 2, 0]
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        for length in lengths:
            writer.add_document([7] * length)
    dataset = IndexedDataset(tmp_path / "d")
    starts = np.cumsum([0, *lengths])
    expected = [(number, starts[number], length) for number, length in enumerate(lengths) for _ in range(length)]
    assert [dataset.document_at(token) for token in range(10)] == expected


def test_looking_for_documents_copies_no_index(tmp_path):
    """Its integers are not aligned, and numpy aligns an array by copying it: gigabytes for each sample of a large dataset."""
    documents = 200_000
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_documents(np.zeros(2 * documents, np.uint16), np.full(documents, 2))
    dataset = IndexedDataset(tmp_path / "d")
    tracemalloc.start()
    try:
        assert dataset.starts_within(100_001, 5).tolist() == [1, 3]
        assert dataset.document_at(100_001) == (50_000, 100_000, 2)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < documents  # the positions alone take 8 bytes a document


def test_no_document_at_all(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "none", []))
    assert (dataset.num_tokens, dataset.num_documents, dataset.num_sequences) == (0, 0, 0)
    dataset.fingerprint()


def test_an_error_leaves_nothing_and_keeps_the_old_dataset(tmp_path):
    write(tmp_path / "d", [[1, 2]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError), IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([3] * 100000)
        assert any(path.name.endswith(".partial") for path in tmp_path.iterdir())
        raise ZeroDivisionError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_appear_together_and_the_index_last(tmp_path, monkeypatch):
    write(tmp_path / "d", [[1, 2]])
    seen, replace = [], os.replace

    def spy(source, target):
        seen.append((Path(target).name, (tmp_path / "d.idx").exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([7])
        assert IndexedDataset(tmp_path / "d").num_tokens == 2  # the old one, until all is done
        writer.finish({"tokens": 1})
    assert seen == [("d.bin", False), ("d.json", False), ("d.idx", False)]  # never an index beside files of another run
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx", "d.json"]


def test_a_sidecar_of_an_older_dataset_is_removed(tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([1])
        writer.finish({"tokens": 1})
    write(tmp_path / "d", [[1, 2]])
    assert not (tmp_path / "d.json").exists()


@pytest.mark.parametrize(("dtype", "token"), [(np.uint16, 65536), (np.uint16, -1), (np.int32, 2**31)])
def test_ids_that_do_not_fit_are_refused(tmp_path, dtype, token):
    with pytest.raises(DataError, match=f"token id {token} does not fit"):
        write(tmp_path / "d", [[1, token]], dtype)
    assert not list(tmp_path.iterdir())


def test_a_document_too_long_for_the_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MAX_SEQUENCE_TOKENS", 10)
    with pytest.raises(DataError, match="more than 10 tokens"), IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_documents([1] * 6, np.array([6]), ends=False)
        writer.add_documents([1] * 6, np.array([6]), ends=False)


def patch(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


# offsets in the index of DOCUMENTS: header 34, then S = 3 lengths, 3 positions, D = 8 document entries
LENGTHS, POSITIONS, ENTRIES = 34, 34 + 12, 34 + 12 + 24
DAMAGE = {
    "magic": (lambda p: patch(f"{p}.idx", 0, b"X"), ".idx", "begins with"),
    "version": (lambda p: patch(f"{p}.idx", 9, struct.pack("<Q", 2)), ".idx", "version 2"),
    "dtype": (lambda p: patch(f"{p}.idx", 17, b"\x09"), ".idx", "dtype code 9"),
    "float": (lambda p: patch(f"{p}.idx", 17, b"\x07"), ".idx", "sequence 1 is said to begin at byte 6"),
    "other dtype": (lambda p: patch(f"{p}.idx", 17, b"\x04"), ".idx", "sequence 1 is said to begin at byte 6"),
    "sequences": (lambda p: patch(f"{p}.idx", 18, struct.pack("<Q", 2**63)), ".idx", "announces 9223372036854775808"),
    "no entries": (lambda p: patch(f"{p}.idx", 26, struct.pack("<Q", 0)), ".idx", "0 document entries"),
    "header only": (lambda p: os.truncate(f"{p}.idx", 20), ".idx", "found 20 bytes"),
    "empty": (lambda p: os.truncate(f"{p}.idx", 0), ".idx", "found 0 bytes"),
    "truncated": (lambda p: os.truncate(f"{p}.idx", 133), ".idx", "found 133 bytes"),
    "negative": (lambda p: patch(f"{p}.idx", LENGTHS + 4, struct.pack("<i", -1)), ".idx", "sequence 1 has the negative length"),
    "length": (lambda p: patch(f"{p}.idx", LENGTHS, struct.pack("<i", 4)), ".idx", "sequence 1 is said to begin at byte 6"),
    "last length": (lambda p: patch(f"{p}.idx", LENGTHS + 8, struct.pack("<i", 298)), ".bin", "found 602 bytes"),
    "position": (lambda p: patch(f"{p}.idx", POSITIONS + 16, struct.pack("<q", 1 << 40)), ".idx", "sequence 2 is said"),
    "first position": (lambda p: patch(f"{p}.idx", POSITIONS, struct.pack("<q", 2)), ".idx", "sequence 0 is said to begin"),
    "first document": (lambda p: patch(f"{p}.idx", ENTRIES, struct.pack("<q", 1)), ".idx", "from sequence 1 to 3"),
    "last document": (lambda p: patch(f"{p}.idx", ENTRIES + 56, struct.pack("<q", 4)), ".idx", "from sequence 0 to 4"),
    "documents": (lambda p: patch(f"{p}.idx", ENTRIES + 16, struct.pack("<q", 3)), ".idx", "document 2 ends before"),
    "bin truncated": (lambda p: os.truncate(f"{p}.bin", 601), ".bin", "found 601 bytes"),
    "bin of another": (lambda p: os.truncate(f"{p}.bin", 604), ".bin", "of another index"),
    "no bin": (lambda p: os.remove(f"{p}.bin"), ".bin", "No such file"),
    "no index": (lambda p: os.remove(f"{p}.idx"), ".idx", "No such file"),
}


@pytest.mark.parametrize("block", [2, 1 << 20])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(indexed, "BLOCK_ENTRIES", block)
    prefix = write(tmp_path / "d")
    IndexedDataset(prefix)
    damage, file, message = DAMAGE[name]
    damage(prefix)
    with pytest.raises(DataError) as error:
        IndexedDataset(prefix)
    assert str(error.value).startswith(f"{prefix}{file}: ") and message in str(error.value)


def test_multimodal_modes(tmp_path):
    prefix = write(tmp_path / "d")
    content = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(content + b"\0\0\0")  # modes of text
    assert IndexedDataset(prefix).num_sequences == 3
    Path(f"{prefix}.idx").write_bytes(content + b"\0\1\0")
    with pytest.raises(DataError, match="multimodal"):
        IndexedDataset(prefix)


def test_hints_for_a_wrong_prefix(tmp_path):
    write(tmp_path / "corpus_text_document")
    with pytest.raises(DataError, match="prefixes there: corpus_text_document"):
        IndexedDataset(tmp_path / "corpus")
    with pytest.raises(DataError, match="give the prefix without .idx"):
        IndexedDataset(f"{tmp_path}/corpus_text_document.idx")


def test_a_file_cut_while_in_use_is_an_error(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "d"))
    os.truncate(tmp_path / "d.bin", 100)
    with pytest.raises(DataError, match="became shorter"):
        dataset.read(40, 20)


def test_fingerprint_sees_every_kind_of_change(tmp_path):
    def fingerprint(name, documents, dtype=np.uint16):
        return IndexedDataset(write(tmp_path / name, documents, dtype)).fingerprint()

    base = fingerprint("a", [[1, 2, 3], [4]])
    assert fingerprint("b", [[1, 2, 3], [4]]) == base  # the path plays no part
    others = [[[1, 2, 3, 4]], [[1, 2], [3, 4]], [[1, 2, 3], [5]], [[1, 2, 3], [4], []], [[1, 2, 3], [4, 4]]]
    assert all(fingerprint("c", documents) != base for documents in others)
    assert fingerprint("d", [[1, 2, 3], [4]], np.int32) != base
