"""DeepSpeed's ZeRO under our parallelism: the parity matrix against one process, engine against engine, and resuming across."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_llama.config import ZeroConfig
from parallel.zero.engine import Judge
from tests.parity.comparison import BF16_LOSS_TOLERANCE, LOSS_TOLERANCE, differences, reference, relative
from tests.parity.test_parity import ODD_VOCABULARY, ONE_KV_HEAD, SGD, SHALLOW, SMALL_BATCH, TIED, layout
from tests.parity.test_resume import assert_same_state, check_pair, resume, train_and_save
from tests.parity.training import TRAIN, Case, Outcome, Session, train
from tests.ranks import run_ranks
from tests.with_deepspeed import deepspeed_imported  # noqa: F401

pytestmark = pytest.mark.usefixtures("deepspeed_imported")


# In stage 3 weights as small as these would otherwise stay where they are between uses.
COME_AND_GO = str(Path(__file__).with_name("come_and_go.json"))


def deepspeed(stage: int = 1, **settings) -> ZeroConfig:
    further = {"deepspeed_config": COME_AND_GO} if stage == 3 else {}
    return ZeroConfig(engine="deepspeed", stage=stage, **(further | settings))


BF16 = replace(SMALL_BATCH, dtype="bf16")
COMPILED = replace(SMALL_BATCH, compile=True)
SIX = replace(TRAIN, global_batch_size=6)
SP = {"tp": 2, "sequence_parallel": True}
HOST = deepspeed(1, offload="cpu")
ZB = layout(pp=2, schedule="zb-h1")

CASES = [
    Case("1-one-kv-head-tp2-dp2-sp", layout(dp=2, **SP), ONE_KV_HEAD, SMALL_BATCH, zero=deepspeed()),
    Case("1-tied-pp2-zb-h1", ZB, TIED, SMALL_BATCH, zero=deepspeed()),
    Case("1-dp3-sgd", layout(dp=3), SHALLOW, SIX, SGD, zero=deepspeed()),
    Case("1-bf16-pp2-dp2", layout(pp=2, dp=2), train=BF16, zero=deepspeed()),
    Case("1-host-bf16-dp2", layout(dp=2), SHALLOW, BF16, zero=HOST),
    Case("2-bf16-tp2-dp2-sp", layout(dp=2, **SP), ONE_KV_HEAD, BF16, zero=deepspeed(2)),
    Case("3-tp2-dp2-sp", layout(dp=2, **SP), ONE_KV_HEAD, SMALL_BATCH, zero=deepspeed(3)),
]
MORE_CASES = [
    Case("2-tp2-dp2-sp", layout(dp=2, **SP), ONE_KV_HEAD, SMALL_BATCH, SGD, zero=deepspeed(2)),
    Case("3-dp3-sgd", layout(dp=3), SHALLOW, SIX, SGD, zero=deepspeed(3)),
    Case("1-bf16-wire-dp2", layout(dp=2), SHALLOW, BF16, zero=deepspeed(reduce_dtype="bf16")),
    Case("1-pp2-dp2-interleaved", layout(pp=2, dp=2, chunks=2, schedule="interleaved"), zero=deepspeed()),
    Case("1-pp2-dp2-zb-v", layout(pp=2, dp=2, chunks=2, schedule="zb-v"), TIED, zero=deepspeed()),
    Case("1-tp2-pp2-dp2", layout(pp=2, dp=2, **SP), ODD_VOCABULARY, zero=deepspeed()),
    Case("1-bf16-tp2-pp2-dp2-zb-h1", layout(pp=2, dp=2, schedule="zb-h1", **SP), train=BF16, zero=deepspeed()),
    Case("1-full-recompute", layout(dp=2, recompute="full"), zero=deepspeed()),
    Case("1-ragged", layout(dp=2), ragged=True, zero=deepspeed()),
    Case("1-host-pp2-zb-h1", ZB, zero=HOST),
    Case("2-dp3-sgd", layout(dp=3), SHALLOW, SIX, SGD, zero=deepspeed(2)),
    Case("2-full-recompute", layout(dp=2, recompute="full"), SHALLOW, SMALL_BATCH, zero=deepspeed(2)),
    Case("2-host-dp2", layout(dp=2), SHALLOW, SMALL_BATCH, zero=deepspeed(2, offload="cpu")),
    Case("2-host-bf16-tied-dp2", layout(dp=2), replace(TIED, num_layers=2), BF16, zero=deepspeed(2, offload="cpu")),
    Case("3-tied-full-recompute", layout(dp=2, recompute="full"), TIED, SMALL_BATCH, zero=deepspeed(3)),
    Case("3-compile-linear-outputs", layout(dp=2, recompute="linear_outputs"), SHALLOW, COMPILED, zero=deepspeed(3)),
    Case("3-activations-on-the-host", layout(dp=2, offload_layers=2), SHALLOW, SMALL_BATCH, zero=deepspeed(3)),
    Case("3-selective-bf16-dp2", layout(dp=2, recompute="selective"), SHALLOW, BF16, zero=deepspeed(3)),
    Case("3-host-dp2", layout(dp=2), SHALLOW, SMALL_BATCH, zero=deepspeed(3, offload="cpu")),
]


def name(case: Case) -> str:
    return case.name


@cache
def outcomes(case: Case) -> list[Outcome]:
    return run_ranks(case.world_size, train, case)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=name)
def test_same_as_one_process(case: Case) -> None:
    assert differences(case, outcomes(case)) == []


@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[3], marks=pytest.mark.slow)], ids=name)
def test_engines_agree(case: Case) -> None:
    native = run_ranks(case.world_size, train, replace(case, zero=ZeroConfig()))[0]
    ours = outcomes(case)[0]
    tolerance = BF16_LOSS_TOLERANCE if case.train.dtype == "bf16" else LOSS_TOLERANCE
    assert all(relative(a, b) < tolerance for a, b in zip(ours.losses, native.losses, strict=True))


NATIVE = Case("native-pp2", layout(pp=2), TIED, SMALL_BATCH)
DEEPSPEED_1 = Case("deepspeed-1-tp2-dp2", layout(tp=2, dp=2), TIED, SMALL_BATCH, zero=deepspeed())
DEEPSPEED_3 = Case("deepspeed-3-dp2", layout(dp=2), TIED, SMALL_BATCH, zero=deepspeed(3))
PAIRS = [(DEEPSPEED_1, DEEPSPEED_3), (DEEPSPEED_3, NATIVE), pytest.param(NATIVE, DEEPSPEED_1, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=name)
def test_a_run_changes_engine_on_resume(source: Case, target: Case, tmp_path: Path) -> None:
    """Weights, moments and the count of steps are those that were saved, bit for bit, and training goes on from them."""
    check_pair(source, target, tmp_path, exact=False)


def test_masters_survive_a_change_of_engine_in_full_precision(tmp_path: Path) -> None:
    source, target = replace(NATIVE, train=BF16), replace(DEEPSPEED_1, train=BF16)
    saved, _ = zip(*run_ranks(source.world_size, train_and_save, source, tmp_path), strict=True)
    loaded, _ = zip(*run_ranks(target.world_size, resume, target, tmp_path), strict=True)
    assert_same_state(list(loaded), list(saved))


def train_with_a_bad_step(rank: int, world_size: int, case: Case, steps: tuple[int, ...], bad: str) -> Outcome:
    """Step 1 is not finite on the last rank alone: a gradient, or one of the caller's sums."""
    session = Session(rank, world_size, case)
    take, step = session.engine._parts.take_gradients, session.engine.step

    def poisoned_take() -> None:
        take()
        if bad == "gradient" and len(session.outcome.losses) == 1 and rank == world_size - 1:
            session.engine.buckets[0].master_grad[3] = float("inf")

    def poisoned_step(rate: float, sums: torch.Tensor, judge: Judge):
        poison = bad == "sum" and len(session.outcome.losses) == 1 and rank == world_size - 1
        return step(rate, sums * float("nan") if poison else sums, judge)

    session.engine._parts.take_gradients, session.engine.step = poisoned_take, poisoned_step
    for number in steps:
        session.step(number)
    return session.finish()


BAD_STEPS = [(1, "sum"), (3, "gradient")]
MORE_BAD_STEPS = [pytest.param(*bad, marks=pytest.mark.slow) for bad in [(1, "gradient"), (2, "sum"), (3, "sum")]]


@pytest.mark.parametrize(("stage", "bad"), [*BAD_STEPS, *MORE_BAD_STEPS])
def test_a_step_that_is_not_finite_anywhere_is_skipped_everywhere(stage: int, bad: str) -> None:
    """The next step is as if the bad one had never been: weights, and Adam's moments and count."""
    case = Case("skip", layout(dp=2), SHALLOW, SMALL_BATCH, zero=deepspeed(stage))
    skipping = run_ranks(2, train_with_a_bad_step, case, (0, 1, 2), bad)
    clean = run_ranks(2, train_with_a_bad_step, case, (0, 2), "")
    for ours, theirs in zip(skipping, clean, strict=True):
        assert ours.skipped == [0.0, 1.0, 0.0]
        for what in ("weights", "optimizer"):
            boxes = zip(getattr(ours, what), getattr(theirs, what), strict=True)
            assert all(torch.equal(a.tensor, b.tensor) for a, b in boxes)


# Partitions of 1 MiB and more go to files, and of their gradients those that are as large; the rest stays in memory.
WIDE = replace(SHALLOW, hidden_size=256, ffn_hidden_size=1024)


@pytest.fixture
def in_files(tmp_path: Path) -> Case:
    """Stage 3 with its state in files, in several partitions."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio is not installed")
    settings = tmp_path / "deepspeed.json"
    content = {"sub_group_size": 500_000, "stage3_param_persistence_threshold": 0}
    settings.write_text(json.dumps({"zero_optimization": content}), encoding="utf-8")
    zero = deepspeed(3, offload="nvme", offload_directory=str(tmp_path / "state"), deepspeed_config=str(settings))
    return Case("files", layout(dp=2), WIDE, SMALL_BATCH, zero=zero)


def train_and_look(rank: int, world_size: int, case: Case) -> tuple[Outcome, list[int], list[int]]:
    """What training gave, and after a step how much of each partition's master is in memory, and what files there are."""
    session = Session(rank, world_size, case)
    for step in range(4):
        session.step(step)
    held = [partition.master.numel() for partition in session.engine.buckets]
    files = Path(case.zero.offload_directory or "none").rglob(f"rank{rank}/*.swp")
    return session.finish(), held, [path.stat().st_size for path in files]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_state_in_files_is_the_same_as_in_memory(dtype: str, in_files: Case) -> None:
    case = replace(in_files, train=replace(SMALL_BATCH, dtype=dtype))
    in_memory = replace(case, zero=replace(case.zero, offload="none", offload_directory=""))
    found, expected = (run_ranks(2, train_and_look, one) for one in (case, in_memory))
    for (ours, held, files), (theirs, held_without, files_without) in zip(found, expected, strict=True):
        large = [size for size in held_without if size * 4 >= 2**20]
        assert held == [0 if size in large else size for size in held_without] and 1 < len(large) < len(held)
        assert sum(files) >= 3 * 4 * sum(large) and not files_without
        assert ours.losses == theirs.losses and ours.norms == theirs.norms
        for what in ("weights", "optimizer"):
            boxes = zip(getattr(ours, what), getattr(theirs, what), strict=True)
            assert all(torch.equal(a.tensor, b.tensor) for a, b in boxes)


@pytest.mark.slow
def test_same_as_one_process_with_state_in_files(in_files: Case) -> None:
    assert differences(in_files, run_ranks(2, train, in_files)) == []


@pytest.mark.slow
@pytest.mark.parametrize("other", ["files", "native"])
def test_a_run_with_state_in_files_resumes(other: str, in_files: Case, tmp_path: Path) -> None:
    """Into files bit for bit; to the native engine and back with the same state."""
    native = Case("native", layout(tp=2), WIDE, SMALL_BATCH)
    if other == "files":
        check_pair(in_files, in_files, tmp_path / "run", exact=True)
        return
    check_pair(in_files, native, tmp_path / "there", exact=False)
    check_pair(native, in_files, tmp_path / "back", exact=False)


def losses_on_a_gpu(case: Case) -> list[float]:
    session = Session(0, 1, case, device="cuda")
    for step in range(8):
        session.step(step)
    return session.finish().losses


ON_A_GPU = [deepspeed(1), deepspeed(1, offload="cpu"), deepspeed(2), deepspeed(3), deepspeed(3, offload="cpu")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("zero", ON_A_GPU, ids=lambda zero: f"{zero.stage}-offload-{zero.offload}")
def test_same_losses_on_a_gpu_as_on_the_cpu(zero: ZeroConfig) -> None:
    """In a process of its own: DeepSpeed settles on an accelerator when it is imported. This has not run on a device yet."""
    case = Case("gpu", layout(), SHALLOW, BF16, zero=zero)
    expected = reference(case).losses
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(losses_on_a_gpu, (case,))
    assert all(relative(ours, theirs) < BF16_LOSS_TOLERANCE for ours, theirs in zip(found, expected, strict=True))
