"""The benchmark of post-validation at a tiny size: it prints its figures, and says what does not fit."""

import json

from tests.tools.test_benchmarks import check_setting, run

SIZES = ("--pp", 2, "--micro-batches", 3, "--steps", 1, "--sleep-ms", 1, "--schedules", "zb-h2", "1f1b")


def test_post_validation(tmp_path):
    done = run("post_validation", *SIZES, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    check_setting(done.stdout, SIZES)
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["schedule"] for row in rows] == ["zb-h2", "1f1b"]
    for row in rows:
        seconds = row["seconds_per_step"]
        assert set(seconds) == {"busy", "no optimizer", "ordinary", "post-validated", "all corrected"}
        assert all(value >= 0.9 * seconds["busy"] for value in seconds.values()), "a step is not shorter than its sleep"


def test_sizes_that_do_not_fit():
    done = run("post_validation", "--schedules", "dualpipe-v", "--pp", 4, "--micro-batches", 2)
    assert done.returncode == 2 and done.stderr.startswith("error: parallel.schedule = dualpipe-v")
