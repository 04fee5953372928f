import argparse
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.data import text as text_module
from megatron_llama.data.describe import length_histogram
from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.inputs import list_pieces
from megatron_llama.data.preprocess import Settings, preprocess
from megatron_llama.data.text import LineError, iterate_documents, read_piece
from megatron_llama.data.tokenizer_training import train_tokenizer
from megatron_llama.data.vocabulary import read_sidecar
from parallel.errors import ConfigError, DataError

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
DOCUMENTS = ["one document", "", "two\nlines\n", "  spaces  ", "\u00e9\u4e2d\U0001f600", "</s>", TEXT[:3000], "last"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([TEXT], tmp_path_factory.mktemp("tokenizer") / "t", 700, 10**6, 1)[0]


def write_jsonl(path, documents, key="text", ascii_only=True):
    path.write_text("".join(json.dumps({"id": 7, key: text}, ensure_ascii=ascii_only) + "\n" for text in documents), "utf-8")
    return path


def run(tokenizer, inputs, prefix, **options):
    of_settings = {name: options.pop(name) for name in ("json_key", "append_bos", "append_eos") if name in options}
    return preprocess(inputs, prefix, Settings(str(tokenizer.path), **of_settings), **options)


def documents_of(prefix):
    dataset = IndexedDataset(prefix)
    return [dataset.document(number).tolist() for number in range(dataset.num_documents)]


def outputs(prefix):
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")}


@pytest.mark.parametrize("piece_bytes", [16, 100, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl(tokenizer, tmp_path, piece_bytes, ascii_only):
    path = write_jsonl(tmp_path / "c.jsonl", DOCUMENTS, ascii_only=ascii_only)
    summary = run(tokenizer, [path], tmp_path / "d", append_bos=True, append_eos=True, piece_bytes=piece_bytes)
    expected = [[1, *tokenizer.encode(text), 2] if text else [] for text in DOCUMENTS]  # an empty text has no eos either
    assert documents_of(tmp_path / "d") == expected
    assert (summary.documents, summary.empty_documents, summary.tokens) == (8, 1, sum(map(len, expected)))
    assert summary.text_bytes == sum(len(text.encode()) for text in DOCUMENTS)


def test_literal_control_tokens_stay_text(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["a </s> b <s>"])
    run(tokenizer, [path], tmp_path / "d", append_eos=True)
    (ids,) = documents_of(tmp_path / "d")
    assert ids.count(2) == 1 and ids[-1] == 2 and 1 not in ids
    assert tokenizer.decode(ids) == "a </s> b <s>"


def test_same_bytes_as_megatron_for_the_same_ids(tokenizer, tmp_path):
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    path = write_jsonl(tmp_path / "c.jsonl", DOCUMENTS)
    run(tokenizer, [path], tmp_path / "d", append_eos=True)
    builder = theirs.IndexedDatasetBuilder(f"{tmp_path}/m.bin", dtype=theirs.DType.optimal_dtype(tokenizer.vocab_size))
    for text in DOCUMENTS:  # as tools/preprocess_data.py of Megatron does
        ids = tokenizer.encode(text)
        ids += [tokenizer.eos_id] if ids else []
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{tmp_path}/m.idx")
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/d{suffix}").read_bytes() == Path(f"{tmp_path}/m{suffix}").read_bytes()


def test_any_number_of_workers_gives_the_same_bytes(tokenizer, tmp_path):
    jsonl = write_jsonl(tmp_path / "c.jsonl", [TEXT[start : start + 700] for start in range(0, 40000, 700)])
    text = tmp_path / "long.txt"
    text.write_text(TEXT * 3, encoding="utf-8")
    written = []
    for workers, piece_bytes in ((1, 1 << 20), (1, 3000), (3, 3000)):
        prefix = tmp_path / f"d{workers}-{piece_bytes}"
        run(tokenizer, [jsonl, text, jsonl], prefix, workers=workers, piece_bytes=piece_bytes, append_bos=True, append_eos=True)
        written.append(outputs(prefix))
    assert written[0] == written[1] == written[2]
    assert documents_of(prefix)[58] == [1, *tokenizer.encode(TEXT * 3), 2]


def test_the_parent_of_workers_does_nothing_per_document(tokenizer, tmp_path):
    """Twenty times the documents in the same bytes and pieces: as many calls of our functions, give or take some progress."""
    calls = {}
    for name, characters in (("few", 4000), ("many", 200)):
        texts = [TEXT[start : start + characters] for start in range(0, 80_000, characters)]
        jsonl = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        piece_bytes = -(-jsonl.stat().st_size // 4)
        calls[name] = 0

        def count(frame, event, argument, name=name):
            calls[name] += event == "call" and "megatron_llama" in frame.f_code.co_filename

        sys.setprofile(count)
        try:
            summary = run(tokenizer, [jsonl], tmp_path / name, workers=2, piece_bytes=piece_bytes)
        finally:
            sys.setprofile(None)
        assert (summary.documents, summary.parts) == (len(texts), 4)
    assert calls["many"] < calls["few"] + 100


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="ab \u2581\u00e9\n", max_size=150), st.integers(4, 40), st.sampled_from([4, 5, 1 << 16]))
def test_text_file_in_pieces_is_one_document(tokenizer, tmp_path_factory, text, piece_bytes, search_bytes):
    directory = tmp_path_factory.mktemp("text")
    path = directory / "t.py"
    path.write_bytes((text + "end").encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "SEARCH_BYTES", search_bytes)
        run(tokenizer, [path], directory / "d", append_bos=True, append_eos=True, piece_bytes=piece_bytes)
    assert documents_of(directory / "d") == [[1, *tokenizer._model.encode(text + "end"), 2]]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="ab\u00e9\n ", max_size=30), max_size=12), st.integers(4, 60), st.booleans())
def test_lines_in_pieces_come_once_each(tmp_path_factory, documents, piece_bytes, ends_with_newline):
    path = tmp_path_factory.mktemp("lines") / "c.jsonl"
    content = "\n".join(json.dumps({"text": text}) for text in documents)
    path.write_text(content + ("\n" if ends_with_newline else ""))
    pieces = list(list_pieces([path], "files", piece_bytes, True))
    found = [list(read_piece(piece, "text")) for piece in pieces]
    assert [text for texts in found for text in texts if text is not None] == documents


def test_blank_lines_hold_no_document(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}\n\n')
    assert run(tokenizer, [path], tmp_path / "d").documents == 2


def test_lines_of_text_as_documents(tokenizer, tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes(b"\xef\xbb\xbffirst line\r\n\nsecond \n last")
    run(tokenizer, [path], tmp_path / "d", documents="lines")
    assert documents_of(tmp_path / "d") == tokenizer.encode_batch(["first line", "second ", " last"])


def test_files_of_text_keep_their_line_ends(tokenizer, tmp_path):
    for name, content in (("a.txt", b"\xef\xbb\xbfone\r\n"), ("b.rst", b""), ("c.py", b"x = 1\n")):
        (tmp_path / name).write_bytes(content)
    summary = run(tokenizer, [tmp_path / name for name in ("c.py", "b.rst", "a.txt")], tmp_path / "d", append_eos=True)
    assert documents_of(tmp_path / "d") == [[*tokenizer.encode("x = 1\n"), 2], [], [*tokenizer.encode("one\r\n"), 2]]
    assert summary.empty_documents == 1


def test_sidecar(tokenizer, tmp_path):
    run(tokenizer, [write_jsonl(tmp_path / "c.jsonl", DOCUMENTS)], tmp_path / "d", append_eos=True)
    dataset, sidecar = IndexedDataset(tmp_path / "d"), read_sidecar(str(tmp_path / "d"))
    tokens = dataset.read(0, dataset.num_tokens)
    assert sidecar == {
        "tokenizer": "t.model",
        "tokenizer_sha256": tokenizer.sha256,
        "engine": "sentencepiece",
        "vocab_size": 700,
        "max_token_id": int(tokens.max()),
        "append_bos": False,
        "append_eos": True,
        "documents": 8,
        "empty_documents": 1,
        "tokens": len(tokens),
        "text_bytes": (text_bytes := sum(len(text.encode()) for text in DOCUMENTS)),
        "bytes_per_token": round(text_bytes / len(tokens), 4),
        "length_histogram": length_histogram(dataset)[: int(dataset.sequence_lengths.max()).bit_length()].tolist(),
    }


def test_progress_adds_up(tokenizer, tmp_path):
    path, calls = write_jsonl(tmp_path / "c.jsonl", DOCUMENTS), []
    summary = run(tokenizer, [path], tmp_path / "d", piece_bytes=64, progress=lambda *call: calls.append(call))
    assert np.sum(calls, axis=0).tolist() == [path.stat().st_size, summary.tokens] and len(calls) > 3


BROKEN = {
    "cut": ('{"text": "a', "not valid JSON: Unterminated string starting at column 10"),
    "comma": ('{"text": "a",}', "not valid JSON: "),
    "list": ('["a"]', "found a JSON list, needed an object with the key 'text'"),
    "missing key": ('{"content": "a", "id": 1}', "no key 'text'; keys found: 'content', 'id'; choose one with --json-key"),
    "no key": ("{}", "no key 'text'; keys found: none"),
    "number": ('{"text": 5}', "the value of 'text' is of type int, needed a string"),
    "null": ('{"text": null}', "the value of 'text' is of type NoneType, needed a string"),
    "encoding": (b'{"text": "caf\xe9"}', "not UTF-8 text: byte 0xe9 at offset 13 of the line"),
    "surrogate": ('{"text": "\\ud83d"}', "lone surrogate \\ud83d"),
    "nesting": ('{"text": ' + "[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("piece_bytes", [40, 1 << 20])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_and_leaves_nothing(tokenizer, tmp_path, name, piece_bytes):
    line, message = BROKEN[name]
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' * 20 + line + b'\n{"text": "good"}\nworse\n')
    good = write_jsonl(tmp_path / "good.jsonl", ["a"] * 9)  # its lines do not count
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError) as error:
        run(tokenizer, [good, path], tmp_path / "d", piece_bytes=piece_bytes)
    assert str(error.value).startswith(f"{path}:41: ") and message in str(error.value)
    finished = list((tmp_path / "d.partial").glob("*.json"))  # are kept for the next run, and nothing else appears
    assert {path for path in tmp_path.iterdir() if path.suffix != ".partial"} == set(before)
    assert bool(finished) == (piece_bytes == 40)


def test_a_broken_line_with_workers(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "good"}\n' * 200 + "broken\n" + '{"text": "good"}\n' * 200)
    with pytest.raises(DataError, match="c.jsonl:201: not valid JSON: Expecting value at column 1"):
        run(tokenizer, [path], tmp_path / "out" / "d", piece_bytes=500, workers=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] in ([], ["d.partial"])


@pytest.mark.parametrize("piece_bytes", [16, 1 << 20])
def test_text_that_is_not_utf8(tokenizer, tmp_path, piece_bytes):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"some words " * 10 + b"caf\xe9 " + b"more words " * 10)
    with pytest.raises(DataError, match=r"latin.txt: not UTF-8 text: byte 0xe9 at offset 113 \("):
        run(tokenizer, [path], tmp_path / "d", piece_bytes=piece_bytes)


def test_inputs_are_checked_before_work_begins(tokenizer, tmp_path):
    good = write_jsonl(tmp_path / "c.jsonl", ["a"])
    (tmp_path / "empty").mkdir()
    calls = []
    faults = {"none.txt": "No such file", "c.zip": "unpack it", "*.txt": "no file matches", "empty": "found no file"}
    for name, message in faults.items():
        with pytest.raises(DataError, match=message):
            run(tokenizer, [good, tmp_path / name], tmp_path / "d", progress=lambda *call: calls.append(call))
    assert not calls


def test_nothing_to_write(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["", ""])
    with pytest.raises(DataError, match="c.jsonl: found no text"):
        run(tokenizer, [path], tmp_path / "d")
    assert list(tmp_path.iterdir()) == [path]


def test_output_that_cannot_be_written(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["a"])
    with pytest.raises(DataError, match="cannot write there"):
        run(tokenizer, [path], path / "d")


def test_iterate_documents(tmp_path):
    jsonl, text = write_jsonl(tmp_path / "c.jsonl", ["a", "b"], key="body"), tmp_path / "t.txt"
    text.write_text("c d\n")
    assert list(iterate_documents([jsonl, text], "files", "body")) == ["a", "b", "c d\n"]
    with pytest.raises(DataError, match="c.jsonl:1: no key 'text'"):
        list(iterate_documents([text, jsonl], "files", "text"))
    assert isinstance(next(read_piece(next(list_pieces([jsonl], "files", 100, True)), "text")), LineError)


@pytest.mark.parametrize(
    ("documents", "vocab_size", "error", "message"),
    [
        (["hello world"], 5000, DataError, "--vocab-size 5000: the text is too small for it"),
        (["hello world"], 260, ConfigError, "--vocab-size 260: below bytes and characters"),
        ([], 300, DataError, "found no text"),
    ],
)
def test_training_that_cannot_work(tmp_path, documents, vocab_size, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(documents, tmp_path / "t", vocab_size, 1000, 1)
    assert not list(tmp_path.iterdir())


def test_training_reads_long_lines(tmp_path):
    """SentencePiece would ignore a line above 4192 bytes."""
    tokenizer, quality = train_tokenizer(["wonderful " * 1000 + "x" * 6000], tmp_path / "t", 285, 1000, 1)
    assert tokenizer.contains("\u2581wonderful")
    assert quality.sample_bytes == 16000 and quality.character_coverage == 1.0
    assert quality.bytes_per_token > 1


def test_a_stopped_run_leaves_nothing(tokenizer, tmp_path):
    """Ctrl-C, and SIGTERM where the program turns it into an exit, unwind the writer."""
    path = write_jsonl(tmp_path / "c.jsonl", DOCUMENTS)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that share out the tests ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tokenizer, [path], tmp_path / "d", progress=lambda *call: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(tmp_path.iterdir()) == [path]
