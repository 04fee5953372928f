"""Any layout loads what any other has saved, bit for bit; what is resharded offline is what its ranks would have written."""

from __future__ import annotations

import filecmp
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_llama import reshard
from megatron_llama.checkpoint_plan import CheckpointPlan
from megatron_llama.config import ModelConfig, ParallelConfig, RunConfig, ZeroConfig, to_dict, validate_layout, validate_model
from megatron_llama.config.rules_zero import engine_supports
from megatron_llama.interop.stored_model import MOMENTS, logical_shapes
from megatron_llama.pipeline_plan import settle_schedule
from megatron_llama.reshard import Resharding
from megatron_llama.state import load_state, save_state
from parallel.checkpoint.load import load_tensors
from parallel.checkpoint.manifest import read_manifest
from parallel.checkpoint.offline import write_offline
from parallel.checkpoint.steps import step_directory
from parallel.errors import ConfigError
from parallel.shards import TensorBox
from tests.parity.comparison import LOSS_TOLERANCE, relative
from tests.parity.test_parity import SMALL_BATCH, TIED, layout
from tests.parity.test_resume import SAVED_AT, STEPS, assert_same_state, state_of, train_and_save
from tests.parity.training import Case, Session
from tests.ranks import run_ranks

MODELS, LAYOUTS_OF_A_MODEL, PAIRS_OF_A_MODEL = 5, 7, 20


def random_model(random: np.random.Generator) -> ModelConfig:
    heads, head_dim = int(random.choice([4, 6, 8])), int(random.choice([2, 6, 10]))
    return ModelConfig(
        num_layers=int(random.integers(3, 6)),
        hidden_size=heads * head_dim,
        num_heads=heads,
        num_kv_heads=int(random.choice([kv for kv in (1, 2, 4, 8) if heads % kv == 0])),
        ffn_hidden_size=24 * int(random.integers(1, 5)),
        vocab_size=int(random.integers(9, 200)),
        tie_embeddings=bool(random.integers(2)),
    )


def random_layout(random: np.random.Generator, model: ModelConfig, most_ranks: int) -> tuple[RunConfig, int]:
    """A layout of at most `most_ranks` that the model allows, and its number of ranks."""
    while True:
        schedule, chunks = [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zb-v", 2)][random.integers(4)]
        pp, dp = (int(size) for size in random.integers(1, 4, 2))
        stages, split = pp * chunks, "auto"
        if random.integers(2) and stages <= model.num_layers:
            cuts = np.sort(random.choice(np.arange(1, model.num_layers), stages - 1, replace=False))
            split = tuple(int(count) for count in np.diff([0, *cuts, model.num_layers]))
        tp = int(random.choice([1, 2, 3, 4]))
        parallel = ParallelConfig(tp=tp, pp=pp, dp=dp, chunks=chunks, schedule=schedule, layers_per_stage=split)
        groups = int(random.choice([size for size in range(dp) if size == 0 or dp % size == 0]))
        stage, bucket_size = (1 if groups else int(random.integers(3))), int(random.integers(100, 9000))
        zero = ZeroConfig(stage=stage, shard_group_size=groups, bucket_size=bucket_size)
        config, world_size = RunConfig(model=model, parallel=parallel, zero=zero), tp * pp * dp
        try:
            validate_model(config)
            validate_layout(config, world_size)
        except ConfigError:
            continue
        if world_size <= most_ranks:
            return config, world_size


def logical_state(model: ModelConfig) -> dict[str, Tensor]:
    """Random weights and moments, whole."""
    generator = torch.Generator().manual_seed(5)
    prefixes = ("", *(f"{kind}/" for kind in MOMENTS))
    shapes = {f"{prefix}{name}": shape for prefix in prefixes for name, shape in logical_shapes(model).items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_in_layout(root: Path, plan: CheckpointPlan, values: dict[str, Tensor]) -> Path:
    def bytes_of(item: TensorBox) -> list[memoryview]:
        return [memoryview(values[item.name][item.box.slices()].contiguous().view(-1).view(torch.uint8).numpy())]

    state = {"config": to_dict(plan.config), "world_size": plan.world_size, "position": {"step": 1, "samples": 8, "tokens": 9}}
    parts = (plan.boxes(rank) for rank in range(plan.world_size))
    return write_offline(root, 1, parts, bytes_of, state, {"tokenizer.model": b"pieces"})


def check_load(directory: Path, plan: CheckpointPlan, values: dict[str, Tensor]) -> None:
    """Every rank of a layout gets all that it holds, and not an element besides."""
    ranks = range(plan.world_size)
    boxes = [item for rank in ranks for items in plan.boxes(rank, write=False).values() for item in items]
    targets = [replace(item, tensor=torch.full(item.box.shape, torch.nan)) for item in boxes]
    load_tensors(directory, targets)
    for target in targets:
        assert torch.equal(target.tensor, values[target.name][target.box.slices()]), (target.name, target.box)


def check_resharded(directory: Path, root: Path, target: CheckpointPlan, values: dict[str, Tensor]) -> None:
    """What is rewritten for a layout is, file by file, what its ranks write of the same state."""
    resharded = Resharding(directory, target.config, target.world_size).write(root / "resharded")
    expected = save_in_layout(root / "expected", target, values)
    assert {path.name for path in resharded.iterdir()} == {path.name for path in expected.iterdir()}
    names = [path.name for path in expected.iterdir() if path.suffix != ".json" and path.name != "COMMIT"]
    assert filecmp.cmpfiles(resharded, expected, names, shallow=False)[1:] == ([], [])
    found, wanted = read_manifest(resharded), read_manifest(expected)
    assert found == wanted, "the state is carried over, in the new layout"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of several pieces, pieces of several boxes; and nothing here is to survive."""
    monkeypatch.setattr(reshard, "PIECE_ELEMENTS", 700)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", range(MODELS))
def test_100_random_pairs_of_layouts(seed: int, tmp_path: Path) -> None:
    """20 pairs of 7 layouts of each of 5 models: tp, pp, chunks, dp, ZeRO stage and groups, odd sizes, uneven layers."""
    check_random_pairs(seed, tmp_path, most_ranks=8)


@pytest.mark.slow
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", range(MODELS, 3 * MODELS))
def test_200_random_pairs_of_larger_layouts(seed: int, tmp_path: Path) -> None:
    check_random_pairs(seed, tmp_path, most_ranks=36)


def check_random_pairs(seed: int, tmp_path: Path, most_ranks: int) -> None:
    random = np.random.default_rng(seed)
    model = random_model(random)
    values = logical_state(model)
    plans = [CheckpointPlan(*random_layout(random, model, most_ranks)) for _ in range(LAYOUTS_OF_A_MODEL)]
    saved: dict[int, Path] = {}
    pairs = [(i, j) for i in range(LAYOUTS_OF_A_MODEL) for j in range(LAYOUTS_OF_A_MODEL) if i != j]
    for number, pair in enumerate(random.permutation(pairs)[:PAIRS_OF_A_MODEL]):
        source, target = (int(index) for index in pair)
        if source not in saved:
            saved[source] = save_in_layout(tmp_path / f"layout-{source}", plans[source], values)
        check_load(saved[source], plans[target], values)
        if number % 7 == 0:
            check_resharded(saved[source], tmp_path / f"pair-{number}", plans[target], values)


BATCH = replace(SMALL_BATCH, global_batch_size=12)  # any schedule on up to 3 stages, over up to 3 data ranks


def trainable_layout(random: np.random.Generator, model: ModelConfig, most_ranks: int) -> tuple[Case, CheckpointPlan]:
    """A random layout with a schedule and an engine that can have it."""
    while True:
        config, world_size = random_layout(random, model, most_ranks)
        case = Case("random", config.parallel, model, BATCH, zero=config.zero)
        try:
            engine_supports(case.config)
            settle_schedule(case.config, world_size)
        except ConfigError:
            continue
        return case, CheckpointPlan(case.config, world_size)


def two_steps_and_three(rank: int, world_size: int, case: Case) -> tuple[dict[str, Tensor], list[float]]:
    """One process: the whole state after two steps, and the losses of the next three."""
    session = Session(rank, world_size, case)
    for step in range(2):
        session.step(step)
    boxes = [*session.engine.weight_boxes(write=False), *session.engine.optimizer_boxes(write=False)]
    values = {box.name: torch.zeros(box.global_shape) for box in boxes}
    for box in boxes:
        values[box.name][box.box.slices()] = box.tensor
    for step in range(2, 5):
        session.step(step)
    return values, session.outcome.losses[2:]


def three_steps(rank: int, world_size: int, case: Case, source: Path) -> list[float]:
    session = Session(rank, world_size, case)
    manifest = read_manifest(source)
    session.engine.load(lambda boxes: load_tensors(source, boxes, manifest))
    session.engine.optimizer_steps = 2
    for step in range(2, 5):
        session.step(step)
    return session.outcome.losses


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(MODELS))
def test_training_goes_on_over_100_random_pairs_of_layouts(seed: int, tmp_path: Path) -> None:
    """The next 3 losses on real ranks are those of one process that was never stopped."""
    random = np.random.default_rng(100 + seed)
    model = random_model(random)
    alone = Case("alone", layout(), model, BATCH)
    ((values, expected),) = run_ranks(1, two_steps_and_three, alone)
    for number in range(PAIRS_OF_A_MODEL):
        (_, source), (target, plan) = (trainable_layout(random, model, most_ranks=6) for _ in range(2))
        saved = save_in_layout(tmp_path / f"pair-{number}", source, values)
        losses = run_ranks(plan.world_size, three_steps, target, saved)[0]
        for ours, theirs in zip(losses, expected, strict=True):
            assert relative(ours, theirs) < LOSS_TOLERANCE, (number, target)


# Of real ranks: what test_resume's pairs lack.
ODD = replace(TIED, num_kv_heads=2, vocab_size=101)
REAL_PAIRS = [
    (
        Case("tp2-pp2-chunks2", layout(tp=2, pp=2, schedule="interleaved", chunks=2)),
        Case("zero2-dp4", layout(dp=4), zero=ZeroConfig(stage=2)),
    ),
    (Case("v-dp2", layout(pp=2, dp=2, schedule="zb-v", chunks=2)), Case("tp4-zero0", layout(tp=4), zero=ZeroConfig(stage=0))),
    (
        Case("dp4-groups", layout(dp=4), zero=ZeroConfig(shard_group_size=2)),
        Case("pp2-uneven-tp2", layout(pp=2, tp=2, layers_per_stage=(1, 3))),
    ),
]


def resume_and_save(rank: int, world_size: int, case: Case, source: Path, directory: Path):
    """Load from `source`, save that in this layout into `directory` at once, and train to the end."""
    session = Session(rank, world_size, case, directory)
    position = load_state(step_directory(source, SAVED_AT), session.runtime, session.engine)
    loaded = state_of(session)
    save_state(session.runtime, session.engine, position, {}, b"a tokenizer")
    for step in range(position.step, STEPS):
        session.step(step)
    return loaded, session.finish()


@pytest.mark.parametrize(("source", "target"), REAL_PAIRS, ids=lambda case: case.name)
def test_resharded_offline_as_its_ranks_would_write_it(source: Case, target: Case, tmp_path: Path) -> None:
    source, target = (replace(case, model=ODD, train=SMALL_BATCH) for case in (source, target))
    roots = [tmp_path / name for name in ("saved", "resharded", "saved again")]
    saved, went_on = zip(*run_ranks(source.world_size, train_and_save, source, roots[0]), strict=True)
    resharding = Resharding(roots[0], target.config, target.world_size)
    assert resharding.write(roots[1]) == step_directory(roots[1], SAVED_AT)
    ranks = run_ranks(target.world_size, resume_and_save, target, roots[1], roots[2])
    loaded, resumed = zip(*ranks, strict=True)
    assert_same_state(list(loaded), list(saved))
    for ours, theirs in zip(resumed[0].losses, went_on[0].losses[SAVED_AT:], strict=True):
        assert relative(ours, theirs) < LOSS_TOLERANCE
    again, offline = (step_directory(root, SAVED_AT) for root in (roots[2], roots[1]))
    files = sorted(path.name for path in again.glob("*.safetensors"))
    assert files == sorted(path.name for path in offline.glob("*.safetensors"))
    assert filecmp.cmpfiles(again, offline, files, shallow=False)[1:] == ([], [])
