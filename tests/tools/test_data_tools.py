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
    assert len(re.findall(r"^ +\d\.\d{3} +9\d\.\d{3}  .*(c.jsonl|notes.rst)$", output, re.MULTILINE)) == 2
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


def test_inspect_shows_a_sample_of_a_run(model, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": TEXT[start : start + 90]}) + "\n" for start in range(0, 9000, 90)))
    arguments = ("--input", corpus, "--output-prefix", tmp_path / "d", "--tokenizer-model", model, "--append-eos")
    assert run("preprocess_data", *arguments)[0] == 0
    sizes = "num_layers = 1\nhidden_size = 8\nnum_heads = 1\nffn_hidden_size = 8\nvocab_size = 700\n"
    batch = "steps = 2\nglobal_batch_size = 4\nsequence_length = 128\n"
    (tmp_path / "run.toml").write_text(f'[model]\n{sizes}[data]\ntrain = ["{tmp_path}/d"]\n[train]\n{batch}')
    sample = ("inspect_dataset", "--config", tmp_path / "run.toml", "--sample")
    code, output, errors = run(*sample, 7, "--dp", 2, "--tokenizer-model", model)
    assert (code, errors) == (0, "")
    assert output.startswith(f"sample     7: step 2, data rank 1 of 2, micro-batch 1, row 0\nsource     {tmp_path}/d\n")
    text = "\n".join(line.removeprefix("  | ") for line in output.splitlines() if line.startswith("  | "))
    assert "".join(text.split()) and text.splitlines()[0] in TEXT
    assert run(*sample, 7)[1].startswith("sample     7: step 2, data rank 0 of 1, micro-batch 3, row 0\n")
    for words, expected in (
        ((*sample, 8), "--sample 8: the run reads the samples 0 to 7; choose one of them"),
        (sample[:-1], "--config RUN and --sample K go together: give both"),
        (("inspect_dataset",), "name either a dataset by its PREFIX, or a run by --config RUN"),
        ((*sample, 1, "--dp", -1), "--dp -1 must be at least 1"),
    ):
        assert run(*words) == (2, "", f"error: {expected}\n")


def test_inspect_says_when_the_tokenizer_is_another(model, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "a b c"}\n')
    other = train_tokenizer([TEXT], tmp_path / "other", 650, 10**6, 1)[0].path
    run("preprocess_data", "--input", corpus, "--output-prefix", tmp_path / "d", "--tokenizer-model", model)
    code, output, _ = run("inspect_dataset", tmp_path / "d", "--tokenizer-model", other)
    assert code == 0 and "warning    made with another tokenizer" in output


@pytest.mark.parametrize(("workers", "sent"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGKILL)])
def test_a_stopped_run_goes_on(model, tmp_path, workers, sent):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text((json.dumps({"text": TEXT[:50000]}) + "\n") * 100)  # 5 parts
    options = ("--engine", "sentencepiece", "--workers", workers)  # not too fast
    arguments = ("--input", corpus, "--tokenizer-model", model, *options, "--output-prefix")
    process = start("preprocess_data", *arguments, tmp_path / "d")
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("d.partial/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    if sent == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert re.fullmatch(r"note: \d finished parts are kept in .*d.partial; the same command goes on from there\n", errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "d.partial"]
    deadline = time.monotonic() + 30
    while (again := run("preprocess_data", *arguments, tmp_path / "d"))[0] == 2 and time.monotonic() < deadline:
        assert "another run is writing there" in again[2]  # killed workers take a moment to end
    assert again[0] == 0 and re.search(r"; [1-5] of 5 parts were finished before", again[1])
    assert run("preprocess_data", *arguments, tmp_path / "e")[0] == 0
    for suffix in (".bin", ".idx", ".json"):
        assert Path(f"{tmp_path}/d{suffix}").read_bytes() == Path(f"{tmp_path}/e{suffix}").read_bytes()
    assert not (tmp_path / "d.partial").exists()


def test_merge_verify_and_export(model, tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text((json.dumps({"text": TEXT[number : number + 999]}) + "\n") * 3)
        options = ("--output-prefix", tmp_path / f"d{number}", "--tokenizer-model", model, "--engine", "sentencepiece")
        assert run("preprocess_data", "--input", tmp_path / f"{number}.jsonl", *options)[0] == 0
    code, output, errors = run("merge_datasets", tmp_path / "d0", tmp_path / "d1", "--output-prefix", tmp_path / "all")
    assert (code, errors) == (0, "") and output.endswith(" tokens of 2 datasets\n")
    text = ("--input", tmp_path / "0.jsonl", f"{tmp_path}/[1].jsonl")
    code, output, errors = run("verify_dataset", tmp_path / "all", "--tokenizer-model", model, *text)
    assert (code, errors) == (0, "") and "6 documents tokenised again: their ids are equal" in output
    code, output, errors = run("verify_dataset", tmp_path / "all", "--vocab-size", 300)
    assert code == 2 and "outside the vocabulary of 300" in errors and errors.count("\n") == 1
    code, output, _ = run("export_tokenizer", model, "--output", tmp_path / "hf")
    assert code == 0 and len(output.splitlines()) == 4 and (tmp_path / "hf" / "tokenizer.json").exists()


def test_bad_lines_and_held_out_documents(model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "c.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(400)) + "{\n")
    options = ("--tokenizer-model", model, "--on-error", "skip", "--valid-fraction", 0.25, "--keep-parts")
    code, output, errors = run("preprocess_data", "--input", tmp_path / "in", "--output-prefix", tmp_path / "d", *options)
    assert (code, errors) == (0, "")
    assert f"{tmp_path}/d.errors.jsonl: 1 bad lines left out" in output and f"{tmp_path}/d-valid: " in output
    assert json.loads((tmp_path / "d.errors.jsonl").read_text())["line"] == 401
    assert run("inspect_dataset", tmp_path / "d-valid", "--tokenizer-model", model)[0] == 0


TOOLS = ("train_tokenizer", "preprocess_data", "inspect_dataset", "merge_datasets", "verify_dataset", "export_tokenizer")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_project_that_is_not_installed_is_said_so(tool):
    code, _, errors = run(tool, interpreter=("-I", "-S"))  # no installed package is visible
    assert code != 0 and errors.startswith("error: No module named") and "pip install -e ." in errors
    assert errors.count("\n") == 1
