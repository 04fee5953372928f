"""The benchmark of pipeline schedules at a tiny size: all contestants run, and its checks can fail. Nothing is timed here."""

import json
import re

from tests.tools.test_benchmarks import check_setting, run

SIZES = ("--pp", 2, "--micro-batches", 3, "--steps", 2, "--sleep-ms", 2, "--link-ms", 0.5)


def test_every_contestant_runs_and_no_rank_leaves_its_list(tmp_path):
    arguments = (*SIZES, "--schedules", "1f1b", "zb-v", "--json", tmp_path / "figures.json")
    done = run("pipeline", *arguments)
    assert done.returncode == 0, done.stderr
    check_setting(done.stdout, SIZES)
    assert "every rank ran exactly its list, and no peak was above the prediction" in done.stdout
    for row in ("1f1b", "zb-v", "torch ZBVZeroBubble", "torch InterleavedZeroBubble"):
        assert re.search(rf"^{row} +\d", done.stdout, re.MULTILINE)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["overhead_seconds"] > 0
    one, two = figures["rows"]
    assert [row["schedule"] for row in (one, two)] == ["1f1b", "zb-v"]
    assert [row["peak_executed"] for row in (one, two)] == [row["peak_predicted"] for row in (one, two)] == [2, 4]
    for row in (one, two):
        work = 3 * 3 * 0.002 * row["chunks"]  # of one rank
        assert len(row["executed_seconds"]) == 2
        assert min(row["executed_seconds"]) > work and row["predicted_seconds"] > work
        assert 0 < row["idle_executed"] <= row["bubble_executed"] < 1
        assert row["in_a_row_executed_seconds"] > work
        assert row["blocking_executed_over_predicted"] > 0
    assert one["torch"] == []
    assert all(len(peer["executed_seconds"]) == 2 for peer in two["torch"])


def test_another_order_is_noticed():
    done = run("pipeline", *SIZES, "--schedules", "1f1b", "--plant-error")
    assert done.returncode == 1
    assert "error: 1f1b, 3 micro-batches: pp rank 0 left its list at place 4 of 6\n" in done.stderr
    assert "ratio" not in done.stdout


def test_a_schedule_that_cannot_have_the_sizes_is_refused():
    done = run("pipeline", *SIZES, "--schedules", "dualpipe-v")
    assert done.returncode == 2
    assert done.stderr.startswith("error: parallel.schedule = dualpipe-v with parallel.pp = 2 needs 4 micro-batches")
