"""The training program and what it says about its data: limits, another mixture and another length on resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_llama.config import DataConfig, DataSource
from megatron_llama.data.indexed import IndexedDatasetWriter
from megatron_llama.data.training_data import open_training_data
from tests.megatron_llama.programs import (
    BATCH_SIZE,
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
from tests.megatron_llama.test_train import LAYOUT_TOLERANCE, assert_same_run
from tests.parity import hugging_face

MIXED = '[{prefix = "train", weight = 0.7}, {prefix = "more", weight = 0.3, max_epochs = 2}]'


def test_a_run_in_three_legs(workplace: Path) -> None:
    write_dataset(workplace / "more", 1000, seed=3)
    flags = ["--config", "config.toml", "--data.train", MIXED]
    first = succeed("train", *flags, "--train.exit_step", 2)
    assert " 0.11 " in first and "max epochs" in first and "goes on where" not in first
    longer = ["--train.sequence_length", 32, "--train.global_batch_size", 2]
    second = succeed("train", *flags, *longer, "--train.exit_step", 4, ranks=2)
    assert "the sequence length changes from 16 to 32 at sample 8" in second
    third = succeed("train", "--config", "config.toml", *longer, "--data.train", '["more", "train"]')
    assert "the mixture changes at sample 12" in third and "starting at step 4" in third
    assert len(values(workplace / "run")) == 6


def test_a_limit_ends_a_run_before_it_starts(workplace: Path) -> None:
    write_dataset(workplace / "more", 1000, seed=3)
    flags = ["--config", "config.toml", "--data.train", MIXED, "--train.steps", 300, "--train.exit_step", 1]
    ended = start("train", *flags, ranks=2)
    said = "".join(rank.err for rank in ended)
    assert [rank.code for rank in ended] == [78, 78] and said.count("error") == 1 and "2.00 exceeded" in said
    out = succeed("train", *flags, "--data.on_cap", "redistribute")
    assert out.index("as configured:") < out.index("2.00 exceeded") < out.index("as read:")


def test_megatron_order_goes_on_from_consumed_samples(workplace: Path) -> None:
    order = ["--config", "config.toml", "--data.order", "megatron"]
    whole = succeed("train", *order, "--log.directory", "whole", "--optimizer.learning_rate", 1e-30)
    assert "order megatron" in whole and "Megatron's index arrays" in whole
    late = ["--data.first_sample", 8, "--train.steps", 4, "--log.directory", "late", "--optimizer.learning_rate", 1e-30]
    succeed("train", *order, *late)
    assert values(workplace / "late") == values(workplace / "whole")[2:]  # weights stay as they are: the same samples


# documents: masks, and packing


@pytest.fixture
def documents(workplace: Path) -> Path:
    """A corpus in the workplace, of short documents and of some longer than a sample; packed, they leave padding."""
    random = np.random.default_rng(4)
    lengths = random.choice([1, 4, 7, 12, 30], 300)
    with IndexedDatasetWriter(workplace / "documents", np.uint16) as writer:
        writer.add_documents(random.integers(3, VOCAB_SIZE, lengths.sum()), lengths)
    return workplace / "documents"


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_longer_sequences_in_the_middle_of_a_run(packing: str, documents: Path, workplace: Path) -> None:
    """Masks on. Stopped in the middle of the second stage, on one rank or two: as if it had not been stopped."""
    flags = ["--config", "config.toml", "--data.train", documents, "--data.packing", packing]
    longer = [*flags, "--train.sequence_length", 32, "--train.global_batch_size", 2]
    for name, stops in (("whole", [(0, 1)]), ("stopped", [(4, 1), (0, 1)]), ("ranks", [(4, 2), (0, 1)])):
        folder = ["--log.directory", name]
        succeed("train", *flags, *folder, "--train.exit_step", 2)
        for exit_step, ranks in stops:
            said = succeed("train", *longer, *folder, "--train.exit_step", exit_step, ranks=ranks)
            assert ("the sequence length changes from 16 to 32" in said) == ((exit_step, ranks) == stops[0])
    assert_same_run(workplace / "stopped", workplace / "whole")
    found, expected = values(workplace / "ranks"), values(workplace / "whole")
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < LAYOUT_TOLERANCE


def test_loss_of_a_packed_run_is_that_of_its_documents_alone(documents: Path, workplace: Path) -> None:
    """Step 3 against transformers with the weights of step 2, over the pieces of documents that step 3 reads."""
    flags = ["--config", "config.toml", "--data.train", documents, "--data.packing", "best_fit"]
    said = succeed("train", *flags, "--checkpoint.save_every", 2, "--train.exit_step", 3, ranks=2)
    assert said.count("documents: packed into ") == 1
    data = DataConfig(train=(DataSource(str(documents)),), packing="best_fit")
    blend = open_training_data(data, SEQUENCE_LENGTH, VOCAB_SIZE, 100).blend
    samples = blend.pieces(np.arange(2 * BATCH_SIZE, 3 * BATCH_SIZE))
    assert max(map(len, samples)) > 1 and any(sum(piece.num_tokens for piece in s) <= SEQUENCE_LENGTH for s in samples)
    module = hugging_face.build(model_config(), full_weights(workplace / "run/checkpoints/step_00000002"))
    losses = []
    for piece in (piece for pieces in samples for piece in pieces):
        text = torch.from_numpy(blend.sources[0].dataset.read(piece.start_token, piece.num_tokens))
        with torch.no_grad():
            losses.append(F.cross_entropy(module(text[None, :-1]).logits[0], text[1:], reduction="none"))
    assert abs(records(workplace / "run")[3]["loss"] - torch.cat(losses).mean().item()) < 2e-6  # fp32 noise


def test_packing_is_switched_on_request_alone(documents: Path, workplace: Path) -> None:
    flags = ["--config", "config.toml", "--data.train", documents]
    succeed("train", *flags, "--train.exit_step", 2)
    (ended,) = start("train", *flags, "--data.packing", "best_fit")
    assert ended.code == 78 and "data.packing none in the checkpoint, now best_fit" in ended.err
    said = succeed("train", *flags, "--data.packing", "best_fit", "--data.allow_changed", "true")
    assert "now best_fit: text may be read again" in said and len(values(workplace / "run")) == 6


def test_megatron_order_has_no_masks(documents: Path, workplace: Path) -> None:
    """Masks are on unless the order is Megatron's, whatever `data.document_mask` says."""
    flags = ["--config", "config.toml", "--data.train", documents, "--train.exit_step", 1]
    losses = {}
    for order in ("windows", "megatron"):
        for mask in ("true", "false"):
            run = f"{order}-{mask}"
            succeed("train", *flags, "--data.order", order, "--data.document_mask", mask, "--log.directory", run)
            losses[order, mask] = values(workplace / run)
    assert losses["megatron", "true"] == losses["megatron", "false"]
    assert losses["windows", "true"] != losses["windows", "false"]
