"""A folder to run programs in, and runs that several tests look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_llama.data.tokenizer_training import train_tokenizer
from tests.megatron_llama.programs import CONFIG, TRAIN_TOKENS, VALID_TOKENS, VOCAB_SIZE, source_text, succeed, write_dataset


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.toml, train, valid and tokenizer.model; not to be changed."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "config.toml").write_text(CONFIG)
    write_dataset(folder / "train", TRAIN_TOKENS, seed=1)
    write_dataset(folder / "valid", VALID_TOKENS, seed=2)
    train_tokenizer([source_text()], folder / "tokenizer", VOCAB_SIZE, 10**6, 1)
    return folder


@pytest.fixture
def workplace(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, and the working directory of the test."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def run(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of an undisturbed training on one process, with checkpoints at 2, 4 and 6; not to be changed."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("undisturbed") / "run"
    os.chdir(project)
    try:
        succeed("train", "--config", "config.toml", "--checkpoint.save_every", 2, "--checkpoint.keep", 0,
                "--train.evaluate_every", 3, "--log.directory", folder)  # fmt: skip
    finally:
        os.chdir(before)
    return folder
