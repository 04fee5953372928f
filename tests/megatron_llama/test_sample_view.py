"""A sample as training sees it: what is printed is what the loader gives, and where it is said to be from."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_llama import sample_view
from megatron_llama.config import DataSource, RunConfig, load_config
from megatron_llama.data.indexed import IndexedDatasetWriter
from megatron_llama.run_data import config_of_run, make_loader, open_run_data
from megatron_llama.sample_view import sample_lines
from megatron_llama.state import Position, SkippedSamples
from megatron_llama.tokenizer import Tokenizer
from parallel.errors import CheckpointError, ConfigError
from tests.megatron_llama.programs import SEQUENCE_LENGTH, STEPS, succeed

HEAD = re.compile(r"sample     (\d+): step (\d+), data rank (\d+) of (\d+), micro-batch (\d+), row (\d+)")
DOCUMENT = re.compile(
    r"inputs (\d+)-(\d+): document (\d+), its tokens (\d+)-(\d+) of (\d+); positions (\d+)-(\d+); (\d+) targets count"
)
PADDING = re.compile(r"inputs (\d+)-(\d+): padding, positions (\d+)-(\d+)")
BATCH_SIZE = 8  # on two data ranks, each reads two micro-batches of two
LENGTHS = {"a": [5, 1, 30, 12, 16, 17, 3, 40, 9, 2, 33] * 2, "b": [7, 8, 21] * 6}  # of documents, in tokens
FIRST_ID = {"a": 0, "b": 2000}


@dataclass(frozen=True)
class Shown:
    """One sample, read back from its lines."""

    place: tuple[int, ...]  # sample, step, data rank, data ranks, micro-batch, row
    source: str
    documents: list[tuple[int, ...]]
    ids: list[int]  # of the inputs
    last_target: int
    targets: str


def read_back(lines: list[str]) -> Shown:
    documents, ids = [], []
    for line, content in zip(lines, lines[1:], strict=False):
        if found := DOCUMENT.fullmatch(line):
            documents.append(tuple(map(int, found.groups())))
            ids += map(int, content.split())
    return Shown(
        tuple(map(int, HEAD.fullmatch(lines[0]).groups())),
        Path(lines[1].removeprefix("source     ")).name,
        documents,
        ids,
        int(lines[-1]),
        lines[2].removeprefix("targets    "),
    )


@pytest.fixture
def config(workplace: Path) -> RunConfig:
    """Two sources in which no id occurs twice, so that an id says where it is from."""
    for name, lengths in LENGTHS.items():
        with IndexedDatasetWriter(workplace / name, np.uint16) as writer:
            ids = FIRST_ID[name] + np.arange(sum(lengths))
            for document in np.split(ids, np.cumsum(lengths)[:-1]):
                writer.add_document(document)
    config = load_config(["--config", "config.toml", "--model.vocab_size", "4000", "--data.tokenizer", ""])
    data = replace(config.data, train=(DataSource("a", 0.7), DataSource("b", 0.3)), valid=())
    return replace(config, data=data, train=replace(config.train, global_batch_size=BATCH_SIZE, micro_batch_size=2))


SETTINGS = {
    "masked": {},
    "attention across documents": {"document_mask": False},
    "packed": {"packing": "best_fit"},
    "Megatron's order": {"order": "megatron"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_all_samples_of_a_run(name: str, config: RunConfig) -> None:
    config = replace(config, data=replace(config.data, **SETTINGS[name]), parallel=replace(config.parallel, dp=2))
    data, _ = open_run_data(config)
    loaders = [make_loader(config, data, rank, 2) for rank in range(2)]
    places = set()
    for sample in range(STEPS * BATCH_SIZE):
        shown = read_back(sample_lines(config, sample, None))
        number, step, rank, ranks, micro_batch, row = shown.place
        assert number == sample and ranks == 2 and step == sample // BATCH_SIZE + 1
        places.add((step, rank, micro_batch, row))
        read = loaders[rank].micro_batches((step - 1) * BATCH_SIZE)[micro_batch]
        assert shown.ids == read.tokens[: len(shown.ids), row].tolist()
        assert shown.last_target == read.targets[-1, row]
        positions = read.positions[:, row if read.positions.shape[1] > 1 else 0].tolist()
        begins = np.cumsum([0, *LENGTHS[shown.source]]) + FIRST_ID[shown.source]
        for start, end, document, first, last, size, first_position, last_position, counted in shown.documents:
            assert LENGTHS[shown.source][document] == size and end - start == last - first
            assert shown.ids[start : end + 1] == list(range(begins[document] + first, begins[document] + last + 1))
            assert (first_position, last_position) == (positions[start], positions[end])
            assert counted == np.count_nonzero(read.loss_mask[start : end + 1, row])
        total = np.count_nonzero(read.loss_mask[:, row])
        assert shown.targets.startswith(f"{total} of {SEQUENCE_LENGTH} count")
    assert len(places) == STEPS * BATCH_SIZE


def test_positions_begin_anew_in_each_document_or_go_on(config: RunConfig) -> None:
    lines = sample_lines(config, 3, None)
    assert "attention  inside documents" in lines
    assert len(read_back(lines).documents) > 1 and all(found[6] == 0 for found in read_back(lines).documents)
    lines = sample_lines(replace(config, data=replace(config.data, document_mask=False)), 3, None)
    assert "attention  across documents" in lines and all(found[6] == found[0] for found in read_back(lines).documents)


def test_padding_and_the_targets_that_do_not_count(config: RunConfig) -> None:
    """Packed: the last token of each document but one that fills the sample has no target that counts."""
    config = replace(config, data=replace(config.data, packing="best_fit"))
    padded = 0
    for sample in range(STEPS * BATCH_SIZE):
        lines = sample_lines(config, sample, None)
        missing = re.search(r", not those of the inputs (.*)", lines[2])
        named = {int(n) for part in (missing[1].split(", ") if missing else []) for n in expand(part)}
        for start, end, *_, counted in read_back(lines).documents:
            assert counted == end - start + 1 - len(named & set(range(start, end + 1)))
        padding = [found for line in lines if (found := PADDING.fullmatch(line))]
        padded += len(padding)
        assert all(set(range(int(found[1]), int(found[2]) + 1)) <= named for found in padding)
    assert padded


def expand(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def test_text_instead_of_ids(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    tokenizer = Tokenizer("tokenizer.model")
    config = load_config(["--config", "config.toml"])
    ids = read_back(sample_lines(config, 5, None)).ids
    text = [line.removeprefix("  | ") for line in sample_lines(config, 5, tokenizer) if line.startswith("  | ")]
    assert "\n".join(text).startswith("\n".join(tokenizer.decode(ids).splitlines()))


def test_a_run_by_its_file_its_directory_or_a_checkpoint(run: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    expected = sample_lines(load_config(["--config", "config.toml"]), 9, None)
    for path in (Path("config.toml"), run / "config.toml", run, run / "checkpoints", run / "checkpoints/step_00000002"):
        assert sample_lines(config_of_run(path), 9, None) == expected
    with pytest.raises(ConfigError, match=r"--sample 24: the run reads the samples 0 to 23"):
        sample_lines(config_of_run(run), 24, None)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        config_of_run(run / "logs")


def test_after_a_change_of_the_mixture(workplace: Path) -> None:
    """Samples from before the change are those of a checkpoint from before it."""
    same = ("--config", "config.toml", "--train.steps", STEPS)
    succeed("train", *same, "--train.exit_step", 2)
    mixture = '[{prefix = "train", weight = 1}, {prefix = "valid", weight = 1}]'
    succeed("train", *same, "--data.train", mixture, "--train.exit_step", 4)
    before, after = (config_of_run(Path(f"run/checkpoints/step_{step:08d}")) for step in (2, 4))
    assert read_back(sample_lines(before, 7, None)).source == "train"
    assert {read_back(sample_lines(after, sample, None)).source for sample in range(8, 24)} == {"train", "valid"}
    with pytest.raises(ConfigError, match="--sample 7 was read before the mixture or the sequence length changed at sample 8"):
        sample_lines(after, 7, None)


def test_samples_that_a_run_has_left_out(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In step 3 it went back to step 1: samples 8 to 23 are left out, and step 2 begins with sample 24."""
    data, _ = open_run_data(config)
    left_out = (SkippedSamples(8, 24, 3, "went back: spike"), SkippedSamples(24, 32, 2, "skipped: not finite"))
    position = Position(step=2, samples=32, tokens=2 * BATCH_SIZE * SEQUENCE_LENGTH, skipped_samples=left_out)
    monkeypatch.setattr(sample_view, "open_run_data", lambda config: (data, position))
    steps = {sample: read_back(sample_lines(config, sample, None)).place[1] for sample in (0, 7, 24, 31, 32, 39)}
    assert steps == {0: 1, 7: 1, 24: 2, 31: 2, 32: 3, 39: 3}
    with pytest.raises(ConfigError, match="left out, 8 to 23: at step 3 it went back"):
        sample_lines(config, 20, None)
