"""The benchmark programs at tiny sizes: they print their figures, and their comparisons can fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP = (
    *("--preset", "llama-tiny", "--num-layers", 1, "--vocab-size", 200, "--sequence-length", 16, "--micro-batches", 2),
    *("--steps", 2, "--threads", 1),
)
CHECKPOINT = ("--gib", 0.008, "--rounds", 1)
DATA = ("--megabytes", 1, "--samples", 64, "--sequence-length", 64, "--scale", 0.001, "--rounds", 1, "--workers", 1)


def run(tool, *arguments):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, f"tools/benchmark_{tool}.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )


def check_setting(output, arguments):
    """What a figure is worth nothing without."""
    assert re.search(r"^command    python tools/benchmark_\w+\.py .*" + re.escape(str(arguments[0])), output, re.MULTILINE)
    assert re.search(r"^hardware   .*CPU", output, re.MULTILINE)
    assert re.search(r"^versions   Python \d.*torch \d", output, re.MULTILINE)


def check_step(output, peer, tolerance):
    """The first loss and norm beside the peer's, a row per contestant, and the ratios of both kinds of seconds."""
    for what in ("loss", "norm"):
        first = re.search(rf"^first {what} +ours ([\d.]+)  {peer} ([\d.]+)  relative difference", output, re.MULTILINE)
        assert float(first[1]) == pytest.approx(float(first[2]), rel=tolerance)
    for name in ("ours", peer):
        assert re.search(rf"^{name} +[\d.]+ +[\d.]+ +\d+ +\d+ +-?\d+$", output, re.MULTILINE)
    for part in ("forward and backward", "norm and update", "wait for the weights", "linears and head", "attention"):
        assert re.search(rf"^  {part} +[\d.]+ +[\d.]+$", output, re.MULTILINE)
    for ratio in (f"{peer} / ours", "ours / products of linears, head and attention", "share of linears and head in our step"):
        assert len(re.findall(rf"^  {ratio} +[\d.]+ +\(", output, re.MULTILINE)) == 2


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_step(dtype):
    pytest.importorskip("transformers")
    done = run("step", *STEP, "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    check_setting(done.stdout, STEP)
    check_step(done.stdout, "transformers", 1e-5 if dtype == "fp32" else 1e-2)


@pytest.mark.parametrize(
    ("layout", "peer", "package"),
    [
        pytest.param(("--dp", 2), "deepspeed", "deepspeed", marks=pytest.mark.slow),
        (("--tp", 2, "--pp", 2, "--num-layers", 2), "megatron-core", "megatron.core"),
    ],
)
def test_step_in_a_layout(tmp_path, layout, peer, package):
    pytest.importorskip("transformers")
    pytest.importorskip(package)
    done = run("step", *STEP, *layout, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    check_step(done.stdout, peer, 1e-5)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert set(written["steps"]) == {"ours", peer, "products"} and len(written["steps"]["ours"]) == 2
    needed = {figure["name"]: figure["needed"] for figure in written["figures"]}
    assert needed[f"{peer} / ours"] == ("at least 1" if peer == "deepspeed" else "at least 1.2")
    assert needed["share of linears and head in our step"] == "at least 0.6"
    over_products = needed["ours / products of linears, head and attention"]
    assert over_products == ("at most 1.25" if peer == "deepspeed" else "")


@pytest.mark.slow
def test_step_without_a_peer():
    done = run("step", *STEP, "--tp", 2, "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    because = r"(on several processes it is set up for fp32|.* not installed)"
    assert re.search(rf"^left out +megatron-core: {because}", done.stdout, re.MULTILINE)
    assert "megatron-core / ours" not in done.stdout and "ours / products" in done.stdout


def test_step_refuses_a_layout():
    done = run("step", *STEP, "--tp", 3)
    assert done.returncode == 1
    assert done.stderr.startswith("error: parallel.tp must divide model.num_heads")


@pytest.mark.slow
def test_step_sees_another_token():
    pytest.importorskip("transformers")
    done = run("step", *STEP, "--plant-error")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: the first loss of ours and transformers differ by more than 2e-06: not the same training"
    )
    assert "ours / products" not in done.stdout


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_checkpoint(tmp_path, ranks):
    done = run("checkpoint", *CHECKPOINT, "--ranks", ranks, tmp_path)
    assert done.returncode == 0, done.stderr
    check_setting(done.stdout, CHECKPOINT)
    assert str(tmp_path) not in done.stdout
    row = r"^(save|load|reshape) +(\w+) +[\d.]+ +[\d.]+-[\d.]+ +[\d.]+ +[\d.]+-[\d.]+ +\d+ +-?[\d.]+ +[\d.]+$"
    rows = re.findall(row, done.stdout, re.MULTILINE)
    names = ["raw", "ours", "torch", "safetensors", "dcp"]
    expected = [(operation, name) for operation in ("save", "load") for name in names]
    assert rows == expected + [("reshape", name) for name in names[1:] if ranks > 1]
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_sees_another_value_and_keeps_to_empty_directories(tmp_path):
    done = run("checkpoint", *CHECKPOINT, "--ranks", 1, "--plant-error", tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: raw, load: rank 0 found other values in w0\n")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "precious").write_text("")
    assert run("checkpoint", *CHECKPOINT, tmp_path).returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.slow
def test_data(tmp_path):
    pytest.importorskip("megatron.core")
    done = run("data", *DATA, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    check_setting(done.stdout, DATA)
    assert "ids and files are equal" in done.stdout and "read the same global batches" in done.stdout
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["command"].endswith("figures.json") and "gigatoken 0" in written["versions"]
    figures = written["figures"]
    assert list(dict.fromkeys(figure["section"] for figure in figures)) == [
        *("preprocess", "lookup", "start-up", "mixture", "packing"),
    ]
    for figure in figures:
        assert f"  {figure['name']} " in done.stdout and figure["low"] <= figure["value"] <= figure["high"]
        assert figure["is_met"] is None or figure["needed"].startswith(("at least ", "at most "))
    exact = {figure["name"]: figure for figure in figures if figure["section"] in ("mixture", "packing")}
    assert exact["largest deviation of a source from its share"]["value"] < 1
    assert exact["ours, padding"]["unit"] == "%"
    assert sum(figure["needed"] != "" for figure in figures) == 15


def test_data_sees_another_character():
    pytest.importorskip("megatron.core")
    done = run("data", *DATA, "--plant-error")
    assert done.returncode == 1
    assert done.stderr == "error: document 0: our token ids differ from those of sentencepiece alone\n"
