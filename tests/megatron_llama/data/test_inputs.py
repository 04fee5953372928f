import argparse
import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.inputs import choose_piece_bytes, expand_inputs, input_kind
from megatron_llama.data.preprocess import Settings, preprocess
from megatron_llama.data.tokenizer_training import train_tokenizer
from parallel.errors import DataError

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
DOCUMENTS = ["one", "", "two\nlines\r\n", "\u00e9\u4e2d\U0001f600 </s>", *(TEXT[i : i + 500] for i in range(0, 30000, 500))]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([TEXT], tmp_path_factory.mktemp("tokenizer") / "t", 700, 10**6, 1)[0]


def zstd(content):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


def write_parquet(path, columns, **options):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path, **options)


def run(tokenizer, inputs, prefix, settings=(), **options):
    summary = preprocess(inputs, prefix, Settings(str(tokenizer.path), append_eos=True, **dict(settings)), **options)
    return summary, Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.idx").read_bytes()


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    (directory / "c.jsonl").write_bytes(JSONL)
    return run(tokenizer, [directory / "c.jsonl"], directory / "d")[1]


PACKED = {
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstd,
    ".json.bz2": bz2.compress,
    ".ndjson.xz": lzma.compress,
    ".jsonl.GZ": lambda content: gzip.compress(content[:999]) + gzip.compress(content[999:]),  # as `cat a.gz b.gz` makes
    ".jsonl.zstd": lambda content: zstd(content[:999]) + zstd(b"") + zstd(content[999:]),
}


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_files_equal_plain_ones(tokenizer, plain, tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(PACKED[suffix](JSONL))
    calls = []
    assert run(tokenizer, [path], tmp_path / "d", progress=lambda *call: calls.append(call))[1] == plain
    assert sum(read for read, _ in calls) == path.stat().st_size


@pytest.mark.parametrize("options", [{}, {"row_group_size": 7, "compression": "zstd"}, {"use_dictionary": False}])
def test_parquet_equals_jsonl(tokenizer, plain, tmp_path, options):
    write_parquet(tmp_path / "c.parquet", {"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS}, **options)
    assert run(tokenizer, [tmp_path / "c.parquet"], tmp_path / "d")[1] == plain


@pytest.mark.parametrize("kind", ["large_string", "dictionary"])
def test_parquet_columns_of_other_strings(tokenizer, plain, tmp_path, kind):
    arrow = pytest.importorskip("pyarrow")
    types = {"large_string": arrow.large_string(), "dictionary": arrow.dictionary(arrow.int32(), arrow.string())}
    write_parquet(tmp_path / "c.pq", {"text": arrow.array(DOCUMENTS).cast(types[kind])})
    assert run(tokenizer, [tmp_path / "c.pq"], tmp_path / "d")[1] == plain


def test_parquet_at_fault(tokenizer, tmp_path):
    path = tmp_path / "c.parquet"
    write_parquet(path, {"body": ["a", None, "c"], "n": [1, 2, 3]})
    with pytest.raises(DataError, match="c.parquet: no column 'text'; columns found: 'body', 'n'; choose one with --json-key"):
        run(tokenizer, [path], tmp_path / "d")
    with pytest.raises(DataError, match="the column 'n' is of type int64, needed strings"):
        run(tokenizer, [path], tmp_path / "d", {"json_key": "n"})
    with pytest.raises(DataError, match="c.parquet:2: the value of 'body' is null, needed a string"):
        run(tokenizer, [path], tmp_path / "d", {"json_key": "body"})
    summary, _ = run(tokenizer, [path], tmp_path / "d", {"json_key": "body", "on_error": "skip"})
    assert (summary.documents, summary.skipped_lines) == (2, 1)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="c.parquet: is damaged or not a parquet file"):
        run(tokenizer, [path], tmp_path / "d")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".json.bz2", ".ndjson.xz"])
def test_packed_files_that_are_cut_short(tokenizer, tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(PACKED[suffix](JSONL)[:-20])
    with pytest.raises(DataError, match="is damaged or cut short: cannot be unpacked"):
        run(tokenizer, [path], tmp_path / "d", {"on_error": "skip"})
    path.write_bytes(b"not packed at all")
    with pytest.raises(DataError, match="cannot be (unpacked|read)"):
        run(tokenizer, [path], tmp_path / "d")


def test_packed_text_is_one_document(tokenizer, tmp_path):
    text = TEXT * 20  # more than a fragment
    (tmp_path / "plain.txt").write_text(text)
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "short.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfa b"))
    expected = run(tokenizer, [tmp_path / "plain.txt"], tmp_path / "p")[1]
    assert run(tokenizer, [tmp_path / "packed.txt.gz"], tmp_path / "d")[1] == expected
    assert IndexedDataset(tmp_path / "d").document(0).tolist() == [*tokenizer.encode(text), 2]
    run(tokenizer, [tmp_path / "short.txt.gz"], tmp_path / "s")
    assert IndexedDataset(tmp_path / "s").document(0).tolist() == [*tokenizer.encode("a b"), 2]


def test_directories_and_patterns(tmp_path):
    names = ["b/2.jsonl", "b/10.jsonl.gz", "a.parquet", "z.txt", "c/d/e.json.zst"]
    not_read = ["b/_SUCCESS", "b/.hidden.jsonl", ".cache/x.jsonl", "b/x.crc", "code.py"]
    not_read += ["d.json", "d.idx", "d.errors.jsonl", "d.partial/1.json"]  # written by an earlier run
    for name in names + not_read:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*inputs):
        return [str(path.relative_to(tmp_path)) for path in expand_inputs(inputs)]

    everything = ["a.parquet", "b/10.jsonl.gz", "b/2.jsonl", "c/d/e.json.zst", "z.txt"]
    assert found(tmp_path) == everything
    assert found(tmp_path / "*.py", f"{tmp_path}/b/*.jsonl") == ["code.py", "b/2.jsonl"]
    assert found(f"{tmp_path}/**/*.json*") == ["b/10.jsonl.gz", "b/2.jsonl", "c/d/e.json.zst"]
    assert found(tmp_path / "z.txt", tmp_path / "[b-c]") == ["z.txt", "b/10.jsonl.gz", "b/2.jsonl", "c/d/e.json.zst"]
    (tmp_path / "odd[1].txt").touch()
    assert found(tmp_path / "odd[1].txt") == ["odd[1].txt"]  # a file that is there is no pattern


def test_kinds():
    assert input_kind(Path("a.JSONL"), "files") == ("json", "")
    assert input_kind(Path("a.json.gz"), "lines") == ("json", "gzip")
    assert input_kind(Path("a.txt.zst"), "lines") == ("lines", "zstd")
    assert input_kind(Path("README"), "files") == ("file", "")
    for name in ("a.tar", "a.tar.gz", "a.parquet.gz", "a.bin"):
        with pytest.raises(DataError, match="are not read"):
            input_kind(Path(name), "files")


def test_pieces_grow_with_the_input():
    sizes = [choose_piece_bytes(total) for total in (0, 10**6, 10**9, 10**10, 10**13)]
    assert sizes == [1 << 20, 1 << 20, 1 << 21, 1 << 25, 1 << 26]
    assert choose_piece_bytes(10**10 + 10**6) == choose_piece_bytes(10**10)  # a file more changes nothing


def test_without_the_optional_packages(tokenizer, plain, tmp_path, monkeypatch):
    for module in ("zstandard", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    for name, package in (("c.jsonl.zst", "zstandard"), ("c.parquet", "pyarrow")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=rf"{name}: .*needs the package {package}: pip install 'megatron-llama\[data\]'"):
            run(tokenizer, [tmp_path / name], tmp_path / "d")


def test_without_orjson_the_bytes_are_the_same(tokenizer, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_llama.data.text.fast_loads", json.loads)
    (tmp_path / "c.jsonl").write_bytes(JSONL)
    assert run(tokenizer, [tmp_path / "c.jsonl"], tmp_path / "d")[1] == plain
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match="lone surrogate"):
        run(tokenizer, [tmp_path / "c.jsonl"], tmp_path / "d")
