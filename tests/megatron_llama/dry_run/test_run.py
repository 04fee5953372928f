"""`--dry-run` as a user meets it: what it prints, what it needs, and what it says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_llama.config import load_config
from megatron_llama.dry_run.run import dry_run
from megatron_llama.flops import parameter_count
from parallel.errors import ConfigError
from parallel.launch import Launch

EXAMPLE_65B = Path(__file__).parents[3] / "examples/configs/llama-65b.toml"
SMALL = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.num_heads": 4,
    "model.ffn_hidden_size": 96,
    "model.vocab_size": 128,
    "train.sequence_length": 32,
    "train.global_batch_size": 16,
    "train.steps": 10,
}


def flags(*more: str, **settings) -> list[str]:
    return ["--dry-run", *more, *(f"--{name}={value}" for name, value in {**SMALL, **settings}.items())]


def figures(capsys, *more: str, **settings) -> dict:
    assert dry_run(Launch(), flags("--json", *more, **settings)) == 0
    return json.loads(capsys.readouterr().out)


def test_every_stage_of_a_job_that_is_larger_than_this_machine(capsys, tmp_path, monkeypatch):
    """No dataset, nothing written, and copies of the same stage are alike."""
    monkeypatch.chdir(tmp_path)
    layout = {"parallel.tp": 2, "parallel.pp": 4}
    found = figures(capsys, "--world-size", "128", "--all-stages", **layout)
    assert list(tmp_path.iterdir()) == []
    assert [one["rank"] for one in found["ranks"]] == [0, 32, 64, 96]
    assert [one["layers"] for one in found["ranks"]] == [[[0, 1]], [[1, 2]], [[2, 3]], [[3, 4]]]
    assert {one["micro_batches"] for one in found["ranks"]} == {1}
    again = figures(capsys, "--world-size", "128", "--rank", "37", **layout)
    same = ("peak_bytes", "flops", "traffic", "parameters")
    assert [found["ranks"][1][name] for name in same] == [again["ranks"][0][name] for name in same]


def test_the_table_names_the_fullest_rank(capsys):
    dry_run(Launch(), flags("--all-stages", "--world-size", "16", **{"parallel.pp": 2}))
    text = capsys.readouterr().out
    assert "pp 2 x dp 8 x cp 1 x tp 1 = 16 ranks, 8 per node" in text
    assert "rank 0, the fullest:" in text and "reduce_scatter" in text and "FLOPs of a step" in text


@pytest.mark.parametrize(
    "settings",
    [
        {"kernels.rms_norm": "apex", "train.compile": "true"},
        {"train.float8": "tensorwise"},
        {"parallel.tp_overlap": "async"},
        {"train.cuda_graphs": "true"},
    ],
    ids=str,
)
def test_settings_that_need_a_gpu_are_said_to_have_run_otherwise(capsys, settings):
    found = figures(capsys, "--world-size", "4", **settings, **{"parallel.tp": 2})
    assert [note.split(" ", 1)[0] for note in found["notes"]] == list(settings)


@pytest.mark.parametrize(
    "more, settings, message",
    [
        ([], {}, "--world-size NUMBER"),
        (["--world-size", "0"], {}, "0 is not above 0"),
        (["--world-size", "6"], {"parallel.tp": 4}, "multiple of tp 4 x pp 1 x cp 1 = 4, and is 6; start 4 or 8"),
        (["--world-size", "8", "--rank", "8"], {}, "--rank 8 is not one of the 8 ranks: give one of 0 to 7"),
        (["--world-size", "8", "--rank", "1", "--all-stages"], {}, "remove one of them"),
        (["--world-size", "8"], {"zero.engine": "deepspeed", "zero.stage": 2}, "--zero.engine native --zero.stage 2"),
        (["--world-size", "8"], {"parallel.pp": 2, "parallel.post_validation": "true"}, "--parallel.post_validation false"),
        (["--world-size", "8"], {"train.global_batch_size": 12}, "--train.global_batch_size to 8 or 16"),
        (["--world-size", "8", "--stages"], {}, "--stages"),
    ],
)
def test_mistakes(more, settings, message):
    with pytest.raises(ConfigError) as error:
        dry_run(Launch(), flags(*more, **settings))
    assert message in str(error.value)


def test_offloaded_layers_leave_the_device(capsys):
    """Of four equal layers, two wait in host memory; while one comes back, the next is on its way."""
    large = {"model.hidden_size": 256, "model.ffn_hidden_size": 1024, "train.sequence_length": 2048, "parallel.pp": 1}
    kept = [
        figures(capsys, "--world-size", "4", **large, **{"parallel.offload_layers": layers})["ranks"][0]["peak_bytes"]
        for layers in (0, 2)
    ]
    assert kept[1]["activations"] < 0.8 * kept[0]["activations"] and kept[1]["total"] < kept[0]["total"]


def test_sgd_has_no_moments(capsys):
    adamw, sgd = (
        figures(capsys, "--world-size", "4", **{"optimizer.name": name})["ranks"][0]["peak_bytes"]["optimizer"]
        for name in ("adamw", "sgd")
    )
    assert adamw == 3 * sgd > 0


@pytest.mark.slow
def test_llama_65b_on_2048_gpus(capsys):
    arguments = ["--config", str(EXAMPLE_65B), "--dry-run", "--json", "--all-stages", "--world-size", "2048"]
    assert dry_run(Launch(), arguments) == 0
    found = json.loads(capsys.readouterr().out)
    model = load_config(["--model.preset", "llama-65b"]).model
    norms = (2 * model.num_layers + 1) * model.hidden_size
    held = sum(one["parameters"] for one in found["ranks"])  # of one of eight tensor ranks; norms are on all of them
    assert 8 * (held - norms) + norms == parameter_count(model)
    computed = sum(one["flops"]["total"] for one in found["ranks"]) * 512
    assert 1.0 < computed / found["model_flops"] < 1.02
    assert all(row["link"] == "node" for one in found["ranks"] for row in one["traffic"] if row["axis"] == "tp")
