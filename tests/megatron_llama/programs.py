"""Runs a program's `main` on forked ranks, as torchrun would start it, and keeps what each rank prints.

Also the tiny model, data and tokenizer that the tests of the programs share.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tomllib
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_llama import evaluate, generate, train
from megatron_llama.config import ModelConfig, from_dict
from megatron_llama.data.indexed import IndexedDatasetWriter
from megatron_llama.program import run_program
from parallel.checkpoint.load import load_tensors, read_manifest
from parallel.shards import Box, TensorBox
from tests.ranks import run_ranks

PROGRAMS = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main}
VOCAB_SIZE = 384
SEQUENCE_LENGTH = 16
BATCH_SIZE = 4
STEPS = 6
TRAIN_TOKENS, VALID_TOKENS = 3000, 150  # 150 are 9 windows of 16: neither 2 nor 4 divides them

CONFIG = f"""
[model]
num_layers = 2
hidden_size = 32
num_heads = 4
num_kv_heads = 2
ffn_hidden_size = 48
vocab_size = {VOCAB_SIZE}
init_std = 0.05

[data]
train = ["train"]
valid = ["valid"]
tokenizer = "tokenizer.model"

[optimizer]
learning_rate = 5e-3
eps = 1e-5
warmup_steps = 2

[train]
steps = {STEPS}
global_batch_size = {BATCH_SIZE}
micro_batch_size = 1
sequence_length = {SEQUENCE_LENGTH}
dtype = "fp32"
device = "cpu"
evaluate_tokens = {VALID_TOKENS}

[log]
directory = "run"
every = 2
"""

Change = Callable[[int], Any]  # what a rank does before its program starts, given its rank


@dataclass(frozen=True)
class Ended:
    """How one rank's program ended."""

    code: int
    out: str
    err: str


def start(program: str, *argv: object, ranks: int = 1, change: Change | None = None) -> list[Ended]:
    """Run `python -m megatron_llama.PROGRAM argv` on `ranks` processes, whatever comes of it."""
    words = [str(word) for word in argv]
    with TemporaryDirectory() as folder:
        return run_ranks(ranks, _rank_main, program, words, _free_port(), Path(folder), change, joined=False)


def succeed(program: str, *argv: object, ranks: int = 1, change: Change | None = None) -> str:
    """As `start`, for a program that has to end well; returns what rank 0 prints."""
    ended = start(program, *argv, ranks=ranks, change=change)
    assert [rank.code for rank in ended] == [0] * ranks, "\n".join(rank.out + rank.err for rank in ended)
    return ended[0].out


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank_main(
    rank: int, world_size: int, program: str, argv: list[str], port: int, folder: Path, change: Change | None
) -> Ended:
    if world_size > 1:
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in {**facts, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}
    out, err = folder / f"out-{rank}", folder / f"err-{rank}"
    with open(out, "w") as out_file, open(err, "w") as err_file, redirect_stdout(out_file), redirect_stderr(err_file):
        if change is not None:
            change(rank)
        code = _exit_code(lambda: run_program(lambda launch: PROGRAMS[program](launch, argv)))
    return Ended(code, out.read_text(), err.read_text())


def _exit_code(program: Callable[[], int]) -> int:
    """What the interpreter would exit with."""
    try:
        return program()
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        return 1


def write_dataset(prefix: Path, num_tokens: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Path:
    """A dataset of one document in which a token mostly decides the next, so that there is something to learn."""
    random = np.random.default_rng(seed)
    tokens = [3]
    for jump in random.random(num_tokens - 1) < 0.2:
        tokens.append(int(random.integers(3, vocab_size)) if jump else 3 + (tokens[-1] * 7) % (vocab_size - 3))
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(tokens)
    return prefix


def source_text() -> str:
    return Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]


def records(run_directory: Path, field: str = "loss") -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl that have `field`, by step."""
    path = Path(run_directory) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line for line in lines if field in line}


def values(run_directory: Path, field: str = "loss") -> list[float]:
    """One field of metrics.jsonl, in the order of the steps."""
    return [line[field] for line in records(run_directory, field).values()]


def full_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The whole weights of a step directory by their logical names."""
    manifest = read_manifest(checkpoint)
    weights = {name: torch.empty(info.shape) for name, info in manifest.tensors.items() if info.group == "weights"}
    boxes = [TensorBox(name, tuple(tensor.shape), Box.whole(tuple(tensor.shape)), tensor) for name, tensor in weights.items()]
    load_tensors(checkpoint, boxes, manifest)
    return weights


def model_config() -> ModelConfig:
    """The model of CONFIG."""
    return from_dict(tomllib.loads(CONFIG)).model
