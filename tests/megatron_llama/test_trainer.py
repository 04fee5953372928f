"""What the training loop says of a step beside its loss: documents in the FLOPs, and time spent waiting for data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_llama import trainer, verdict
from megatron_llama.config import load_config
from megatron_llama.data.boundaries import boundaries
from megatron_llama.data.indexed import IndexedDatasetWriter
from megatron_llama.data.loader import MicroBatch, Prefetcher
from megatron_llama.flops import flops_per_token
from megatron_llama.step import TrainStep, squared_document_lengths
from tests.megatron_llama.programs import BATCH_SIZE, SEQUENCE_LENGTH, STEPS, records, succeed, values

SECONDS_OF_A_STEP = 0.75


def micro_batch(starts: list[list[int]] | None, sequence_length: int, samples: int) -> MicroBatch:
    tokens = torch.zeros((sequence_length, samples), dtype=torch.int64)
    positions, documents = torch.arange(sequence_length)[:, None], None
    if starts is not None:
        positions, documents = boundaries([np.array(inside, np.int64) for inside in starts], sequence_length)
    return MicroBatch(tokens, tokens, torch.ones(tokens.shape), positions, documents)


def test_squared_document_lengths() -> None:
    cut = micro_batch([[3, 4], []], sequence_length=10, samples=2)
    assert squared_document_lengths([cut]) == (9 + 1 + 36) + 100
    assert squared_document_lengths([cut, replace(cut, documents=None)]) == 146 + 2 * 100
    long = micro_batch(None, sequence_length=2**17, samples=1)
    assert squared_document_lengths([long, long]) == 2**35  # beyond 32 bits
    assert squared_document_lengths([micro_batch([[]], 2**17, 1)]) == 2**34


def known_peak(rank: int) -> None:
    trainer.dense_peak_flops = lambda name, dtype: 1e15


@pytest.mark.parametrize(("ranks", "flags"), [(1, []), (2, ["--parallel.pp", 2]), (4, ["--parallel.tp", 2])])
def test_mfu_counts_attention_inside_documents(ranks: int, flags: list, workplace: Path) -> None:
    """Documents of 4 tokens, so that every sample of 16 has four of them, wherever its window begins."""
    with IndexedDatasetWriter(workplace / "short", np.uint16) as writer:
        for number in range(200):
            writer.add_document([3 + number % 300] * 4)
    model = load_config(["--config", "config.toml"]).model
    shared = ("--config", "config.toml", "--data.train", "short", "--train.steps", 2, "--checkpoint.load", "none", *flags)
    for masked, length in (("true", 4), ("false", SEQUENCE_LENGTH)):
        run = ("--data.document_mask", masked, "--log.directory", masked)
        succeed("train", *shared, *run, ranks=ranks, change=known_peak)
        for line in records(Path(masked)).values():
            flops = line["mfu"] * ranks * 1e15 * line["step_seconds"]
            assert flops == pytest.approx(BATCH_SIZE * SEQUENCE_LENGTH * flops_per_token(model, length), rel=1e-9)


class Clock:
    """Stands in for the module `time`: it goes on only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def slow_reads(rank: int) -> None:
    """By that clock a step takes SECONDS_OF_A_STEP, and a rank waits 0.25 s x (1 + its number) for each batch."""
    clock = Clock()
    trainer.time = verdict.time = clock
    read, run = Prefetcher.__next__, TrainStep.run

    def slow_read(self):
        micro_batches = read(self)
        clock.now += 0.25 * (1 + rank)
        return micro_batches

    def timed_run(*arguments):
        clock.now += SECONDS_OF_A_STEP
        return run(*arguments)

    Prefetcher.__next__, TrainStep.run = slow_read, timed_run


@pytest.mark.parametrize(("ranks", "waited"), [(1, 0.25), (2, 0.375)])
def test_waiting_for_data_is_measured(ranks: int, waited: float, workplace: Path) -> None:
    """It is part of the step in which the loop waited, except for the first batch; the last step has none to wait for."""
    out = succeed("train", "--config", "config.toml", "--train.evaluate_every", 3, ranks=ranks, change=slow_reads)
    assert values(Path("run"), "data_wait_seconds") == [waited] * (STEPS - 1) + [0.0]
    assert values(Path("run"), "step_seconds") == [0.25 + SECONDS_OF_A_STEP] * (STEPS - 1) + [SECONDS_OF_A_STEP]
    assert out.count(f"waits for data {waited:.0%}") == 2  # steps 2 and 4
    assert f"waits for data {waited / 1.75:.0%}" in out  # 6: the last one waits for nothing


def test_the_wait_is_part_of_the_step(run: Path, workplace: Path) -> None:
    assert all(0.0 <= line["data_wait_seconds"] <= line["step_seconds"] for line in records(run).values())
