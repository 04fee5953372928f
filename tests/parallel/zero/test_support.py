"""The support table: what the page shows is what it says, and every refusal helps."""

from pathlib import Path

import pytest

from parallel.zero.support import FEATURES, REFUSALS, matrix, refusal

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_shows_exactly_this_table():
    assert f"\n{matrix()}\n" in (ROOT / "docs/zero.md").read_text(encoding="utf-8"), "docs/zero.md is to hold:\n" + matrix()


def test_every_engine_and_stage_is_a_line_and_every_feature_a_column():
    lines = matrix().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [f"{engine} {stage}" for engine, stage in REFUSALS]
    assert all(line.count("|") == len(FEATURES) + 2 for line in lines)


@pytest.mark.parametrize(("engine", "stage"), REFUSALS)
def test_refusals_are_of_known_features_and_say_what_to_set(engine, stage):
    row = REFUSALS[engine, stage]
    assert set(row) <= {"", *FEATURES}
    for refused in row.values():
        assert refused.because and not refused.because.endswith(".") and "--" in refused.instead


def test_lookups():
    assert refusal("native", 1) is None and refusal("native", 1, "pipeline") is None
    assert "sharded" not in refusal("native", 2, "pipeline").because
    assert refusal("deepspeed", 0) is not None and refusal("native", 3) is not None
    assert refusal("native", 7).instead == "--zero.stage 1"
