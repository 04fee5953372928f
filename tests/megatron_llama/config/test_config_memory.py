"""The rules of recomputation, offload, float8 and CUDA graphs, and what is said of sizes that float8 does not suit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_llama.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig, ZeroConfig
from megatron_llama.config.presets import preset_layer
from megatron_llama.config.rules_memory import RULES, cuda_graphs, float8_advice, rather_not
from megatron_llama.runtime import COMPILED, model_kernels
from parallel.errors import ConfigError

MODEL = ModelConfig(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, ffn_hidden_size=96, vocab_size=64)


def config(model: ModelConfig = MODEL, parallel: dict | None = None, **train) -> RunConfig:
    train = {"sequence_length": 32, "dtype": "bf16", **train}
    return RunConfig(model=model, parallel=ParallelConfig(**(parallel or {})), train=TrainConfig(**train))


def complaint(run: RunConfig) -> str:
    try:
        for rule in RULES:
            rule(run)
    except ConfigError as error:
        return str(error)
    return ""


def test_what_goes_together() -> None:
    assert complaint(config()) == ""
    for recompute in ("none", "selective", "linear_outputs"):
        assert complaint(config(parallel={"recompute": recompute, "offload_layers": 2})) == ""
    assert complaint(config(parallel={"recompute": "full", "recompute_layers": 1, "offload_layers": 1})) == ""
    for recipe in ("tensorwise", "rowwise"):
        assert complaint(config(parallel={"tp": 2}, float8=recipe)) == ""


@pytest.mark.parametrize(
    ("run", "parts"),
    [
        (config(parallel={"recompute_layers": 3}), ["recompute_layers = 3", "recompute = none", "--parallel.recompute full"]),
        (
            replace(config(parallel={"recompute": "linear_outputs"}), zero=ZeroConfig(stage=3)),
            ["recompute = linear_outputs", "zero.stage = 3", "--parallel.recompute full"],
        ),
        (config(float8="rowwise", dtype="fp32"), ["float8 = rowwise", "dtype = fp32", "--train.dtype bf16"]),
        (config(float8="tensorwise", sequence_length=24), ["multiples of 16", "x sequence_length", "24", "float8 none"]),
        (config(parallel={"tp": 4}, float8="rowwise"), ["inputs of w2 are 24", "tp 4"]),
        (config(parallel={"tp": 2, "tp_overlap": "chunks"}, float8="rowwise"), ["tp_overlap = chunks", "tp_overlap backward"]),
    ],
)
def test_what_does_not(run: RunConfig, parts: list[str]) -> None:
    message = complaint(run)
    assert [part for part in parts if part not in message] == [], message


def graphed(dp: int = 1, **parallel) -> RunConfig:
    return config(parallel={"dp": dp, **parallel}, cuda_graphs=True, global_batch_size=6)


@pytest.mark.parametrize(
    ("run", "parts"),
    [
        (config(cuda_graphs=True, device="cpu"), ["train.device = cpu"]),
        (graphed(pp=2), ["parallel.pp = 2"]),
        (graphed(schedule="zb-h1"), ["parallel.schedule = zb-h1", "set --parallel.schedule 1f1b"]),
        (graphed(schedule="gpipe"), ["parallel.schedule = gpipe", "set --parallel.schedule 1f1b"]),
        (graphed(offload_layers=1), ["parallel.offload_layers = 1", "set --parallel.offload_layers 0"]),
        (graphed(tp=2, tp_overlap="async"), ["tp_overlap = async", "set --parallel.tp_overlap backward"]),
        (graphed(dp=3), ["each data rank has 2", "set --train.global_batch_size to at least 9"]),
    ],
)
def test_what_cuda_graphs_do_not_go_with(run: RunConfig, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        cuda_graphs(run, world_size=1)
    message = str(refused.value)
    assert message.startswith("train.cuda_graphs = true ")
    assert [part for part in parts if part not in message] == [], message
    cuda_graphs(replace(run, train=replace(run.train, cuda_graphs=False)), world_size=1)


def test_what_cuda_graphs_go_with() -> None:
    for run in (graphed(), graphed(dp=2), graphed(schedule="auto"), graphed(recompute="full"), graphed(tp=2)):
        cuda_graphs(run, world_size=1)
    cuda_graphs(config(parallel={"tp_overlap": "async"}, cuda_graphs=True), world_size=1)  # there is nothing to overlap


def test_float8_needs_a_gpu_that_has_it() -> None:
    with pytest.raises(ConfigError, match=r"float8 = rowwise cannot run here: .* capability 8.9 .* on cpu; set --train.float8"):
        model_kernels(config(float8="rowwise"), torch.device("cpu"))


def test_compile_takes_what_nobody_has_chosen() -> None:
    run = config(compile=True)
    kernels, _ = model_kernels(run, torch.device("cpu"))
    assert {kernels.names[operation] for operation in COMPILED} == {"compiled"}
    assert model_kernels(config(), torch.device("cpu"))[0].names["swiglu"] != "compiled"


def test_small_products_are_named_at_the_start() -> None:
    big, small = (ModelConfig(**preset_layer(name, "test")["model"]) for name in ("llama-7b", "llama-3.2-1b"))
    assert float8_advice(config(big)) == float8_advice(config(big, float8="tensorwise")) == []
    (advice,) = float8_advice(config(small, float8="rowwise"))
    assert "slower" in advice and "wo (2048 x 2048)" in advice and "w1 and w3" not in advice


def test_the_advice_is_that_of_torchao() -> None:
    utils = pytest.importorskip("torchao.float8.float8_linear_utils")

    for recipe in ("tensorwise", "rowwise"):
        converts = utils._auto_filter_for_recipe(recipe, [])
        for inputs in (512, 1024, 2048, 4096, 8192):
            for outputs in (1024, 2048, 4096, 8192):
                linear = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
                assert rather_not(recipe, inputs, outputs) != converts(linear, "w"), (recipe, inputs, outputs)
