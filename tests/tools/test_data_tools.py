import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.tokenizer_training import train_tokenizer
from megatron_llama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


def start(tool, *arguments, interpreter=(), **options):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # where the project is not installed
    return subprocess.Popen(
        [sys.executable, *interpreter, f"tools/{tool}.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(tool, *arguments, **options):
    process = start(tool, *arguments, **options)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_tokenizer([TEXT], tmp_path_factory.mktemp("tokenizer") / "t", 700, 10**6, 1)[0].path


def test_from_text_to_dataset(tmp_path):
    corpus, notes = tmp_path / "c.jsonl", tmp_path / "notes.rst"
    corpus.write_text("".join(json.dumps({"body": TEXT[start : start + 900]}) + "\n" for start in range(0, 90000, 900)))
    notes.write_text("Some notes with </s> in them.\n" * 50)
    inputs = ("--input", corpus, notes, "--json-key", "body")

    code, output, errors = run("train_tokenizer", *inputs, "--output", tmp_path / "out" / "t", "--vocab-size", 600)
    assert (code, errors) == (0, "")
    assert "600 pieces" in output and re.search(r"\d\.\d{3} bytes a token, 9\d\.\d{3} % of the characters", output)
    assert (tmp_path / "out" / "t.vocab").exists()
    tokenizer = Tokenizer(tmp_path / "out" / "t.model")

    prefix = tmp_path / "data" / "c"
    options = ("--output-prefix", prefix, "--tokenizer-model", tokenizer.path, "--append-bos", "--append-eos", "--workers", 2)
    code, output, errors = run("preprocess_data", *inputs, *options)
    assert (code, errors) == (0, "")
    assert "101 documents (0 empty)" in output and "MB/s with 2 workers" in output
    dataset = IndexedDataset(prefix)
    assert dataset.document(0).tolist() == [1, *tokenizer.encode(TEXT[:900]), 2]
    assert dataset.document(100).tolist() == [1, *tokenizer.encode(notes.read_text()), 2]

    picture = tmp_path / "lengths.png"
    code, output, errors = run("inspect_dataset", prefix, "--tokenizer-model", tokenizer.path, "--picture", picture)
    assert (code, errors) == (0, "")
    assert f"{dataset.num_tokens:,} tokens, 101 documents, 101 sequences" in output and "append_bos: True" in output
    bars = [line for line in output.splitlines() if re.fullmatch(r" *[\d,]+ - [\d,]+ +[\d,]+ #*", line)]
    assert sum(int(line.split()[3].replace(",", "")) for line in bars) == 101
    assert f"  | {TEXT.splitlines()[0]}" in output and "warning" not in output
    assert picture.read_bytes()[:4] == b"\x89PNG"

    code, output, _ = run("inspect_dataset", prefix, "--document", 100, "--tokenizer-model", tokenizer.path)
    assert code == 0 and output.count("  | Some notes with </s> in them.") == 50 and "with bos and eos" in output


def test_broken_line_leaves_nothing(model, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "a"}\n{"text": }\n')
    code, output, errors = run(
        "preprocess_data", "--input", corpus, "--output-prefix", tmp_path / "d", "--tokenizer-model", model
    )
    assert (code, output) == (2, "")
    assert errors == f"error: {corpus}:2: not valid JSON: Expecting value at column 10\n"
    code, output, errors = run("train_tokenizer", "--input", corpus, "--output", tmp_path / "t", "--vocab-size", 600)
    assert (code, output) == (2, "")
    assert errors == f"error: {corpus}:2: not valid JSON: Expecting value at column 10\n"
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_full_disk_is_one_line_and_leaves_nothing(model, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text((json.dumps({"text": TEXT}) + "\n") * 10)
    limit = 100_000  # bytes a file may have, which fails as a full disk does
    code, output, errors = run(
        "preprocess_data", "--input", corpus, "--output-prefix", tmp_path / "d", "--tokenizer-model", model,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert (code, output, errors) == (2, "", "error: [Errno 27] File too large\n")
    assert list(tmp_path.iterdir()) == [corpus]


def test_inspect_errors_in_one_line(model, tmp_path):
    code, output, errors = run("inspect_dataset", tmp_path / "none")
    assert (code, output) == (2, "")
    assert errors.startswith(f"error: {tmp_path}/none.idx: cannot be read: No such file") and errors.count("\n") == 1


def test_inspect_says_when_the_tokenizer_is_another(model, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "a b c"}\n')
    other = train_tokenizer([TEXT], tmp_path / "other", 650, 10**6, 1)[0].path
    run("preprocess_data", "--input", corpus, "--output-prefix", tmp_path / "d", "--tokenizer-model", model)
    code, output, _ = run("inspect_dataset", tmp_path / "d", "--tokenizer-model", other)
    assert code == 0 and "warning    made with another tokenizer" in output


@pytest.mark.parametrize("workers", [1, 2])
def test_a_terminated_run_leaves_nothing(model, tmp_path, workers):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text((json.dumps({"text": TEXT[:50000]}) + "\n") * 2000)  # far more than the test's time
    arguments = ("--input", corpus, "--output-prefix", tmp_path / "d", "--tokenizer-model", model, "--workers", workers)
    process = start("preprocess_data", *arguments)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) == 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [path.suffix for path in tmp_path.iterdir() if path != corpus] == [".partial"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == [corpus]


@pytest.mark.parametrize("tool", ["train_tokenizer", "preprocess_data", "inspect_dataset"])
def test_a_project_that_is_not_installed_is_said_so(tool):
    code, _, errors = run(tool, interpreter=("-I", "-S"))  # no installed package is visible
    assert code != 0 and errors.startswith("error: No module named") and "pip install -e ." in errors
    assert errors.count("\n") == 1
