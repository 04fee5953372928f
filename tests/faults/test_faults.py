"""A selection of the fault matrix, and that the campaign itself can fail. `make faults` runs all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_llama import resume
from tests.faults.campaign import Campaign, Injection
from tests.faults.matrix import FAST, GRID, SYNCHRONOUS, one, whole_matrix
from tests.faults.places import Place
from tests.faults.storm import Storm, blow


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("faults") / "campaign")


@pytest.mark.parametrize("injection", FAST, ids=str)
def test_a_run_survives(injection: Injection, campaign: Campaign) -> None:
    result = campaign.inject(injection)
    assert not result.wrong, "\n".join([*result.wrong, result.log])


def test_a_storm(campaign: Campaign) -> None:
    result = blow(campaign, Storm("dp2 zero2", seed=1, kills=4))
    assert not result.wrong and result.faults == 4, "\n".join([*result.wrong, result.log])


def test_the_whole_matrix_is_large_and_has_everything_once() -> None:
    injections = whole_matrix(seed=1)
    assert sum(len(injection.strikes) for injection in injections) >= 200
    assert len(set(injections)) == len(injections)


DEATH = one("F1", GRID, "SIGKILL", Place("B0", 1, 5), settings=SYNCHRONOUS)


def test_a_resume_that_loses_a_step_of_the_optimizer_is_found(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    load_state = resume.load_state

    def load_and_forget(directory, runtime, engine, *readers):
        position = load_state(directory, runtime, engine, *readers)
        engine.optimizer_steps -= 1
        return position

    monkeypatch.setattr(resume, "load_state", load_and_forget)
    wrong = campaign.inject(DEATH).wrong
    assert len(wrong) == 2 and wrong[0].startswith("losses and norms") and wrong[1].startswith("the last checkpoint's files")


def test_what_does_not_happen_and_what_nobody_expects_is_found(campaign: Campaign) -> None:
    (strike,) = DEATH.strikes
    nowhere = replace(DEATH, strikes=(replace(strike, place=Place("B7", 1, 5)),))
    assert campaign.inject(nowhere).wrong == [f"never happened: {nowhere.strikes[0]}"]
    codes, aside = campaign.inject(replace(DEATH, codes=(75,), aside=1)).wrong
    assert codes == "exit codes [0], not [75]" and aside.startswith("1 damaged checkpoints were to be put aside")
