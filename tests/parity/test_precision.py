"""The numbers that training computes and keeps: fp16 with a loss scale, bf16 moments, remainders of master weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from megatron_llama.state import Position, load_state, save_state
from megatron_llama.verdict import Verdict
from parallel.checkpoint.steps import step_directory
from tests.parity.comparison import differences, reference, relative, relative_l2
from tests.parity.test_parity import SHALLOW, SMALL_BATCH, layout
from tests.parity.test_resume import assert_same_state, check_pair, resume, train_and_save
from tests.parity.training import OPTIMIZER, Case, Session, assemble, micro_batches, train
from tests.ranks import run_ranks

BF16, FP16 = (replace(SMALL_BATCH, dtype=dtype) for dtype in ("bf16", "fp16"))
REMAINDER = replace(OPTIMIZER, master_weights="remainder")
BF16_MOMENTS = replace(OPTIMIZER, moment_dtype="bf16")
NARROW = replace(REMAINDER, moment_dtype="bf16")


def name(case: Case) -> str:
    return case.name


# ---- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [layout(dp=2), layout(pp=2, schedule="zb-h2", post_validation=True)], ids=["dp2", "late"])
def test_remainders_train_as_whole_masters_bit_for_bit(parallel) -> None:
    """Losses, norms and all state; at most a master or two differ by their last bit (ties). `late` takes updates back."""
    case = Case("masters", parallel, SHALLOW, BF16)
    expected, found = (run_ranks(2, train, replace(case, optimizer=optimizer)) for optimizer in (OPTIMIZER, REMAINDER))
    assert found[0].losses == expected[0].losses and found[0].norms == expected[0].norms
    assert min(found[0].norms) > OPTIMIZER.clip_norm, "clipping must be at work"
    weights, right = (torch.cat([t.flatten() for t in assemble(o, "weights").values()]) for o in (found, expected))
    off = (weights.view(torch.int32) - right.view(torch.int32)).abs()
    assert off.max() <= 1 and off.count_nonzero() <= 2
    assert_moments_equal(found, expected)
    assert not torch.equal(weights, weights.bfloat16().float())


def assert_moments_equal(found, expected) -> None:
    ours, theirs = assemble(found, "optimizer"), assemble(expected, "optimizer")
    assert [moment for moment in theirs if not torch.equal(ours[moment], theirs[moment])] == []


def test_bf16_moments_train_nearly_as_fp32_ones() -> None:
    """And copies of a parameter on several ranks stay bit-equal, although moments are rounded at random."""
    case = Case("tied-pp2-sp", layout(tp=2, pp=2, sequence_parallel=True), replace(SHALLOW, tie_embeddings=True), BF16)
    expected = reference(case)
    found = run_ranks(case.world_size, train, replace(case, optimizer=BF16_MOMENTS))
    for ours, theirs in zip(found[0].losses, expected.losses, strict=True):
        assert relative(ours, theirs) < 2e-3  # bf16's own tolerance between layouts
    assemble(found, "weights")
    for moment, numbers in assemble(found, "optimizer").items():
        assert torch.equal(numbers, numbers.bfloat16().float()), moment


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Case("narrow", layout(tp=2), SHALLOW, BF16, NARROW), Case("narrow", layout(tp=2), SHALLOW, BF16, NARROW)),
        (Case("narrow", layout(dp=2), SHALLOW, BF16, NARROW), Case("whole", layout(), SHALLOW, BF16)),
        (Case("whole", layout(), SHALLOW, BF16), Case("remainder", layout(dp=2), SHALLOW, BF16, REMAINDER)),
    ],
    ids=name,
)
def test_a_checkpoint_holds_fp32_whatever_was_kept(source: Case, target: Case, tmp_path: Path) -> None:
    """So state goes from any form into any other, to the bit where the other can hold it."""
    if source == target:
        check_pair(source, target, tmp_path, exact=True)
        return
    saved, _ = zip(*run_ranks(source.world_size, train_and_save, source, tmp_path), strict=True)
    loaded, _ = zip(*run_ranks(target.world_size, resume, target, tmp_path), strict=True)
    assert_same_state(list(loaded), list(saved))


# ---- fp16 -------------------------------------------------------------------------------------------------------------

FP16_CASES = [
    Case("tp2-sp", layout(tp=2, sequence_parallel=True), SHALLOW, FP16),
    Case("tied-pp2-dp2-zb", layout(pp=2, dp=2, schedule="zb-h1"), replace(SHALLOW, tie_embeddings=True), FP16),
]


@pytest.mark.parametrize("case", FP16_CASES, ids=name)
def test_fp16_trains_alike_in_any_layout_and_as_fp32(case: Case) -> None:
    found = run_ranks(case.world_size, train, case)
    assert differences(case, found) == []
    fp32 = reference(replace(case, train=replace(case.train, dtype="fp32")))
    assert found[0].skipped == [0.0] * 8
    for ours, theirs in zip(found[0].losses + found[0].norms[:1], fp32.losses + fp32.norms[:1], strict=True):
        assert relative(ours, theirs) < 3e-4  # 11 bits of mantissa


def test_the_scale_keeps_small_gradients() -> None:
    """Numbers below 6e-8 are zero in fp16, and those below 6e-5 lose digits.

    A tiny model's gradients are large: scaled down, they are like those of a large one on a large batch.
    """
    off = {}
    right = assemble([reference(Case("fp32", layout(), SHALLOW, SMALL_BATCH))], "gradients")
    for scale in (2.0**-10, 65536.0):
        case = Case("fp16", layout(), SHALLOW, replace(FP16, loss_scale=scale))
        gradients = assemble(run_ranks(1, train, case, 1), "gradients")
        off[scale] = max(relative_l2(gradients[parameter] / scale, right[parameter]) for parameter in right)
    assert off[65536.0] < 3e-3 and off[2.0**-10] > 0.03


@dataclass
class Scaled:
    """What one rank saw of a run in fp16."""

    scales: list[float | None] = field(default_factory=list)  # as the metrics have them
    losses: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    optimizer_steps: int = 0


def train_scaled(
    rank: int, world_size: int, case: Case, first: int, last: int, directory: Path, save_at: int | None = None
) -> Scaled:
    """Steps `first` to `last`, from a checkpoint where `first` is not 0."""
    session, seen = Session(rank, world_size, case, directory), Scaled()
    if first:
        load_state(step_directory(directory, first), session.runtime, session.engine)
    data = session.runtime.groups.data
    for step in range(first, last):
        batch = session.step_runner.prepare(micro_batches(case, step, data.rank, data.size))
        info = session.step_runner.run(batch, case.optimizer.learning_rate)
        numbers = Verdict(Position(step), 0.0, info, batch.counts[1], session.step_runner.watch.criteria).read()
        seen.scales.append(numbers.loss_scale)
        seen.losses.append(numbers.loss)
        seen.skipped.append(numbers.skipped)
        if step + 1 == save_at:
            save_state(session.runtime, session.engine, Position(step + 1, 0, 0), {}, None)
    seen.optimizer_steps = session.engine.optimizer_steps
    return seen


OVERFLOWING = replace(FP16, loss_scale=2.0**26, loss_scale_window=2)


@pytest.mark.parametrize("parallel", [layout(tp=2), layout(pp=2)], ids=["tp2", "pp2"])
def test_an_overflow_halves_the_scale_on_every_rank_and_training_recovers(parallel, tmp_path: Path) -> None:
    case = Case("overflow", parallel, SHALLOW, OVERFLOWING)
    ranks = run_ranks(2, train_scaled, case, 0, 10, tmp_path)
    assert ranks[0] == ranks[1]
    found = ranks[0]
    bad = [bool(skipped) for skipped in found.skipped]
    assert bad[0] and not all(bad) and found.optimizer_steps == bad.count(False)
    assert scales_that_follow(bad, OVERFLOWING.loss_scale, window=2) == found.scales
    start = [reference(replace(case, train=replace(FP16, dtype="fp32"))).losses[0]]
    assert relative(found.losses[0], start[0]) < 3e-4  # the loss of a skipped step is right all the same


def scales_that_follow(bad: list[bool], scale: float, window: int) -> list[float]:
    """The scale of each step, by the rule."""
    scales, finite = [], 0
    for overflowed in bad:
        scales.append(scale)
        finite = 0 if overflowed else finite + 1
        if overflowed:
            scale /= 2
        elif finite == window:
            scale, finite = scale * 2, 0
    return scales


def test_a_resumed_run_goes_on_with_its_scale(tmp_path: Path) -> None:
    case = Case("resumed", layout(dp=2), SHALLOW, replace(OVERFLOWING, loss_scale=1024.0))
    (whole, _), (resumed, _) = (
        run_ranks(2, train_scaled, case, first, 6, tmp_path, save_at) for first, save_at in ((0, 3), (3, None))
    )
    assert whole.scales == [1024.0, 1024.0, 2048.0, 2048.0, 4096.0, 4096.0]
    assert (resumed.scales, resumed.losses) == (whole.scales[3:], whole.losses[3:])


def test_a_run_in_other_numbers_has_no_scale_and_leaves_one_alone(tmp_path: Path) -> None:
    bf16 = Case("bf16", layout(), SHALLOW, replace(OVERFLOWING, dtype="bf16"))
    assert run_ranks(1, train_scaled, bf16, 0, 2, tmp_path, 2)[0].scales == [None, None]
    fp16 = replace(bf16, train=replace(bf16.train, dtype="fp16", loss_scale=1024.0))
    assert run_ranks(1, train_scaled, fp16, 2, 3, tmp_path, 3)[0].scales == [1024.0]
    assert run_ranks(1, train_scaled, bf16, 3, 4, tmp_path)[0].scales == [None]
