"""A checkpoint resumes in its own layout bit for bit, and in any other with the same state and the same losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_llama.state import Position, load_state, save_state
from parallel.checkpoint.steps import step_directory
from tests.parity.comparison import LOSS_TOLERANCE, relative
from tests.parity.test_parity import GQA, SMALL_BATCH, STAGE_0, TIED, layout
from tests.parity.training import Case, Outcome, Session, assemble, copies
from tests.ranks import run_ranks

SAVED_AT, STEPS = 3, 6

CASES = [
    Case("alone", layout()),
    Case("tp4-sp", layout(tp=4, sequence_parallel=True)),
    Case("pp4", layout(pp=4)),
    Case("pp2-uneven-dp2", layout(pp=2, dp=2, layers_per_stage=(1, 3))),
    Case("dp4-zero0", layout(dp=4), zero=STAGE_0),
    Case("tp2-pp2-dp2", layout(tp=2, pp=2, dp=2, sequence_parallel=True)),
]


def name(case: Case) -> str:
    return case.name


def state_of(session: Session) -> Outcome:
    """All that this rank holds of weights and optimizer state, copied."""
    engine = session.engine
    return Outcome(weights=copies(engine.weight_boxes(write=False)), optimizer=copies(engine.optimizer_boxes(write=False)))


def train_and_save(rank: int, world_size: int, case: Case, directory: Path) -> tuple[Outcome, Outcome]:
    """Train to the end, saving on the way. Returns what was saved, and what came after."""
    session = Session(rank, world_size, case, directory)
    for step in range(SAVED_AT):
        session.step(step)
    save_state(session.runtime, session.engine, Position(SAVED_AT, SAVED_AT * 8, 0), {}, b"a tokenizer")
    saved = state_of(session)
    for step in range(SAVED_AT, STEPS):
        session.step(step)
    return saved, session.finish()


def resume(rank: int, world_size: int, case: Case, directory: Path) -> tuple[Outcome, Outcome]:
    """Load in this layout and train to the end. Returns what was loaded, and what came after."""
    session = Session(rank, world_size, case, directory)
    position = load_state(step_directory(directory, SAVED_AT), session.runtime, session.engine)
    assert position.step == SAVED_AT and session.engine.optimizer_steps == SAVED_AT
    loaded = state_of(session)
    for step in range(position.step, STEPS):
        session.step(step)
    return loaded, session.finish()


def assert_same_state(found: list[Outcome], expected: list[Outcome]) -> None:
    for what in ("weights", "optimizer"):
        ours, theirs = assemble(found, what), assemble(expected, what)
        assert set(ours) == set(theirs)
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def check_pair(source: Case, target: Case, directory: Path, exact: bool) -> None:
    saved, went_on = zip(*run_ranks(source.world_size, train_and_save, source, directory), strict=True)
    loaded, resumed = zip(*run_ranks(target.world_size, resume, target, directory), strict=True)
    assert_same_state(list(loaded), list(saved))
    expected = went_on[0].losses[SAVED_AT:]
    if exact:
        assert resumed[0].losses == expected and resumed[0].norms == went_on[0].norms[SAVED_AT:]
        assert_same_state(list(resumed), list(went_on))
    for ours, theirs in zip(resumed[0].losses, expected, strict=True):
        assert relative(ours, theirs) < LOSS_TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_same_layout_bit_for_bit(case: Case, dtype: str, tmp_path: Path) -> None:
    case = replace(case, train=replace(SMALL_BATCH, dtype=dtype))
    check_pair(case, case, tmp_path, exact=True)


PAIRS = [(CASES[i], CASES[(i + shift) % len(CASES)]) for shift in (1, 3) for i in range(len(CASES))]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=name)
def test_any_layout_to_any_other(source: Case, target: Case, tmp_path: Path) -> None:
    model = replace(TIED, num_kv_heads=2, vocab_size=101)  # tied, kv heads below tp 4, a vocabulary that tp does not divide
    cases = [replace(case, model=model, train=SMALL_BATCH) for case in (source, target)]
    check_pair(*cases, tmp_path, exact=False)


def test_bf16_state_is_kept_in_fp32(tmp_path: Path) -> None:
    """Master weights survive a change of layout in full precision."""
    train = replace(SMALL_BATCH, dtype="bf16")
    source = Case("source", layout(tp=2, dp=2), GQA, train)
    target = Case("target", layout(pp=2), GQA, train)
    saved, _ = zip(*run_ranks(4, train_and_save, source, tmp_path), strict=True)
    loaded, _ = zip(*run_ranks(2, resume, target, tmp_path), strict=True)
    assert_same_state(list(loaded), list(saved))
    weights = assemble(list(saved), "weights")["layers.0.attention.wq"]
    assert not torch.equal(weights, weights.bfloat16().float())
