"""Trains a tiny LLaMA on random tokens in a given layout and returns what the parity tests compare.

The tokens of sample i are a function of i alone, so every layout sees the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from megatron_llama.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    ZeroConfig,
)
from megatron_llama.data.blend import Blend
from megatron_llama.data.boundaries import boundaries
from megatron_llama.data.loader import Loader, MicroBatch
from megatron_llama.data.samples import Source
from megatron_llama.runtime import Runtime, build_runtime
from megatron_llama.step import TrainStep, make_engine
from parallel.replica_audit import audit
from parallel.shards import TensorBox
from parallel.zero.engine import Engine

MODEL = ModelConfig(
    num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_hidden_size=48, vocab_size=96, norm_eps=1e-5, init_std=0.05
)
TRAIN = TrainConfig(steps=8, global_batch_size=8, micro_batch_size=1, sequence_length=16, dtype="fp32", seed=7)
# LLaMA-2's eps: with a smaller one, Adam's first steps turn the rounding noise of gradients near zero into full-size updates.
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, eps=1e-5, weight_decay=0.1, clip_norm=0.5)
BUCKET_SIZE = 4000  # several buckets per chunk


@dataclass(frozen=True)
class Case:
    """A layout, and the model and settings to train in it."""

    name: str
    parallel: ParallelConfig
    model: ModelConfig = MODEL
    train: TrainConfig = TRAIN
    optimizer: OptimizerConfig = OPTIMIZER
    zero: ZeroConfig = ZeroConfig()
    ragged: bool = False  # loss masks that end somewhere inside
    documents: bool = False  # attention inside random documents only
    packed: bool = False  # samples of whole documents and padding

    @property
    def world_size(self) -> int:
        return self.parallel.tp * self.parallel.pp * max(self.parallel.dp, 1)

    @property
    def config(self) -> RunConfig:
        zero = replace(self.zero, bucket_size=BUCKET_SIZE)
        return RunConfig(model=self.model, parallel=self.parallel, zero=zero, train=self.train, optimizer=self.optimizer)

    @property
    def alone(self) -> Case:
        """The same training on one process: no parallelism, no recomputation, no sharding."""
        return replace(self, name="alone", parallel=ParallelConfig(dp=1, schedule="1f1b"), zero=ZeroConfig(stage=0))


@dataclass
class Outcome:
    """What one rank saw."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    gradients: list[TensorBox] = field(default_factory=list)  # of step 0
    weights: list[TensorBox] = field(default_factory=list)  # after the last step
    optimizer: list[TensorBox] = field(default_factory=list)  # after the last step
    unequal_copies: list[str] = field(default_factory=list)  # what the audit of replicas has found after the last step
    sent_bytes: dict = field(default_factory=dict)  # of the last step
    peak_in_flight: int = 0
    predicted_peak: int = 0


def sample(index: int, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [s + 1] and loss mask [s] of sample `index`."""
    generator = torch.Generator().manual_seed(1000 + index)
    length = case.train.sequence_length
    tokens = torch.randint(0, case.model.vocab_size, (length + 1,), generator=generator)
    mask = torch.ones(length)
    if case.ragged:
        mask[torch.randint(1, length, (1,), generator=generator).item() :] = 0.0
    return tokens, mask


def document_starts(index: int, case: Case) -> np.ndarray:
    """Positions inside sample `index` at which a new document begins: up to three, for some samples none."""
    random = np.random.default_rng(index)
    return np.sort(random.choice(np.arange(1, case.train.sequence_length), random.integers(4), replace=False))


class Corpus:
    """Random documents in memory, as an IndexedDataset gives them."""

    prefix = bin_path = "corpus"

    def __init__(self, lengths: list[int], vocab_size: int) -> None:
        random = np.random.default_rng(3)
        self.sequence_lengths = random.choice(np.array(lengths, np.int32), 200)
        self._ends = np.cumsum(self.sequence_lengths)
        self._ids = random.integers(0, vocab_size, self._ends[-1])

    def sequence_starts(self, numbers: np.ndarray) -> np.ndarray:
        return self._ends[numbers] - self.sequence_lengths[numbers]

    def read_raw(self, start_token: int, count: int) -> np.ndarray:
        return self._ids[start_token : start_token + count]


def packed_documents(case: Case) -> Blend:
    """What training reads of documents of which some are longer than a sample, and others leave it padding."""
    length = case.train.sequence_length
    lengths = [length // 4, length // 2 + 2, length + length // 2]
    return Blend([Source(Corpus(lengths, case.model.vocab_size), length, 1, 0, packed=True)])


def micro_batches(case: Case, step: int, dp_rank: int, dp_size: int) -> list[MicroBatch]:
    """This data rank's micro-batches of a step: contiguous parts of the global batch."""
    train = case.train
    if case.packed:
        batch = train.micro_batch_size, train.global_batch_size
        loader = Loader(packed_documents(case), train.sequence_length, *batch, dp_rank, dp_size, document_mask=True)
        return loader.micro_batches(step * train.global_batch_size)
    per_rank = train.global_batch_size // dp_size
    first = step * train.global_batch_size + dp_rank * per_rank
    batches = []
    for start in range(first, first + per_rank, train.micro_batch_size):
        drawn = [sample(i, case) for i in range(start, start + train.micro_batch_size)]
        tokens = torch.stack([tokens for tokens, _ in drawn], dim=1)  # [s + 1, b]
        mask = torch.stack([mask for _, mask in drawn], dim=1)
        positions, documents = torch.arange(train.sequence_length)[:, None], None
        if case.documents:
            starts = [document_starts(i, case) for i in range(start, start + train.micro_batch_size)]
            positions, documents = boundaries(starts, train.sequence_length)
        batches.append(MicroBatch(tokens[:-1], tokens[1:], mask, positions, documents))
    return batches


def copies(boxes) -> list[TensorBox]:
    return [replace(box, tensor=box.tensor.detach().clone()) for box in boxes]


class Session:
    """One rank's program: runtime, engine and step, and what it has seen so far."""

    def __init__(self, rank: int, world_size: int, case: Case, directory: Path | None = None, device: str = "cpu") -> None:
        self.case = case
        config = case.config
        if directory is not None:
            config = replace(config, checkpoint=CheckpointConfig(directory=str(directory), keep=0))
        self.runtime = build_runtime(config, rank, world_size, torch.device(device), timedelta(seconds=60))
        self.engine = make_engine(self.runtime)
        per_step = case.train.global_batch_size // (case.train.micro_batch_size * self.runtime.groups.data.size)
        self.step_runner = TrainStep(self.runtime, self.engine, per_step)
        self.outcome = Outcome()
        self.outcome.predicted_peak = self.step_runner.report.peak_activations[self.runtime.groups.place.pp]

    def step(self, step: int) -> None:
        """Train on the global batch of number `step`."""
        data = self.runtime.groups.data
        self.runtime.groups.ledger.clear()
        batch = self.step_runner.prepare(micro_batches(self.case, step, data.rank, data.size))
        info = self.step_runner.run(batch, self.case.optimizer.learning_rate)
        self.engine.finish()
        sent = self.runtime.groups.ledger.sent_bytes
        self.outcome.sent_bytes = {key: value for key, value in sent.items() if value}
        self.outcome.losses.append(info.sums[0].item())
        self.outcome.norms.append(info.norm.item())
        self.outcome.skipped.append(info.skipped.item())

    def finish(self) -> Outcome:
        self.outcome.weights = copies(self.engine.weight_boxes(write=False))
        self.outcome.optimizer = copies(self.engine.optimizer_boxes(write=False))
        self.outcome.peak_in_flight = self.step_runner.executor.peak_in_flight
        check_published(self.runtime, self.engine)
        world = self.runtime.groups.world
        found = audit(self.engine.replicated(), self.engine.rounded(), world, self.runtime.device)
        self.outcome.unequal_copies = list(map(str, found.findings))
        return self.outcome


def train(rank: int, world_size: int, case: Case, steps: int = 8) -> Outcome:
    """Train `steps` steps on this rank."""
    session = Session(rank, world_size, case)
    _keep_gradients(session.engine, session.outcome)
    for step in range(steps):
        session.step(step)
    return session.finish()


def _keep_gradients(engine: Engine, outcome: Outcome) -> None:
    """Copy the first step's gradients between reduction and update."""
    reduce_gradients = engine.reduce_gradients

    def reduce_and_keep() -> None:
        reduce_gradients()
        if not outcome.gradients:
            outcome.gradients = copies(engine.gradient_boxes())

    engine.reduce_gradients = reduce_and_keep


def check_published(runtime: Runtime, engine: Engine) -> None:
    """The model's weights on this rank are its masters', rounded; those that are elsewhere now (ZeRO stage 3) don't count."""
    places = [(s, p.detach()) for c in runtime.chunks for p in c.parameters() if p.numel() for s in p.shard.segments]
    for box in engine.weight_boxes(write=False):
        for segment, weight in places:
            common = box.box.intersect(segment.box) if segment.name == box.name else None
            if common is not None:
                local = weight[common.shifted(segment.box.offset, segment.local.offset).slices()]
                master = box.tensor[common.shifted(box.box.offset, (0,) * len(common.shape)).slices()]
                assert torch.equal(local, master.to(local.dtype)), box.name


def assemble(outcomes: list[Outcome], what: str) -> dict[str, torch.Tensor]:
    """Full logical tensors from every rank's boxes. Copies that overlap must be bit-equal."""
    full: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for outcome in outcomes:
        for box in getattr(outcome, what):
            if box.name not in full:
                full[box.name] = torch.zeros(box.global_shape)
                seen[box.name] = torch.zeros(box.global_shape, dtype=torch.bool)
            place = box.box.slices()
            known = seen[box.name][place]
            difference = (full[box.name][place] - box.tensor)[known].abs().max().item() if known.any() else 0.0
            assert difference == 0.0, f"copies of {what} {box.name} at {box.box} differ by {difference}"
            full[box.name][place] = box.tensor
            seen[box.name][place] = True
    for name, covered in seen.items():
        assert covered.all(), f"{name} is not covered"
    return full
