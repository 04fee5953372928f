"""Updates that are validated during the next step give, bit for bit, what waiting for the norm gives."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from megatron_llama.config import OptimizerConfig
from megatron_llama.state import Position, load_state, save_state
from megatron_llama.verdict import Verdict
from parallel.checkpoint.steps import step_directory
from parallel.errors import ConfigError
from parallel.zero.grad_norm import local_squared_norm
from parallel.zero.post_validation import PostValidatedZero
from tests.parity.test_parity import SGD, SMALL_BATCH, STAGE_0, TIED, layout
from tests.parity.training import OPTIMIZER, Case, Outcome, Session, assemble, micro_batches
from tests.ranks import run_ranks

STEPS = 6
NEVER, ALWAYS = 1e3, 1e-2  # norms to clip to; the gradients' are between 0.9 and 2
# Totals are added up along the pipeline, or by the library's all-reduce: fp64, a few additions in another order.
TOTALS_TOLERANCE = 1e-14


@dataclass
class Report:
    """What one rank saw of consecutive steps."""

    outcome: Outcome
    optimizer_steps: int = 0
    corrections: int = 0
    stage_norms: list[float] = field(default_factory=list)  # of this rank's gradients alone
    calls: list[Counter] = field(default_factory=list)  # collectives of each step


def post_validated(case: Case) -> Case:
    return replace(case, parallel=replace(case.parallel, post_validation=True))


class Consecutive(Session):
    """Steps as the trainer makes them: nothing is waited for between them, and a step's numbers are read during the next."""

    def __init__(self, rank: int, world_size: int, case: Case, directory: Path | None = None, device: str = "cpu") -> None:
        super().__init__(rank, world_size, case, directory, device)
        self.report = Report(self.outcome)
        self.bad_steps: tuple[int, ...] = ()
        self.verdict: Verdict | None = None
        self._watch()

    def _watch(self) -> None:
        """Count corrections, note each rank's own norm, and spoil the gradients of the first stage in bad steps."""
        engine, report = self.engine, self.report
        reduce_gradients = engine.reduce_gradients

        def reduce_and_spoil() -> None:
            reduce_gradients()
            if len(report.stage_norms) in self.bad_steps and self.runtime.groups.place.pp == 0:
                engine.buckets[-1].master_grad[0] = float("nan")
            report.stage_norms.append(local_squared_norm(engine.buckets, engine.copies_axis.size).sqrt().item())

        engine.reduce_gradients = reduce_and_spoil
        if isinstance(engine, PostValidatedZero):
            correct = engine._correct

            def count_and_correct(update) -> None:
                report.corrections += 1
                correct(update)

            engine._correct = count_and_correct

    def step(self, step: int) -> None:
        data, ledger = self.runtime.groups.data, self.runtime.groups.ledger
        batch = self.step_runner.prepare(micro_batches(self.case, step, data.rank, data.size))
        ledger.clear()
        info = self.step_runner.run(batch, self.case.optimizer.learning_rate)
        self.report.calls.append(Counter(ledger.calls))
        self.read()
        self.verdict = Verdict(Position(step), 0.0, info, batch.counts[1], self.step_runner.watch.criteria)

    def read(self) -> None:
        """Note the numbers of the step before."""
        if self.verdict is not None:
            numbers, self.verdict = self.verdict.read(), None
            self.outcome.losses.append(numbers.loss)
            self.outcome.norms.append(numbers.grad_norm)
            self.outcome.skipped.append(numbers.skipped)

    def end(self) -> Report:
        self.read()
        self.engine.finish()
        self.report.optimizer_steps = self.engine.optimizer_steps
        self.finish()
        return self.report


def train(rank: int, world_size: int, case: Case, bad_steps: tuple[int, ...] = (), device: str = "cpu") -> Report:
    session = Consecutive(rank, world_size, case, device=device)
    session.bad_steps = bad_steps
    for step in range(STEPS):
        session.step(step)
    return session.end()


def inexact(found: list[Report], expected: list[Report]) -> list[str]:
    """What is not as in the ordinary engine; empty where all is."""
    broken = []
    first, right = found[0].outcome, expected[0].outcome
    for report in found:
        if str([report.outcome.losses, report.outcome.norms]) != str([first.losses, first.norms]):  # (nan is not nan)
            broken.append("ranks disagree on losses or norms")
    if first.losses != pytest.approx(right.losses, rel=TOTALS_TOLERANCE, nan_ok=True):
        broken.append(f"losses {first.losses} and {right.losses}")
    if first.norms != pytest.approx(right.norms, rel=TOTALS_TOLERANCE, nan_ok=True):
        broken.append(f"norms {first.norms} and {right.norms}")
    if first.skipped != right.skipped or found[0].optimizer_steps != expected[0].optimizer_steps:
        broken.append(f"skipped {first.skipped} and {right.skipped}")
    for what in ("weights", "optimizer"):
        ours = assemble([report.outcome for report in found], what)
        theirs = assemble([report.outcome for report in expected], what)
        broken += [f"{what} {name}" for name in theirs if not torch.equal(ours[name], theirs[name])]
    return broken


def compare(case: Case, bad_steps: tuple[int, ...] = ()) -> list[Report]:
    """Train with both engines; they must agree. Returns the reports of the post-validated one."""
    expected = run_ranks(case.world_size, train, case, bad_steps)
    found = run_ranks(case.world_size, train, post_validated(case), bad_steps)
    assert inexact(found, expected) == []
    assert len({report.corrections for report in found}) == 1, "all ranks correct, or none"
    return found


def clipped(clip_norm: float, base: OptimizerConfig = OPTIMIZER) -> OptimizerConfig:
    return replace(base, clip_norm=clip_norm)


# Each with a norm that lies among its gradients' norms: some steps are clipped.
CASES = {
    Case("pp2-1f1b", layout(pp=2)): 1.145,
    Case("pp4-1f1b", layout(pp=4)): 1.145,
    Case("pp2-zb-h2-sgd", layout(pp=2, schedule="zb-h2"), optimizer=SGD): 1.18,
    Case("pp4-zb-h2", layout(pp=4, schedule="zb-h2")): 1.145,
    Case("pp2-zb-v-tied", layout(pp=2, chunks=2, schedule="zb-v"), TIED): 1.15,
    Case("pp2-interleaved", layout(pp=2, chunks=2, schedule="interleaved")): 1.145,
    Case("pp2-dualpipe-v", layout(pp=2, chunks=2, schedule="dualpipe-v")): 1.145,
    Case("pp2-tp2", layout(pp=2, tp=2, sequence_parallel=True, schedule="zb-h2"), train=SMALL_BATCH): 1.65,
    Case("pp2-dp2", layout(pp=2, dp=2, schedule="zb-h2")): 1.145,
    Case("pp2-dp2-zero0", layout(pp=2, dp=2), zero=STAGE_0): 1.145,
    Case("pp2-bf16", layout(pp=2), train=replace(SMALL_BATCH, dtype="bf16")): 1.65,
}


QUICK = ("pp2-1f1b", "pp2-zb-v-tied", "pp2-interleaved", "pp2-tp2", "pp2-dp2-zero0")  # one of a kind; the others are slow
MARKED = [
    pytest.param(case, norm, id=case.name, marks=[] if case.name in QUICK else [pytest.mark.slow])
    for case, norm in CASES.items()
]


@pytest.mark.parametrize(("case", "clip_norm"), MARKED)
def test_some_steps_are_clipped(case: Case, clip_norm: float) -> None:
    """Though no stage alone is above the limit: only the sum over all of them is."""
    found = compare(replace(case, optimizer=clipped(clip_norm, case.optimizer)))
    norms = found[0].outcome.norms
    assert found[0].corrections == sum(norm > clip_norm for norm in norms) and min(norms) < clip_norm < max(norms)
    assert max(norm for report in found for norm in report.stage_norms) < clip_norm
    for report in found:
        assert report.outcome.peak_in_flight == report.outcome.predicted_peak
    read, written = (sum(calls[kind, "pp"] for report in found for calls in report.calls) for kind in ("receive", "send"))
    assert read == written, "nothing is left in the lanes"


@pytest.mark.parametrize(("clip_norm", "corrections"), [(0.0, 0), (NEVER, 0), (ALWAYS, STEPS)], ids=["off", "never", "always"])
def test_no_step_is_clipped_or_all_are(clip_norm: float, corrections: int) -> None:
    """And all that the pipeline ranks say to one another at the end of a step is one message to the next, one to all."""
    case = Case("all-or-none", layout(pp=2, schedule="zb-h2"), train=SMALL_BATCH, optimizer=clipped(clip_norm))
    for report in compare(case):
        assert report.corrections == corrections
        assert all(calls["broadcast", "pp"] == 1 for calls in report.calls)
        assert all(axis == "pp" for calls in report.calls for _, axis in calls), "nothing goes over the world"


def go_ahead(rank: int, world_size: int, case: Case, flag: Path) -> int:
    """The last rank does not end its second step before the first one has."""
    session = Consecutive(rank, world_size, case)
    session.step(0)
    if rank == 1:
        reduce_gradients = session.engine.reduce_gradients

        def wait_for_the_first_rank() -> None:
            while not flag.exists():
                time.sleep(0.001)
            reduce_gradients()

        session.engine.reduce_gradients = wait_for_the_first_rank
    session.step(1)
    flag.touch()
    return session.end().optimizer_steps


def test_the_first_rank_ends_a_step_though_the_last_one_has_not(tmp_path: Path) -> None:
    """With the ordinary engine, each would wait for the other."""
    case = Case("ahead", layout(pp=2, schedule="zb-h2"), train=SMALL_BATCH, optimizer=clipped(NEVER))
    assert run_ranks(2, go_ahead, post_validated(case), tmp_path / "flag") == [2, 2]


@pytest.mark.parametrize(("name", "clip_norm"), [("adamw", 1.65), ("sgd", 0.0)])
def test_steps_that_are_not_finite_are_skipped(name: str, clip_norm: float) -> None:
    """Adam's count stands still; the first stage alone saw the bad gradient. One is the first step, one the last."""
    optimizer = clipped(clip_norm, OPTIMIZER if name == "adamw" else SGD)
    case = Case("bad", layout(pp=2, dp=2, schedule="zb-h2"), train=SMALL_BATCH, optimizer=optimizer)
    found = compare(case, bad_steps=(0, 3, 5))
    assert found[0].outcome.skipped == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert found[0].optimizer_steps == 3


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])])
def test_one_process_alone(device: str) -> None:
    """On a GPU the totals travel on a stream of their own, and the host reads them without waiting for the step's work."""
    case = Case("alone", layout(), train=replace(SMALL_BATCH, dtype="bf16"), optimizer=clipped(1.65))
    expected, found = (train(0, 1, one, (3,), device) for one in (case, post_validated(case)))
    assert 1 < found.corrections < STEPS
    assert [str(found.outcome.norms), found.outcome.losses] == [str(expected.outcome.norms), expected.outcome.losses]
    for what in ("weights", "optimizer"):
        pairs = zip(getattr(found.outcome, what), getattr(expected.outcome, what), strict=True)
        assert all(torch.equal(ours.tensor, theirs.tensor) for ours, theirs in pairs)


def train_and_save(rank: int, world_size: int, case: Case, directory: Path) -> Report:
    session = Consecutive(rank, world_size, case, directory)
    for step in range(STEPS):
        session.step(step)
        if step == 1:  # clipped: saving comes before the correction would
            save_state(session.runtime, session.engine, Position(2, 0, 0), {}, None)
    return session.end()


def resume(rank: int, world_size: int, case: Case, directory: Path) -> Report:
    session = Consecutive(rank, world_size, case, directory)
    load_state(step_directory(directory, 2), session.runtime, session.engine)
    for step in range(2, STEPS):
        session.step(step)
    return session.end()


def test_a_checkpoint_holds_validated_weights(tmp_path: Path) -> None:
    """One that is saved behind a step that has to be clipped goes on as the run that saved it, in both engines."""
    case = Case("saved", layout(pp=2, schedule="zb-h2"), train=SMALL_BATCH, optimizer=clipped(1.58))
    expected = run_ranks(2, train, case)
    saved = run_ranks(2, train_and_save, post_validated(case), tmp_path)
    assert saved[0].outcome.norms[1] > 1.58 and inexact(saved, expected) == []
    for again in (case, post_validated(case)):
        resumed = run_ranks(2, resume, again, tmp_path)
        assert resumed[0].outcome.losses == saved[0].outcome.losses[2:]
        for what in ("weights", "optimizer"):
            ours, theirs = (assemble([report.outcome for report in reports], what) for reports in (resumed, expected))
            assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def forget_the_moments(engine: PostValidatedZero) -> None:
    """Take back the weights alone."""
    engine._state, engine._kept = engine._state[: len(engine.buckets)], engine._kept[: len(engine.buckets)]


def forget_to_correct(engine: PostValidatedZero) -> None:
    engine._correct = lambda update: None


def train_wrongly(rank: int, world_size: int, case: Case, spoil) -> Report:
    session = Consecutive(rank, world_size, case)
    spoil(session.engine)
    for step in range(STEPS):
        session.step(step)
    return session.end()


@pytest.mark.parametrize("spoil", [forget_the_moments, forget_to_correct])
def test_a_correction_that_is_not_complete_is_caught(spoil) -> None:
    case = Case("wrong", layout(pp=2), train=SMALL_BATCH, optimizer=clipped(1.65))
    expected = run_ranks(2, train, case)
    assert inexact(run_ranks(2, train_wrongly, post_validated(case), spoil), expected) != []


def build_tied(rank: int, world_size: int) -> str:
    with pytest.raises(ConfigError) as error:
        Session(rank, world_size, post_validated(Case("tied", layout(pp=2), TIED)))
    return str(error.value)


def test_a_tied_head_on_another_rank_is_refused() -> None:
    for message in run_ranks(2, build_tied):
        assert "post_validation = true cannot be had with model.tie_embeddings under parallel.schedule = 1f1b" in message
        assert "--parallel.schedule zb-v" in message
