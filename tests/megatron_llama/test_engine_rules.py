"""Which engines a configuration can have, and what its DeepSpeed file may say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_llama.config import load_config
from megatron_llama.config.rules_zero import deepspeed_file, engine_supports, further_settings
from parallel.errors import ConfigError
from parallel.zero.support import FEATURES, REFUSALS

ASKED = {
    "tensor": ["--parallel.tp", "2"],
    "pipeline": ["--parallel.pp", "2"],
    "schedules": ["--parallel.schedule", "gpipe"],
    "post_validation": ["--parallel.post_validation", "true"],
    "fp16": ["--train.dtype", "fp16"],
    "shard_groups": ["--zero.shard_group_size", "2"],
    "bf16_gradients": ["--zero.gradient_dtype", "bf16"],
    "bf16_wire": ["--zero.reduce_dtype", "bf16"],
    "narrow_state": ["--optimizer.moment_dtype", "bf16"],
    "host_offload": ["--zero.offload", "cpu"],
    "file_offload": ["--zero.offload", "nvme"],
    "compile": ["--train.compile", "true"],
    "cuda_graphs": ["--train.cuda_graphs", "true"],
    "float8": ["--train.float8", "rowwise"],
}


def config_of(engine: str, stage: int, *arguments: str):
    return load_config(["--zero.engine", engine, "--zero.stage", str(stage), *arguments])


def file_of(folder: Path, content: object) -> list[str]:
    path = folder / "deepspeed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return ["--zero.deepspeed_config", str(path)]


def test_every_feature_of_the_table_can_be_asked_for():
    assert set(ASKED) | {"zero_plus_plus", "zero_plus_plus_tensor"} == set(FEATURES)


@pytest.mark.parametrize(("engine", "stage"), REFUSALS)
@pytest.mark.parametrize("feature", ASKED)
def test_what_the_table_refuses_is_refused_and_nothing_else(engine: str, stage: int, feature: str) -> None:
    config, row = config_of(engine, stage, *ASKED[feature]), REFUSALS[engine, stage]
    expected = row.get("") or row.get(feature)
    if expected is None:
        engine_supports(config)
        return
    with pytest.raises(ConfigError) as refused:
        engine_supports(config)
    message = str(refused.value)
    assert f"zero.stage = {stage}" in message and engine in message
    assert expected.because in message and message.endswith(f"set {expected.instead}")
    if "" not in row:
        assert message.startswith(f"{ASKED[feature][0].removeprefix('--')} = {ASKED[feature][1]}")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"train_micro_batch_size_per_gpu": 7}, ["train_micro_batch_size_per_gpu = 7", "change --train.micro_batch_size"]),
        ({"gradient_accumulation_steps": 3}, ["gradient_accumulation_steps = 3", "makes it 4", "--train.global_batch_size"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping = 0.5", "makes it 1.0", "--optimizer.clip_norm"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled = false", "makes it true", "--train.dtype"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage = 2", "makes it 1", "--zero.stage"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["device = \"cpu\"", "--zero.offload"]),
        ({"communication_data_type": "bf16"}, ["communication_data_type", "--zero.reduce_dtype"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, ["optimizer.type", "remove it", "--optimizer.name"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler.type", "--optimizer.learning_rate"]),
        ({"gradient_allreduce_op": "mean"}, ["gradient_allreduce_op", "remove it", "sets it itself"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel.autotp_size = 2", "--parallel.tp"]),
        ("{", ["is no JSON"]),
        ([1], ["holds a list"]),
    ],
)
def test_a_contradiction_is_named(content: object, parts: list[str], tmp_path: Path) -> None:
    config = config_of("deepspeed", 1, *file_of(tmp_path, content))
    with pytest.raises(ConfigError) as refused:
        deepspeed_file(config, world_size=8)
    assert all(part in str(refused.value) for part in [*parts, str(tmp_path / "deepspeed.json")])


def test_what_repeats_the_configuration_or_adds_to_it_is_taken(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 32,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 1000, "offload_optimizer": {"device": "none"}},
        "wall_clock_breakdown": True,
    }
    config = config_of("deepspeed", 3, *file_of(tmp_path, content))
    deepspeed_file(config, world_size=8)
    assert further_settings(config) == {
        "bf16": {},
        "zero_optimization": {"stage3_prefetch_bucket_size": 1000, "offload_optimizer": {}},
        "wall_clock_breakdown": True,
    }
    assert further_settings(config_of("deepspeed", 3)) == {}


def test_a_file_that_is_not_there_or_not_for_this_engine(tmp_path: Path) -> None:
    missing = config_of("deepspeed", 1, "--zero.deepspeed_config", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        deepspeed_file(missing, world_size=1)
    with pytest.raises(ConfigError, match="is for zero.engine = deepspeed, not native"):
        deepspeed_file(config_of("native", 1, *file_of(tmp_path, {})), world_size=1)


QUANTISED = {"zero_optimization": {"zero_quantized_weights": True}}


@pytest.mark.parametrize(
    ("stage", "arguments", "reason"),
    [
        (1, [], "it is of DeepSpeed's stage 3"),
        (3, ["--parallel.tp", "2"], "the losses would be wrong; set --parallel.tp 1"),
        (3, ["--train.device", "cpu"], "needs CUDA"),
    ],
)
def test_zero_plus_plus_is_for_data_parallel_stage_3_on_gpus(stage, arguments, reason, tmp_path: Path) -> None:
    config = config_of("deepspeed", stage, *arguments, *file_of(tmp_path, QUANTISED))
    with pytest.raises(ConfigError, match="zero_quantized_weights in zero.deepspeed_config .*" + reason):
        engine_supports(config)
        deepspeed_file(config, world_size=8)


def test_zero_plus_plus_passes_through(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = config_of("deepspeed", 3, *file_of(tmp_path, QUANTISED))
    engine_supports(config)
    deepspeed_file(config, world_size=8)
    assert further_settings(config) == QUANTISED
