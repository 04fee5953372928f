"""Planning a pipeline: what layers keep is counted against autograd, choices against hand-made cases."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from megatron_llama.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_llama.config.presets import preset_layer
from megatron_llama.data.loader import MicroBatch
from megatron_llama.flops import model_flops
from megatron_llama.pipeline_plan import (
    head_work,
    layer_activations,
    layer_work,
    settle_schedule,
    stage_activations,
    stage_costs,
    stage_layers,
)
from megatron_llama.runtime import build_runtime
from parallel.errors import ConfigError
from parallel.pipeline.layout import Placement
from tests.alive import AliveMemory
from tests.ranks import run_ranks

MODEL = ModelConfig(num_layers=6, hidden_size=64, num_heads=8, num_kv_heads=2, ffn_hidden_size=176, vocab_size=64)
SEVEN_B = ModelConfig(**preset_layer("llama-7b", "test")["model"])


def config(model: ModelConfig = MODEL, batch: int = 16, length: int = 64, micro_batch_size: int = 2, **parallel) -> RunConfig:
    train = TrainConfig(
        steps=1, global_batch_size=batch, sequence_length=length, micro_batch_size=micro_batch_size, dtype="bf16", device="cpu"
    )
    return RunConfig(model=model, parallel=ParallelConfig(**parallel), train=train)


def kept_bytes(rank: int, world_size: int, run: RunConfig) -> int:
    """What is alive after a forward pass, parameters apart."""
    runtime = build_runtime(run, rank, world_size, torch.device("cpu"), timedelta(seconds=60))
    tokens = torch.zeros(run.train.sequence_length, run.train.micro_batch_size, dtype=torch.int64)
    positions = torch.arange(run.train.sequence_length)[:, None]
    micro_batch = MicroBatch(tokens, tokens, torch.ones_like(tokens, dtype=torch.float32), positions)
    with AliveMemory(apart=runtime.chunks[0].parameters()) as memory:
        loss = runtime.chunks[0](None, micro_batch)
    assert loss.requires_grad
    return memory.bytes()


@pytest.mark.parametrize("recompute", ["none", "selective", "linear_outputs", "full"])
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, True), (2, False)])
def test_activations_are_what_autograd_keeps(recompute: str, tp: int, sequence_parallel: bool) -> None:
    run = config(recompute=recompute, tp=tp, sequence_parallel=sequence_parallel)
    fewer = replace(run, model=replace(MODEL, num_layers=2))
    of_six, of_two = (run_ranks(tp, kept_bytes, one)[0] for one in (run, fewer))
    assert layer_activations(run, recompute)[0] == pytest.approx((of_six - of_two) / 4, rel=0.03)


def test_a_stage_keeps_what_its_layers_do() -> None:
    whole, input_only = (layer_activations(config(), mode)[0] for mode in ("none", "full"))
    assert stage_activations(config(recompute="full"), 6) == 6 * input_only
    assert stage_activations(config(recompute="full", recompute_layers=2), 6) == 2 * input_only + 4 * whole
    assert stage_activations(config(recompute="full", recompute_layers=2, offload_layers=3), 6) == 3 * whole
    assert stage_activations(config(offload_layers=9), 6) == 0


def test_work_adds_up_to_the_model_flops() -> None:
    layer, head = layer_work(SEVEN_B, 2048), head_work(SEVEN_B)
    total = sum(SEVEN_B.num_layers * getattr(layer, part) + getattr(head, part) for part in ("forward", "input_backward"))
    total += SEVEN_B.num_layers * layer.weight_backward + head.weight_backward
    assert total * 2048 == model_flops(SEVEN_B, 2048, 2048**2)


def test_the_last_stage_has_fewer_layers_where_the_head_is_heavy() -> None:
    small = replace(MODEL, num_layers=12, vocab_size=2000)  # a head of about 3 layers
    counts = stage_layers(config(small, pp=4), Placement(4))
    assert sum(counts) == 12 and counts[-1] == 1 and max(counts[:-1]) == 4
    costs = stage_costs(config(small, pp=4), Placement(4))
    assert max(costs.forward) < 1.4 * sum(costs.forward) / 4
    assert stage_layers(config(small, pp=4, layers_per_stage=(3, 3, 3, 3)), Placement(4)) == (3, 3, 3, 3)


def test_a_head_in_chunks_does_all_its_work_in_the_forward_pass() -> None:
    llama_3 = replace(SEVEN_B, vocab_size=128_256)
    whole, chunked = (stage_costs(config(llama_3, length=length, pp=4), Placement(4)) for length in (512, 2048))
    head = head_work(llama_3, chunked=True)
    assert (head.forward, head.input_backward, head.weight_backward) == (3 * head_work(llama_3).forward, 0, 0)
    for costs, more_forward in ((whole, False), (chunked, True)):
        assert (costs.forward[-1] > costs.weight_backward[-1] * 2) == more_forward


def test_a_split_backward_takes_as_long_as_a_whole_one() -> None:
    costs = stage_costs(config(SEVEN_B, length=2048, pp=4), Placement(4))
    for whole, inputs, weights in zip(costs.backward, costs.input_backward, costs.weight_backward, strict=True):
        assert whole == inputs + weights and inputs > weights  # the scores have no weights


def test_auto_without_a_limit_has_no_bubble_to_speak_of() -> None:
    run = settle_schedule(config(SEVEN_B, 64, 2048, 1, pp=4, schedule="auto"), 4)
    assert run.parallel.schedule in ("zb-h1", "zb-h2", "zb-v", "dualpipe-v")


def test_auto_takes_what_fits() -> None:
    """Less memory, another schedule; too little, an error with the number that is needed."""
    asked = config(SEVEN_B, 64, 2048, 1, pp=8, schedule="auto")
    limits = (0.0, 10.0, 7.0, 6.0)
    chosen = [settle_schedule(replace(asked, parallel=replace(asked.parallel, activation_memory_gib=x)), 8) for x in limits]
    names = [run.parallel.schedule for run in chosen]
    assert len(set(names)) > 1 and names[-1] in ("v-half", "v-min"), names
    with pytest.raises(ConfigError, match=r"schedule = auto: no schedule fits.* GiB on pp rank 0, where 0.1 are free"):
        settle_schedule(replace(asked, parallel=replace(asked.parallel, activation_memory_gib=0.1)), 8)


def test_a_named_schedule_that_does_not_fit() -> None:
    asked = config(SEVEN_B, 64, 2048, 1, pp=8, schedule="gpipe", activation_memory_gib=12.0)
    with pytest.raises(ConfigError, match=r"schedule = gpipe: .* needs .* GiB on pp rank 0, where 12 are free; set --parallel"):
        settle_schedule(asked, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "zb-v"}, "cannot have parallel.chunks = 1: set --parallel.chunks to 2, or --parallel.schedule to"),
        ({"schedule": "1f1b", "chunks": 2}, "set --parallel.chunks to 1, or --parallel.schedule to interleaved"),
        ({"schedule": "dualpipe-v", "chunks": 2, "pp": 3, "dp": 2}, "needs 6 micro-batches"),
    ],
)
def test_sizes_that_a_schedule_cannot_have(settings: dict, message: str) -> None:
    run = config(**{"pp": 2, **settings})
    with pytest.raises(ConfigError, match=message):
        settle_schedule(run, run.parallel.pp * max(1, run.parallel.dp))
