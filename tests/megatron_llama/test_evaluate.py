"""Held-out loss: the plain mean over the windows of a dataset, in every layout and during training alike."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from megatron_llama.data.indexed import IndexedDataset
from tests.megatron_llama.programs import SEQUENCE_LENGTH, full_weights, model_config, succeed, values, write_dataset
from tests.parity import hugging_face

NUM_WINDOWS = 9
REFERENCE_TOLERANCE = 2e-6  # nats; another implementation in fp32
LAYOUT_TOLERANCE = 1e-6  # nats; fp32 sums over ranks in another order
LINE = re.compile(r"(\S+): loss (\S+) nats/token, perplexity (\S+), ([\d,]+) tokens\n")

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


def evaluate(run: Path, *flags: object, data: tuple[object, ...] = ("valid",), ranks: int = 1) -> tuple[float, int]:
    """Loss and tokens that the program prints."""
    out = succeed("evaluate", "--checkpoint", run, "--data", *data, *flags, ranks=ranks)
    directory, loss, perplexity, tokens = LINE.fullmatch(out).groups()
    assert directory.startswith(str(run)) and abs(float(perplexity) - math.exp(float(loss))) < 1e-4
    return float(loss), int(tokens.replace(",", ""))


def plain_loss(run: Path, prefix: Path, windows: range) -> float:
    """The same by transformers, window after window."""
    module = hugging_face.build(model_config(), full_weights(run / "checkpoints/step_00000006"))
    dataset, losses = IndexedDataset(prefix), []
    for window in windows:
        tokens = torch.from_numpy(dataset.read(window * SEQUENCE_LENGTH, SEQUENCE_LENGTH + 1))
        with torch.no_grad():
            logits = module(tokens[None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:]).double())
    return torch.stack(losses).mean().item()


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


def test_several_datasets(run: Path, workplace: Path) -> None:
    write_dataset(workplace / "second", 4 * SEQUENCE_LENGTH + 1, seed=5)
    loss, tokens = evaluate(run, data=("valid", "second"))
    first, second = evaluate(run), evaluate(run, data=("second",))
    assert tokens == first[1] + second[1] == 13 * SEQUENCE_LENGTH
    assert abs(loss - (first[0] * first[1] + second[0] * second[1]) / tokens) < LAYOUT_TOLERANCE


def test_an_odd_length_under_sequence_parallelism(run: Path, workplace: Path) -> None:
    flags = ["--parallel.tp", 2, "--train.sequence_length", 15, "--parallel.sequence_parallel", "false"]
    assert abs(evaluate(run, *flags, ranks=2)[0] - evaluate(run, "--train.sequence_length", 15)[0]) < LAYOUT_TOLERANCE
