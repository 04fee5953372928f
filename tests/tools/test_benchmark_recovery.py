"""The recovery benchmark at a tiny size: counts, not times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.test_benchmarks import check_setting, run


def test_overhead(tmp_path: Path) -> None:
    arguments = ("--only", "overhead", "--size", "tiny", "--steps", 8)
    done = run("recovery", *arguments, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    check_setting(done.stdout, arguments)
    figures = {figure["name"]: figure["value"] for figure in json.loads((tmp_path / "figures.json").read_text())["figures"]}
    messages, passes = 8 + 8, 8 + 8  # of a stage per step: a message in and one out, a forward and a backward action
    assert figures["beats"] > messages + passes
    assert 0 < figures["heartbeats, counted"] < figures["beats"] * 100
    assert figures["verdicts"] > 0 and figures["an audit"] > 0


@pytest.mark.slow
def test_recovery(tmp_path: Path) -> None:
    done = run("recovery", "--only", "recovery", "--rounds", 1, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads((tmp_path / "figures.json").read_text())["figures"]}
    assert set(figures) == {
        "dead rank found",
        "hanging rank found, after its limit",
        "report written",
        "restart to the first new step, warm",
        "restart to the first new step, cold",
    }
    assert all(figure["value"] > 0 for figure in figures.values())
