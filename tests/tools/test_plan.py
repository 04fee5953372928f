"""tools/plan.py and tools/evaluate_planner.py as users run them."""

import json
import tomllib

import pytest
from PIL import Image

from megatron_llama.config import from_dict, load_config, to_toml, validate
from megatron_llama.plan.configured import predict
from megatron_llama.plan.hardware import find
from megatron_llama.plan.rows import PUBLISHED
from parallel.errors import UserError
from tests.megatron_llama.programs import succeed, write_dataset
from tools import evaluate_planner
from tools.plan import main

SMALL = ("--preset", "llama-tiny", "--gpus", "4", "--gpu", "h100", "--global-batch-tokens", "4K", "--tokens", "1M")


@pytest.fixture
def plan(monkeypatch, capsys):
    """The tool in this process: what it prints, or says of a mistake."""

    def call(*arguments, fails=False):
        monkeypatch.setattr("sys.argv", ["plan.py", *map(str, arguments)])
        if not fails:
            main()
            return capsys.readouterr().out
        with pytest.raises((UserError, SystemExit)) as caught:
            main()
        return str(caught.value) + capsys.readouterr().err

    return call


def test_text_picture_and_a_configuration(plan, tmp_path):
    output, picture = tmp_path / "best.toml", tmp_path / "plan.png"
    text = plan(*SMALL, "--output", output, "--report", picture, "--price", "2", "--data", "a", "b")
    for expected in ("tokens/s/GPU", "MWh", "price", "memory in GiB", "it loses time to", "risk", f"configuration {output}"):
        assert expected in text
    with Image.open(picture) as image:
        assert min(image.size) > 1000
    config = from_dict(tomllib.loads(output.read_text()))
    validate(config, 4)
    assert [source.prefix for source in config.data.train] == ["a", "b"]
    assert config.train.tokens == 10**6
    assert config.train.global_batch_size * config.train.sequence_length == 4 * 1024


def test_json_has_the_names_of_the_configuration(plan):
    layouts = json.loads(plan(*SMALL, "--json", "--top", "3"))["layouts"]
    assert len(layouts) == 3
    for one in layouts:
        assert one["tp"] * one["pp"] * one["dp"] * one["cp"] == 4
        assert sum(value for name, value in one["memory_bytes"].items() if name != "total") == pytest.approx(
            one["memory_bytes"]["total"]
        )
        assert 0 < one["mfu_causal"] < one["mfu_full"] < 1
        assert 0 <= one["bubble"] < 1 and 0 <= one["exposed_communication"] < 1
        assert one["tokens_per_second_per_gpu"] == pytest.approx(4 * 1024 / one["step_seconds"] / 4)
        assert one["config"]["parallel"]["tp"] == one["tp"]
        assert isinstance(one["schedule"], str) and one["stage"] in (0, 1, 2, 3)
    speeds = [one["tokens_per_second_per_gpu"] for one in layouts]
    assert speeds == sorted(speeds, reverse=True)


def test_the_configuration_trains_as_it_is(plan, tmp_path, monkeypatch):
    """On CPU processes in place of GPUs: only the device and the length of the run are said besides."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "train", 60_000, seed=1)
    plan(*SMALL, "--gpus", "2", "--global-batch-tokens", "1K", "--output", "best.toml", "--data", "train")
    succeed("train", "--config", "best.toml", "--train.device", "cpu", "--train.exit_step", "2", ranks=2)
    lines = [json.loads(line) for line in (tmp_path / "runs/llama/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2


def test_calibration_from_a_run(plan, tmp_path):
    """A run that took twice as long as predicted makes every step twice as long."""
    config = load_config(["--model.preset", "llama-tiny", "--train.steps", "9", "--data.train", "x"])
    seconds = 2 * predict(config, 4, find("h100")).step_seconds
    (tmp_path / "config.toml").write_text(to_toml(config))
    slow_start = [9.0, 9.0, 9.0]
    lines = [json.dumps({"step": step, "step_seconds": one}) for step, one in enumerate([*slow_start, *[seconds] * 5], 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 8, "event": "end"}']))
    calibrate = ("--calibrate", tmp_path / "metrics.jsonl")
    first, second = (json.loads(plan(*SMALL, "--json", *more)) for more in ((), (*calibrate, "--calibrate-gpus", "4")))
    assert second["calibration"] == pytest.approx(2.0)
    assert second["layouts"][0]["step_seconds"] == pytest.approx(2 * first["layouts"][0]["step_seconds"])
    assert "give --calibrate-gpus" in plan(*SMALL, *calibrate, fails=True)


@pytest.mark.parametrize("field", ["bubble", "memory_bytes", "exposed_communication"])
def test_explanations_name_their_sources(plan, field):
    text = plan("--explain", field)
    assert "megatron_llama.plan." in text
    assert "et al." in text or "docs/" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--preset", "llama-7b", "--gpus", "8", "--gpu", "h1000"), "unknown GPU 'h1000'; the nearest known one is h100"),
        (("--preset", "llama-7b", "--gpus", "8"), "--gpu is not given"),
        (("--gpus", "8", "--gpu", "h100"), "no model is given"),
        (("--preset", "llama-8b", "--gpus", "8", "--gpu", "h100"), "the closest known one is"),
        (("--explain", "bubbles"), "the closest one is bubble"),
        (("--preset", "llama-7b", "--gpus", "8", "--gpu", "h100", "--parallel.tq", "2"), "tp"),
        (("--preset", "llama-7b", "--gpus", "8", "--gpu", "h100", "--global-batch-tokens", "four"), "is no count"),
        (("--preset", "llama-7b", "--gpus", "0", "--gpu", "h100"), "argument --gpus: 0 is not above 0"),
    ],
)
def test_mistakes(plan, arguments, expected):
    assert expected in plan(*arguments, fails=True)


def test_evaluation_of_a_file(tmp_path, monkeypatch, capsys):
    rows = json.loads(PUBLISHED.read_text())["rows"]
    few = [row for row in rows if row["group"] in ("dgxc-gb200", "mcore-strong")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [*few, {**few[0], "id": "other", "gpu": "V100"}]}))
    monkeypatch.setattr("sys.argv", ["evaluate_planner.py", "--rows", str(path)])
    evaluate_planner.main()
    printed = capsys.readouterr()
    assert "left out: row other: cannot read 'V100'" in printed.err
    assert "dgxc-gb200" in printed.out and "no traits" in printed.out and "core" in printed.out
    monkeypatch.setattr("sys.argv", ["evaluate_planner.py", "--rows", str(path), "--json"])
    evaluate_planner.main()
    found = json.loads(capsys.readouterr().out)
    assert {row["id"] for row in found["rows"]} == {row["id"] for row in few}
    assert found["core"]["rows"] == len(few)
    assert found["core"]["median"] < 0.1
