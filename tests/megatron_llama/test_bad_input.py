"""What users get wrong: one line on standard error that names the value and the fix, exit code 78, and nothing trained."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest

from megatron_llama.data.loader import Loader
from parallel.errors import DataError
from tests.megatron_llama.programs import VOCAB_SIZE, Change, records, start, succeed, values, write_dataset

CONFIG = ("--config", "config.toml")


def refused(program: str, *argv: object, ranks: int = 1, change: Change | None = None) -> str:
    """Start a program that must refuse; returns its one line, without the line's end."""
    ended = start(program, *argv, ranks=ranks, change=change)
    said = "".join(rank.err for rank in ended)
    assert [rank.code for rank in ended] == [78] * ranks, said
    assert said.startswith("error") and said.count("\n") == 1 and said.endswith("\n"), said
    assert not any("Traceback" in rank.out for rank in ended)
    assert not records(Path("run")) and not records(Path("other"))
    return said[:-1]


def assert_says(message: str, *parts: object) -> None:
    missing = [part for part in parts if str(part) not in message]
    assert not missing, f"{message!r} does not contain {missing}"


def flip_byte(path: Path, position: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# settings

SETTINGS = {
    "unknown field": (2, ["--train.micro_batch_sise", 2], ["train.micro_batch_sise", "train.micro_batch_size"]),
    "unknown section": (1, ["--training.steps", 2], ["training.steps", "train.steps"]),
    "field without its section": (1, ["--micro_batch_size", 2], ["micro_batch_size", "train.micro_batch_size"]),
    "wrong type": (2, ["--train.steps", "many"], ["train.steps = 'many'", "an integer"]),
    "a flag without its value": (1, ["--train.steps"], ["--train.steps needs a value"]),
    "a file without its flag": (1, ["config.toml"], ["unexpected argument 'config.toml'", "--config config.toml"]),
    "unknown preset": (1, ["--model.preset", "llama-7"], ["'llama-7'", "llama-7b"]),
    "unknown hardware": (2, ["--log.hardware", "h1000"], ["log.hardware = h1000", "is h100", "--log.hardware none"]),
    "tp and heads": (3, ["--parallel.tp", 3], ["parallel.tp", "tp 3", "4 heads", "set --parallel.tp to 2 or 4"]),
    "too few layers": (4, ["--parallel.pp", 4], ["model.num_layers is 2", "4", "set --parallel.pp to at most 2"]),
    "batch": (2, ["--train.global_batch_size", 7], ["7 over 1 x 2 = 2", "set --train.global_batch_size to 6 or 8"]),
    "batch below one of each": (2, ["--train.global_batch_size", 1], ["set --train.global_batch_size to 2"]),
    "world size": (3, ["--parallel.tp", 2], ["= 2, and is 3", "start 2 or 4 processes"]),
    "world size with dp": (2, ["--parallel.dp", 4], ["dp 4 = 4, and is 2", "start 4 processes or set --parallel.dp to 2"]),
    "one process": (1, ["--parallel.pp", 2], ["= 2, and is 1", "start 2 processes (torchrun --nproc-per-node="]),
    "cp": (2, ["--parallel.cp", 2], ["parallel.cp = 2", "has not landed", "set --parallel.cp to 1"]),
    "chunks": (1, ["--parallel.chunks", 2], ["1f1b cannot have parallel.chunks = 2: set --parallel.chunks to 1, or", "zb-v"]),
    "activation memory": (
        2,
        ["--parallel.pp", 2, "--parallel.schedule", "gpipe", "--parallel.activation_memory_gib", "1e-9"],
        ["schedule = gpipe", "no schedule fits", "GiB on pp rank 0, where 1e-09 are free", "--parallel.recompute"],
    ),
    "zero 3": (1, ["--zero.stage", 3], ["zero.stage = 3", "--zero.engine deepspeed, or --zero.stage 1"]),
    "shard group": (4, ["--zero.shard_group_size", 3], ["shard_group_size must divide", "3 over 4", "to 2 or 4, or to 0"]),
    "kernel": (2, ["--kernels.attention", "flash9"], ["kernels.attention = 'flash9'", "sdpa"]),
    "sequence split": (2, ["--parallel.tp", 2, "--train.sequence_length", 15], ["15 over tp 2", "14 or 16"]),
    "steps and tokens": (1, ["--train.steps", 2, "--train.tokens", 99], ["train.steps = 2", "train.tokens = 99", "remove one"]),
    "cuda": (2, ["--train.device", "cuda"], ["train.device is cuda", "--train.device cpu"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    ranks, flags, parts = SETTINGS[name]
    assert_says(refused("train", *CONFIG, *flags, ranks=ranks), *parts)
    assert not Path("run").exists() or name == "kernel"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"[train]\nsteps = \n", "not valid TOML"),
        (b"\xff\xfe\x00binary", "not valid TOML"),
        (b"[train]\nsteps = 2\nwarmup = 3\n", "unknown setting train.warmup"),  # of an older version, say
        (b"[model]\nnum_layers = '2'\n", "expected an integer"),
        (None, "No such file"),
    ],
)
def test_config_file(content: bytes | None, part: str, workplace: Path) -> None:
    if content is not None:
        Path("bad.toml").write_bytes(content)
    assert_says(refused("train", "--config", "bad.toml", ranks=2), "bad.toml", part)


def test_no_arguments_at_all(workplace: Path) -> None:
    assert_says(refused("train"), "model.num_layers", "--model.preset")


# data


def truncate(path: str) -> None:
    os.truncate(path, os.path.getsize(path) - 7)


def lengthen(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"1234")


DATA = {
    "no .idx": (lambda: os.remove("train.idx"), ["train.idx", "No such file"]),
    "no .bin": (lambda: os.remove("train.bin"), ["train.bin", "No such file", ".idx needs it"]),
    "truncated .idx": (lambda: truncate("train.idx"), ["train.idx", "truncated"]),
    "truncated .bin": (lambda: truncate("train.bin"), ["train.bin", "6000 bytes", "truncated"]),
    "empty .idx": (lambda: Path("train.idx").write_bytes(b""), ["train.idx", "truncated"]),
    "foreign .idx": (lambda: Path("train.idx").write_bytes(b"PK\x03\x04" * 20), ["train.idx", "not an index", "PK"]),
    "foreign .bin": (lambda: lengthen("train.bin"), ["train.bin", "of another index"]),
    "later version": (
        lambda: Path("train.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<Q", 9) + bytes(40)),
        ["train.idx", "version 9"],
    ),
    "damaged held-out data": (lambda: truncate("valid.bin"), ["valid.bin", "truncated"]),
    "no tokenizer": (lambda: os.remove("tokenizer.model"), ["tokenizer.model", "No such file"]),
    "foreign tokenizer": (lambda: Path("tokenizer.model").write_text("{}"), ["tokenizer.model", "SentencePiece"]),
    "too few tokens": (lambda: write_dataset(Path("valid"), 16, 1), ["valid.bin", "16 tokens", "train.sequence_length"]),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, workplace: Path) -> None:
    damage, parts = DATA[name]
    damage()
    assert_says(refused("train", *CONFIG, ranks=2), *parts)


def test_a_prefix_with_its_suffix(workplace: Path) -> None:
    assert_says(refused("train", *CONFIG, "--data.train", "train.bin"), "train.bin.idx", "without .bin")


def test_a_misspelt_prefix_is_told_its_neighbours(workplace: Path) -> None:
    assert_says(refused("train", *CONFIG, "--data.train", "tra"), "tra.idx", "prefixes there: train")


def test_token_ids_beyond_the_vocabulary(workplace: Path) -> None:
    message = refused("train", *CONFIG, "--model.vocab_size", 200, ranks=2)
    assert_says(message, "train.bin", "token id", "outside the vocabulary of 200", "set model.vocab_size")


def test_a_tokenizer_larger_than_the_vocabulary(workplace: Path) -> None:
    write_dataset(Path("train"), 500, 1, vocab_size=90)
    write_dataset(Path("valid"), 500, 1, vocab_size=90)
    message = refused("train", *CONFIG, "--model.vocab_size", 100)
    assert_says(message, "tokenizer.model", f"{VOCAB_SIZE} pieces", f"--model.vocab_size {VOCAB_SIZE}")


def move_away(rank: int) -> None:
    """Only rank 1 misses the files with relative paths."""
    if rank == 1:
        os.chdir("/")


def test_data_that_one_rank_lacks(workplace: Path) -> None:
    message = refused("train", "--config", workplace / "config.toml", ranks=4, change=move_away)
    assert_says(message, "error (rank 1): ", "train.idx", "No such file")


def fail_reading(rank: int) -> None:
    """The second rank's disk fails in mid-training."""

    def read(*arguments):
        raise DataError("train.bin: became shorter while in use")

    if rank == 1:
        Loader.micro_batches = read


def test_an_error_that_one_rank_meets_on_the_way_is_said(workplace: Path) -> None:
    """The other rank loses its partner, and says that; the launcher ends what would still wait."""
    ended = start("train", *CONFIG, ranks=2, change=fail_reading)
    assert ended[1].code == 78 and ended[1].err == "error (rank 1): train.bin: became shorter while in use\n"
    assert ended[0].code != 0


# checkpoints


@pytest.fixture
def checkpoint(run: Path, workplace: Path) -> Path:
    """A step to damage, in the checkpoints folder of the run that is about to start."""
    return Path(shutil.copytree(run / "checkpoints/step_00000004", "run/checkpoints/step_00000004"))


CHANGED_MODELS = {
    "model.ffn_hidden_size": (64, 48),
    "model.num_kv_heads": (4, 2),
    "model.num_layers": (4, 2),
    "model.rope_theta": (5000.0, 10000.0),
    "model.tie_embeddings": ("true", "False"),
}


@pytest.mark.parametrize("field", CHANGED_MODELS)
def test_a_checkpoint_of_another_model(field: str, run: Path, workplace: Path) -> None:
    ours, stored = CHANGED_MODELS[field]
    flags = ["--checkpoint.load", run, "--log.directory", "other", f"--{field}", ours]
    message = refused("train", *CONFIG, *flags, ranks=2)
    this_run = f"this run has {str(ours).capitalize()}"
    assert_says(message, "another model", f"{field} = {stored}", this_run, "--checkpoint.load none")


@pytest.mark.parametrize("name", ["weights-00000.safetensors", "optimizer-00000.safetensors", "manifest.json", "COMMIT"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_flipped_byte(name: str, ranks: int, checkpoint: Path) -> None:
    flip_byte(checkpoint / name)
    assert_says(refused("train", *CONFIG, ranks=ranks), "step_00000004", name, "damaged")


def test_a_truncated_file(checkpoint: Path) -> None:
    truncate(str(checkpoint / "optimizer-00000.safetensors"))
    assert_says(refused("train", *CONFIG, ranks=2), "optimizer-00000.safetensors", "truncated")


def test_an_unfinished_copy(checkpoint: Path) -> None:
    (checkpoint / "COMMIT").unlink()
    assert_says(refused("train", *CONFIG), "COMMIT", "incomplete copy")


@pytest.mark.parametrize("program", ["train", "evaluate", "generate"])
def test_no_checkpoint_there(program: str, workplace: Path) -> None:
    flags = {
        "train": [*CONFIG, "--checkpoint.load", "elsewhere"],
        "evaluate": ["--checkpoint", "elsewhere", "--data", "valid"],
        "generate": ["--checkpoint", "elsewhere", "--prompt", "x"],
    }
    assert_says(refused(program, *flags[program], ranks=2), "elsewhere does not exist", "checkpoints/step_*")
    Path("elsewhere").mkdir()
    assert_says(refused(program, *flags[program]), "no checkpoint in elsewhere", "found it empty")


def test_starting_afresh_over_a_run_with_checkpoints(run: Path, workplace: Path) -> None:
    """It would fail at the first save, after the time was spent, and the old metrics would be gone."""
    shutil.copytree(run, "old")
    for load in ("none", "old/checkpoints/step_00000002"):
        message = refused("train", *CONFIG, "--log.directory", "old", "--checkpoint.load", load, ranks=2)
        assert_says(message, "old/checkpoints", "step 6", "--checkpoint.load auto", "another --log.directory")
    assert values(Path("old")) == values(run)


# the run directory


def test_a_file_in_the_way_of_the_run_directory(workplace: Path) -> None:
    Path("taken").write_text("a file")
    message = refused("train", *CONFIG, "--log.directory", "taken/run", ranks=2)
    assert_says(message, "log.directory = taken/run", "Not a directory", "set --log.directory")


def test_a_run_directory_that_cannot_be_written(workplace: Path) -> None:
    message = refused("train", *CONFIG, "--log.directory", "/proc/run")  # even root cannot
    assert_says(message, "log.directory = /proc/run", "/proc/run")


def test_a_folder_in_the_way_of_a_file(workplace: Path) -> None:
    Path("run/config.toml").mkdir(parents=True)
    assert_says(refused("train", *CONFIG, ranks=2), "run/config.toml", "Is a directory")


# evaluation and generation

EVALUATE = {
    "nothing": ([], ["--checkpoint, --data", "--help"]),
    "wrong data": (["--checkpoint", "RUN", "--data", "vali"], ["vali.idx", "prefixes there: valid"]),
    "unknown flag": (["--checkpoint", "RUN", "--data", "valid", "--token", 5], ["--token;", "--tokens"]),
    "unknown field": (["--checkpoint", "RUN", "--data", "valid", "--parallel.tpp", 5], ["parallel.tpp", "parallel.tp"]),
    "negative tokens": (["--checkpoint", "RUN", "--data", "valid", "--tokens", -5], ["--tokens -5"]),
    "tokens in words": (["--checkpoint", "RUN", "--data", "valid", "--tokens", "all"], ["--tokens", "'all'"]),
    "world size": (["--checkpoint", "RUN", "--data", "valid", "--parallel.tp", 4], ["= 4, and is 2", "start 4 processes"]),
    "a file as checkpoint": (["--checkpoint", "RUN/metrics.jsonl", "--data", "valid"], ["metrics.jsonl is a file"]),
    "another model": (
        ["--checkpoint", "RUN", "--data", "valid", "--model.ffn_hidden_size", 64],
        ["feed_forward", "another model"],
    ),
}


@pytest.mark.parametrize("name", EVALUATE)
def test_evaluate(name: str, run: Path, workplace: Path) -> None:
    flags, parts = EVALUATE[name]
    assert_says(refused("evaluate", *(str(flag).replace("RUN", str(run)) for flag in flags), ranks=2), *parts)


GENERATE = {
    "no prompt": ([], ["--prompt"]),
    "a prompt without quotes": (["--prompt", "two", "words"], ["'words'", "quotes"]),
    "underscore": (["--prompt", "x", "--max_tokens", 5], ["--max_tokens;", "--max-tokens"]),
    "no tokens": (["--prompt", "x", "--max-tokens", 0], ["--max-tokens 0"]),
    "top-p": (["--prompt", "x", "--top-p", 0], ["--top-p 0.0", "(0, 1]"]),
    "temperature": (["--prompt", "x", "--temperature", -1], ["--temperature -1.0"]),
    "no such tokenizer": (["--prompt", "x", "--tokenizer", "nosuch.model"], ["nosuch.model", "No such file"]),
    "foreign tokenizer": (["--prompt", "x", "--tokenizer", "config.toml"], ["config.toml", "SentencePiece"]),
}


@pytest.mark.parametrize("name", GENERATE)
def test_generate(name: str, run: Path, workplace: Path) -> None:
    flags, parts = GENERATE[name]
    assert_says(refused("generate", "--checkpoint", run, *flags, ranks=2), *parts)


@pytest.mark.parametrize("name", ["weights-00000.safetensors", "manifest.json", "tokenizer.model"])
def test_generate_from_a_flipped_byte(name: str, checkpoint: Path) -> None:
    flip_byte(checkpoint / name)
    assert_says(refused("generate", "--checkpoint", checkpoint, "--prompt", "x", ranks=2), name, "damaged")


def test_weights_alone_are_enough_to_evaluate(checkpoint: Path) -> None:
    (checkpoint / "optimizer-00000.safetensors").unlink()
    assert "nats/token" in succeed("evaluate", "--checkpoint", checkpoint, "--data", "valid")
    assert succeed("generate", "--checkpoint", checkpoint, "--prompt", "def", "--greedy").startswith("def")
    assert_says(refused("train", *CONFIG), "optimizer-00000.safetensors", "No such file")


def test_a_checkpoint_without_a_tokenizer(workplace: Path) -> None:
    succeed("train", *CONFIG, "--data.tokenizer", "", "--train.exit_step", 1, "--log.directory", "bare")
    message = refused("generate", "--checkpoint", "bare", "--prompt", "x", ranks=2)
    assert_says(message, "holds no tokenizer.model", "--tokenizer")
    assert succeed("generate", "--checkpoint", "bare", "--prompt", "x", "--tokenizer", "tokenizer.model")
