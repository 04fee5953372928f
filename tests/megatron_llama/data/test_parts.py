import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_llama.data import encoding
from megatron_llama.data import text as text_module
from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.preprocess import Settings, preprocess
from megatron_llama.data.tokenizer_training import train_tokenizer
from megatron_llama.data.vocabulary import read_sidecar
from parallel.errors import DataError

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([TEXT], tmp_path_factory.mktemp("tokenizer") / "t", 700, 10**6, 1)[0]


@pytest.fixture
def corpus(tmp_path):
    jsonl, text = tmp_path / "c.jsonl", tmp_path / "long.txt"
    lines = (json.dumps({"text": TEXT[i : i + 400 + i % 900]}) + "\n" for i in range(0, 60000, 300))
    jsonl.write_text("".join(lines))
    text.write_text(TEXT, encoding="utf-8")
    return [jsonl, text, jsonl]


def run(tokenizer, inputs, prefix, piece_bytes=20_000, settings=(), **options):
    of_settings = Settings(str(tokenizer.path), append_bos=True, append_eos=True, **dict(settings))
    return preprocess(inputs, prefix, of_settings, piece_bytes=piece_bytes, **options)


def outputs(prefix):
    directory = Path(prefix).parent
    return {path.name.removeprefix(Path(prefix).name): path.read_bytes() for path in directory.glob(f"{Path(prefix).name}*")}


@pytest.mark.parametrize("settings", [{}, {"valid_fraction": 0.3}], ids=["plain", "split"])
def test_killed_at_random_moments(tokenizer, corpus, tmp_path, settings):
    run(tokenizer, corpus, tmp_path / "undisturbed" / "d", settings=settings)
    fork, moments = multiprocessing.get_context("fork"), random.Random(7)
    prefix, found = tmp_path / "killed" / "d", []
    for _ in range(20):
        process = fork.Process(target=run, args=(tokenizer, corpus, prefix), kwargs={"settings": settings})
        process.start()
        time.sleep(moments.uniform(0.0, 0.12))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found.append(len(list(prefix.parent.glob("d.partial/*.json"))))
    assert len(set(found)) > 1  # some were killed at work
    run(tokenizer, corpus, prefix, workers=2, settings=settings)
    assert outputs(prefix) == outputs(tmp_path / "undisturbed" / "d")


def test_finished_parts_are_kept_and_other_settings_ask_for_other_parts(tokenizer, corpus, tmp_path):
    corpus[0].write_text(corpus[0].read_text() + "broken\n")
    with pytest.raises(DataError, match="not valid JSON"):
        run(tokenizer, corpus, tmp_path / "d")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "d.partial").glob("*.json")}
    assert finished
    with pytest.raises(DataError, match="not valid JSON"):
        run(tokenizer, corpus, tmp_path / "d", workers=2)
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "d.partial").glob("*.json")}.items()
    summary = run(tokenizer, corpus, tmp_path / "d", settings={"on_error": "skip"})
    assert summary.resumed_parts == 0 and not (tmp_path / "d.partial").exists()


def stop_after(parts):
    def progress(read_bytes, tokens):
        progress.calls += 1
        if progress.calls > parts:
            raise KeyboardInterrupt

    progress.calls = 0
    return progress


DAMAGE = {
    "bin": lambda work: flip(next(work.glob("*.bin"))),
    "lengths": lambda work: flip(next(work.glob("*.lengths"))),
    "bin cut": lambda work: os.truncate(next(work.glob("*.bin")), 10),
    "no bin": lambda work: next(work.glob("*.bin")).unlink(),
    "marker cut": lambda work: os.truncate(next(work.glob("*.json")), 10),
    "marker of another": lambda work: shutil.copy(*sorted(work.glob("*.json"))[:2]),
    "half-written": lambda work: (work / "0123.bin.tmp-77").write_bytes(b"x"),
    "foreign": lambda work: (work / "0123.json").write_text("{}"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_parts_are_made_again(tokenizer, corpus, tmp_path, name):
    run(tokenizer, corpus, tmp_path / "undisturbed" / "d")
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, corpus, tmp_path / "out" / "d", progress=stop_after(8))
    work = tmp_path / "out" / "d.partial"
    finished = len(list(work.glob("*.json")))
    assert finished > 2
    DAMAGE[name](work)
    summary = run(tokenizer, corpus, tmp_path / "out" / "d")
    assert summary.resumed_parts == finished - (name not in ("half-written", "foreign"))
    assert outputs(tmp_path / "out" / "d") == outputs(tmp_path / "undisturbed" / "d")


def test_a_changed_input_is_read_again(tokenizer, corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, corpus, tmp_path / "out" / "d", progress=stop_after(8))
    status = corpus[0].stat()
    corpus[0].write_text(corpus[0].read_text().replace("argument", "ARGUMENT"))  # of the same size
    os.utime(corpus[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert run(tokenizer, corpus, tmp_path / "out" / "d").resumed_parts == 0
    run(tokenizer, corpus, tmp_path / "again" / "d")
    assert outputs(tmp_path / "out" / "d") == outputs(tmp_path / "again" / "d")


def test_an_input_that_changes_meanwhile(tokenizer, corpus, tmp_path):
    def append(read_bytes, tokens):
        with open(corpus[0], "a") as file:
            file.write("\n")

    with pytest.raises(DataError, match="c.jsonl: changed while it was read"):
        run(tokenizer, corpus[:1], tmp_path / "d", progress=append)


def test_two_runs_at_one_place(tokenizer, corpus, tmp_path):
    def again(read_bytes, tokens):
        with pytest.raises(DataError, match="d.partial: another run is writing there"):
            run(tokenizer, corpus, tmp_path / "d")

    run(tokenizer, corpus, tmp_path / "d", progress=again)


def test_a_killed_worker_is_an_error_not_a_hang(tokenizer, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text((json.dumps({"text": TEXT}) + "\n") * 300)

    def kill(read_bytes, tokens):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(DataError, match="killed for lack of memory"):
        run(tokenizer, [corpus], tmp_path / "d", piece_bytes=1 << 20, workers=2, progress=kill)
    assert not multiprocessing.active_children()


# Skipped lines


def test_bad_lines_are_noted_and_left_out(tokenizer, tmp_path):
    good, other = tmp_path / "good.jsonl", tmp_path / "other.jsonl"
    lines = [json.dumps({"text": f"document {number} {'x' * (number % 50)}"}) for number in range(300)]
    other.write_text("".join(line + "\n" for line in lines))
    bad = {7: "broken", 150: '{"text": 5}', 299: '{"body": "a"}'}
    good.write_text("".join(bad.get(number, line) + "\n" for number, line in enumerate(lines, start=1)))
    expected = [line for number, line in enumerate(lines, start=1) if number not in bad]
    (tmp_path / "expected.jsonl").write_text("".join(line + "\n" for line in expected))
    run(tokenizer, [other, tmp_path / "expected.jsonl"], tmp_path / "e")
    for workers in (1, 2):
        prefix = tmp_path / f"d{workers}"
        summary = run(tokenizer, [other, good], prefix, 700, {"on_error": "skip", "max_errors": 3}, workers=workers)
        assert (summary.skipped_lines, summary.documents) == (3, 597)
        noted = [json.loads(line) for line in Path(f"{prefix}.errors.jsonl").read_text().splitlines()]
        assert [(error["file"], error["line"], error["content"].rstrip()) for error in noted] == [
            (str(good), number, content) for number, content in bad.items()
        ]
        assert noted[1]["error"] == "the value of 'text' is of type int, needed a string"
        for suffix in (".bin", ".idx"):
            assert Path(f"{prefix}{suffix}").read_bytes() == Path(f"{tmp_path}/e{suffix}").read_bytes()
        with pytest.raises(DataError, match="found [0-9]+ bad lines, more than --max-errors 2"):
            run(tokenizer, [other, good], tmp_path / "m", 700, {"on_error": "skip", "max_errors": 2}, workers=workers)
    run(tokenizer, [other], tmp_path / "d1", settings={"on_error": "skip"})
    assert not Path(f"{tmp_path}/d1.errors.jsonl").exists()  # it was of an older run


# Held-out documents


def documents_of(prefix):
    dataset = IndexedDataset(prefix)
    return [tuple(dataset.document(number).tolist()) for number in range(dataset.num_documents)]


def test_the_split_is_a_function_of_the_text(tokenizer, tmp_path):
    texts = [f"{TEXT[i : i + 60]} {i}" for i in range(1500)]
    for name, chosen in (("a", texts), ("b", list(reversed(texts[:700])))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    split = {"valid_fraction": 0.2}
    summary = run(tokenizer, [tmp_path / "a.jsonl"], tmp_path / "a", settings=split)
    run(tokenizer, [tmp_path / "b.jsonl"], tmp_path / "b", 999, split, workers=2)
    train, valid = documents_of(tmp_path / "a"), documents_of(tmp_path / "a-valid")
    assert 230 < len(valid) < 370  # 300 expected, 15.5 the standard deviation
    assert len(train) + len(valid) == 1500 and not set(train) & set(valid)
    assert (summary.documents, summary.valid.documents) == (len(train), len(valid))
    assert read_sidecar(str(tmp_path / "a-valid"))["documents"] == len(valid)
    assert set(documents_of(tmp_path / "b")) <= set(train) and set(documents_of(tmp_path / "b-valid")) <= set(valid)
    run(tokenizer, [tmp_path / "a.jsonl"], tmp_path / "more", settings={"valid_fraction": 0.4})
    assert set(valid) < set(documents_of(tmp_path / "more-valid"))  # a larger fraction takes more


@pytest.mark.parametrize("in_fragments", [False, True])
def test_a_long_text_is_split_as_a_whole(tokenizer, tmp_path, monkeypatch, in_fragments):
    if in_fragments:
        monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 20_000)
        monkeypatch.setattr(text_module, "FRAGMENT_BYTES", 15_000)
    for number in range(12):
        text = f"{number} {TEXT[:40_000]}"
        (tmp_path / f"{number}.txt").write_text(text)
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    split = {"valid_fraction": 0.5}
    for suffix in ("txt", "jsonl"):
        run(tokenizer, sorted(tmp_path.glob(f"*.{suffix}")), tmp_path / suffix, settings=split)
    for name in ("", "-valid"):
        documents = documents_of(f"{tmp_path}/txt{name}")
        assert documents == documents_of(f"{tmp_path}/jsonl{name}") and 0 < len(documents) < 12


# Parts that are kept


def test_kept_parts_are_one_dataset(tokenizer, corpus, tmp_path):
    run(tokenizer, corpus, tmp_path / "joined")
    for workers in (1, 2):  # the second replaces the first
        run(tokenizer, corpus, tmp_path / "parts", keep_parts=True, workers=workers)
    joined, parts = IndexedDataset(tmp_path / "joined"), IndexedDataset(tmp_path / "parts")
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["c.jsonl", "joined.bin", "joined.idx", "joined.json", "long.txt", "parts"]
    names = [path.name for path in (tmp_path / "parts").glob("*.bin")]
    assert len(names) > 10 and "dataset.bin" not in names
    assert np.array_equal(joined.sequence_lengths, parts.sequence_lengths)
    assert np.array_equal(joined.read(0, joined.num_tokens), parts.read(0, parts.num_tokens))
    for start in np.random.default_rng(0).integers(0, joined.num_tokens - 20_000, 50):
        assert np.array_equal(joined.read(start, 20_000), parts.read(start, 20_000))
    assert joined.document(37).tolist() == parts.document(37).tolist()
    assert joined.fingerprint() == parts.fingerprint()
    assert read_sidecar(str(tmp_path / "parts")) == read_sidecar(str(tmp_path / "joined"))
    each = [IndexedDataset(tmp_path / "parts" / name.removesuffix(".bin")) for name in sorted(names)]
    assert sum(part.num_documents for part in each) == joined.num_documents  # each can be used alone, by Megatron too
    (tmp_path / "parts" / sorted(names)[3]).write_bytes(b"short")
    with pytest.raises(DataError, match="part-00003.bin: found 5 bytes; dataset.parts says"):
        IndexedDataset(tmp_path / "parts")


def test_a_directory_that_is_no_dataset_is_not_replaced(tokenizer, corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(DataError, match="mine: exists and is not a dataset"):
        run(tokenizer, corpus, tmp_path / "mine", keep_parts=True)
    assert (tmp_path / "mine" / "notes").exists()
