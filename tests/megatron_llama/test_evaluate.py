"""Held-out loss: the plain mean over the windows of each dataset, in every layout and during training alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_llama.config import load_config, validate_layout
from megatron_llama.data.held_out import open_held_out, source_names
from megatron_llama.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_llama.evaluate import Evaluation, SourceLoss
from megatron_llama.inference import _fit
from parallel.errors import ConfigError
from tests.megatron_llama.programs import (
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    full_weights,
    model_config,
    records,
    start,
    succeed,
    values,
    write_dataset,
)
from tests.parity import hugging_face

NUM_WINDOWS = 9
REFERENCE_TOLERANCE = 2e-6  # nats; another implementation in fp32
LAYOUT_TOLERANCE = 1e-6  # nats; fp32 sums over ranks in another order
LETTERS = (9, 1, 30, 5, 14, 2, 25, 80)  # lengths of documents, in tokens

LAYOUTS = {
    "alone, micro-batches of 2": (1, ["--train.micro_batch_size", 2]),
    "alone, one micro-batch for all": (1, ["--train.micro_batch_size", 16]),
    "tp2": (2, ["--parallel.tp", 2, "--parallel.sequence_parallel", "false"]),
    "tp2-sp": (2, ["--parallel.tp", 2]),
    "tp4, more than kv heads": (4, ["--parallel.tp", 4]),
    "pp2": (2, ["--parallel.pp", 2]),
    "dp2": (2, []),
    "dp4, micro-batches of 2": (4, ["--train.micro_batch_size", 2]),
    "tp2-pp2": (4, ["--parallel.tp", 2, "--parallel.pp", 2]),
    "pp2-dp2": (4, ["--parallel.pp", 2]),
}


def evaluate_all(run: Path, *flags: object, data: tuple[object, ...] = ("valid",), ranks: int = 1) -> dict[str, Any]:
    """What the program prints for other programs."""
    found = json.loads(succeed("evaluate", "--checkpoint", run, "--data", *data, "--json", *flags, ranks=ranks))
    assert found["checkpoint"].startswith(str(run)) and found["valid_loss"] == found["all"]["loss"]
    return found


def evaluate(run: Path, *flags: object, data: tuple[object, ...] = ("valid",), ranks: int = 1) -> tuple[float, int]:
    """Loss and tokens of all datasets together."""
    total = evaluate_all(run, *flags, data=data, ranks=ranks)["all"]
    return total["loss"], total["tokens"]


def write_letters(prefix: Path, text_bytes: int | None = None) -> None:
    """A dataset of short documents, with a sidecar where `text_bytes` are given."""
    random = np.random.default_rng(11)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in LETTERS:
            writer.add_document(random.integers(3, VOCAB_SIZE, length))
        writer.finish(text_bytes and {"tokens": sum(LETTERS), "text_bytes": text_bytes, "max_token_id": VOCAB_SIZE - 1})


def plain_loss(run: Path, prefix: Path, windows: range, lengths: tuple[int, ...] = ()) -> float:
    """The same by transformers, document after document of each window; `lengths` are those of all documents."""
    module = hugging_face.build(model_config(), full_weights(run / "checkpoints/step_00000006"))
    dataset, losses = IndexedDataset(prefix), []
    for window in windows:
        first = window * SEQUENCE_LENGTH
        tokens = torch.from_numpy(dataset.read(first, SEQUENCE_LENGTH + 1))
        starts = [int(place) - first for place in np.cumsum(lengths) if 0 < place - first < SEQUENCE_LENGTH]
        for begin, end in zip([0, *starts], [*starts, SEQUENCE_LENGTH], strict=True):
            with torch.no_grad():
                logits = module(tokens[None, begin:end]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[begin + 1 : end + 1], reduction="none").double())
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("count", [1, 5, NUM_WINDOWS])
def test_the_mean_over_the_windows(count: int, run: Path, workplace: Path) -> None:
    asked = 0 if count == NUM_WINDOWS else count * SEQUENCE_LENGTH + 3  # whole windows alone are read
    loss, tokens = evaluate(run, "--tokens", asked)
    assert tokens == count * SEQUENCE_LENGTH
    assert abs(loss - plain_loss(run, workplace / "valid", range(count))) < REFERENCE_TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_in_every_layout(layout: str, run: Path, workplace: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    loss, tokens = evaluate(run, *flags, ranks=ranks)
    assert tokens == NUM_WINDOWS * SEQUENCE_LENGTH
    assert abs(loss - evaluate(run)[0]) < LAYOUT_TOLERANCE


def test_a_pipeline_changes_no_bit(run: Path, workplace: Path) -> None:
    assert evaluate(run, "--parallel.pp", 2, ranks=2) == evaluate(run)


@pytest.mark.parametrize(("step", "ranks", "flags"), [(3, 2, ["--parallel.tp", 2]), (6, 4, ["--parallel.pp", 2])])
def test_training_reports_the_same(step: int, ranks: int, flags: list, run: Path, workplace: Path) -> None:
    """What a training in one layout writes to its metrics is what another layout measures on its checkpoint."""
    reported = values(run, "valid_loss")[step // 3 - 1]
    if step == 3:  # the run has no checkpoint there: train again, in one more layout
        succeed("train", "--config", "config.toml", "--train.exit_step", 3, ranks=2)
        reported_here = values(workplace / "run", "valid_loss")[-1]
        assert abs(reported_here - reported) < LAYOUT_TOLERANCE
        reported, run = reported_here, workplace / "run"
    assert abs(evaluate(run, *flags, ranks=ranks)[0] - reported) < LAYOUT_TOLERANCE


def test_attention_stays_inside_documents(run: Path, workplace: Path) -> None:
    write_letters(workplace / "letters")
    windows = range((sum(LETTERS) - 1) // SEQUENCE_LENGTH)
    masked, across = (evaluate(run, "--data.document_mask", on, data=("letters",))[0] for on in ("true", "false"))
    assert abs(masked - plain_loss(run, workplace / "letters", windows, LETTERS)) < REFERENCE_TOLERANCE
    assert abs(across - plain_loss(run, workplace / "letters", windows)) < REFERENCE_TOLERANCE
    assert abs(masked - across) > 1e-4  # nats; otherwise the mask would not be seen


SEVERAL = {
    "alone": (1, []),
    "micro-batches of 2, dp2": (2, ["--train.micro_batch_size", 2]),
    "tp2-pp2": (4, ["--parallel.tp", 2, "--parallel.pp", 2]),
}


@pytest.mark.parametrize("layout", SEVERAL)
def test_each_source_is_what_it_is_alone(layout: str, run: Path, workplace: Path) -> None:
    """9, 4 and 10 windows: micro-batches of 2 over 2 data ranks fit none of them."""
    ranks, flags = SEVERAL[layout]
    write_dataset(workplace / "second", 4 * SEQUENCE_LENGTH + 1, seed=5)
    write_letters(workplace / "letters")
    names = ("valid", "second", "letters")
    found = evaluate_all(run, *flags, data=names, ranks=ranks)
    assert list(found["valid"]) == list(names)
    alone = {name: evaluate(run, data=(name,)) for name in names}
    for name, (loss, tokens) in alone.items():
        assert abs(found["valid"][name]["loss"] - loss) < LAYOUT_TOLERANCE
        assert found["valid"][name]["perplexity"] == math.exp(found["valid"][name]["loss"])
        assert found["valid"][name]["tokens"] == tokens and "bits_per_byte" not in found["valid"][name]
    assert [tokens for _, tokens in alone.values()] == [9 * SEQUENCE_LENGTH, 4 * SEQUENCE_LENGTH, 10 * SEQUENCE_LENGTH]
    mean = sum(loss * tokens for loss, tokens in alone.values()) / (23 * SEQUENCE_LENGTH)
    assert abs(found["valid_loss"] - mean) < LAYOUT_TOLERANCE and found["all"]["tokens"] == 23 * SEQUENCE_LENGTH


def test_bits_per_byte(run: Path, workplace: Path) -> None:
    text_bytes = 500
    write_letters(workplace / "letters", text_bytes)
    found = evaluate_all(run, "--tokens", 3 * SEQUENCE_LENGTH, data=("letters",))["valid"]["letters"]
    bits = found["loss"] / math.log(2) * found["tokens"]
    assert found["bits_per_byte"] == pytest.approx(bits / (found["tokens"] * text_bytes / sum(LETTERS)), rel=1e-12)
    total = Evaluation([SourceLoss("a", 1.0, 30, 4.0), SourceLoss("b", 2.0, 10, 1.0)]).total
    assert total.loss == 1.25 and total.bits_per_byte == pytest.approx((30 + 20) / math.log(2) / (120 + 10), rel=1e-12)
    assert Evaluation([SourceLoss("a", 1.0, 30, 4.0), SourceLoss("b", 2.0, 10, None)]).total.bits_per_byte is None


def test_the_tables(run: Path, workplace: Path) -> None:
    write_letters(workplace / "letters", 500)
    found = evaluate_all(run, data=("valid", "letters"))
    out = succeed("evaluate", "--checkpoint", run, "--data", "valid", "letters")
    head, columns, *rows = out.splitlines()
    assert head.endswith(f"held-out loss {found['valid_loss']:.4f} nats/token over 304 tokens")
    assert columns.split() == ["source", "loss", "perplexity", "bits/byte", "tokens"]
    assert [row.split()[0] for row in rows] == ["valid", "letters", "all"]
    shown = found["valid"]["letters"]
    expected = [f"{shown['loss']:.4f}", f"{shown['perplexity']:,.2f}", f"{shown['bits_per_byte']:.4f}", "160"]
    assert rows[1].split()[1:] == expected and rows[0].split()[3] == "-"

    flags = ("--config", "config.toml", "--train.steps", 2, "--data.valid", '["valid", "letters"]')
    lines = succeed("train", *flags, "--log.directory", "two").splitlines()
    table = [line.split() for line in lines if line.startswith("    ")]
    assert [row[0] for row in table[-4:]] == ["source", "valid", "letters", "all"]
    (record,) = records(Path("two"), "valid_loss").values()
    assert list(record["valid"]) == ["valid", "letters"] and table[-3][1] == f"{record['valid']['valid']['loss']:.4f}"
    events = EventAccumulator("two/tensorboard")
    events.Reload()
    measures = {"loss", "perplexity", "bits_per_byte"}
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("valid/")}
    assert tags == {"valid/loss", *(f"valid/letters/{name}" for name in measures), "valid/valid/loss", "valid/valid/perplexity"}
    assert events.Scalars("valid/letters/loss")[0].value == pytest.approx(record["valid"]["letters"]["loss"], rel=1e-6)


def test_a_run_whose_optimizer_was_sharded_over_more_ranks_can_be_evaluated() -> None:
    stored = load_config(["--model.preset", "llama-7b", "--zero.shard_group_size", "8"])
    with pytest.raises(ConfigError, match="shard_group_size"):
        validate_layout(stored, 1)
    validate_layout(_fit(stored, 1), 1)


def test_how_sources_share_the_tokens(workplace: Path) -> None:
    write_dataset(workplace / "large", 100 * SEQUENCE_LENGTH + 1, seed=5)
    write_dataset(workplace / "small", 2 * SEQUENCE_LENGTH + 1, seed=6)

    def windows(tokens: int, *entries: tuple[str, float | None]) -> list[int]:
        sources = open_held_out(entries, SEQUENCE_LENGTH, VOCAB_SIZE, tokens, "data.valid")
        return [source.num_windows for source in sources]

    assert windows(51 * SEQUENCE_LENGTH, ("large", None), ("small", None)) == [50, 1]
    assert windows(9 * SEQUENCE_LENGTH, ("large", None), ("small", None)) == [9, 1]  # each has one at least
    assert windows(10**6, ("large", None), ("small", None)) == [100, 2]
    assert windows(20 * SEQUENCE_LENGTH, ("large", 0.9), ("small", 0.1)) == [18, 2]
    assert windows(20 * SEQUENCE_LENGTH, ("large", 0.5), ("small", 0.5)) == [10, 2]  # none is read twice


def test_names_of_sources() -> None:
    assert source_names(["data/web", "data/books"], "--data") == ["web", "books"]
    here = Path.cwd().name
    names = source_names(["a/valid", "./b/valid", "/x/b/valid", "valid", "code"], "--data")
    assert names == ["a/valid", f"{here}/b/valid", "x/b/valid", f"{here}/valid", "code"]
    assert source_names(["/b/valid", "/b/b/valid"], "--data") == ["b/valid", "b/b/valid"]
    with pytest.raises(ConfigError, match="data.valid: ./a/valid is there twice"):
        source_names(["a/valid", "./a/valid"], "data.valid")


def test_errors_of_held_out_data_name_their_setting(run: Path, workplace: Path) -> None:
    some_weighted = '["valid", {prefix = "train", weight = 0.5}]'
    (ended,) = start("train", "--config", "config.toml", "--data.valid", some_weighted)
    assert ended.code == 78 and ended.err.startswith("error: data.valid: valid has no weight")
    (ended,) = start("evaluate", "--checkpoint", run, "--data", "valid", "valid")
    assert ended.code == 78 and ended.err == "error: --data: valid is there twice; remove one of them\n"


def test_an_odd_length_under_sequence_parallelism(run: Path, workplace: Path) -> None:
    flags = ["--parallel.tp", 2, "--train.sequence_length", 15, "--parallel.sequence_parallel", "false"]
    assert abs(evaluate(run, *flags, ranks=2)[0] - evaluate(run, "--train.sequence_length", 15)[0]) < LAYOUT_TOLERANCE
