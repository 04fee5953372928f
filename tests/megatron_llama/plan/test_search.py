"""The search: what it finds can run as it is, in the order of its speed, and errors name the nearest that works."""

import tomllib
from dataclasses import replace

import pytest

from megatron_llama.config import from_dict, load_config, to_toml, validate
from megatron_llama.plan import hardware
from megatron_llama.plan.configured import predict
from megatron_llama.plan.economics import Rates, bill
from megatron_llama.plan.fit import with_efficiency
from megatron_llama.plan.risks import FULL, risks
from megatron_llama.plan.search import STALLED, layouts, search, with_global_batch
from megatron_llama.plan.step_time import step_time
from parallel.errors import ConfigError
from parallel.pipeline.schedules import SCHEDULES

BATCH = 4 * 2**20


def base(preset, *flags, batch=BATCH):
    config = load_config(["--model.preset", preset, "--data.train", "x", "--train.tokens", str(10**11), *flags])
    return with_global_batch(config, batch)


@pytest.fixture(scope="module")
def thirteen_billion():
    return search(base("llama-13b"), 64, hardware.find("h100"))


CASES = [
    ("llama-7b", 8, "a100-80gb", BATCH),
    ("llama-13b", 24, "h100", 3 * 2**20),
    ("llama-2-70b", 96, "h200", 3 * 2**21),
    ("llama-3-8b", 40, "mi300x", 5 * 2**20),
    ("llama-3.2-1b", 6, "b200", 3 * 2**19),
    ("llama-tiny", 4, "gb200", 2**13),
]


@pytest.mark.parametrize(("preset", "gpus", "gpu", "batch"), CASES)
def test_every_layout_is_one_that_the_program_accepts(preset, gpus, gpu, batch):
    """Not the rules of the search but those of the training program decide, and the text that is written reads back."""
    found = search(base(preset, batch=batch), gpus, hardware.find(gpu))
    for one in found[:: 1 + len(found) // 200]:
        validate(one.config, gpus)
    best = found[0].config
    assert from_dict(tomllib.loads(to_toml(best))) == best


def test_layouts_cover_all_that_can_be_set(thirteen_billion):
    seen = [one.config for one in thirteen_billion]
    assert {config.parallel.tp for config in seen} >= {1, 2, 4, 8}
    assert {config.parallel.pp for config in seen} >= {1, 2, 4, 8}
    assert {config.parallel.schedule for config in seen} >= {"1f1b", "interleaved", "zb-h1", "zb-v"}
    assert {config.parallel.recompute for config in seen} == {"none", "linear_outputs", "full"}
    assert {(config.zero.engine, config.zero.stage) for config in seen} >= {("native", 1), ("native", 2), ("deepspeed", 3)}


def test_the_fastest_comes_first_and_full_memory_is_not_free(thirteen_billion):
    ranked = [one.ranking_seconds for one in thirteen_billion]
    assert ranked == sorted(ranked)
    assert all(one.prediction.fill <= 1.0 for one in thirteen_billion)
    full = [one for one in thirteen_billion if one.prediction.fill > FULL]
    assert full
    assert all(one.ranking_seconds == pytest.approx(STALLED * one.prediction.step_seconds) for one in full)
    assert all(any("full" in risk for risk in risks(one.prediction)) for one in full)


def test_no_layout_is_left_out_for_its_schedule_alone():
    """The table of schedules and the rules decide; the search asks them."""
    for config in layouts(base("llama-7b"), 32):
        parallel = config.parallel
        micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * parallel.dp)
        assert SCHEDULES[parallel.schedule].allows(parallel.pp, parallel.chunks, micro_batches)
        assert parallel.tp * parallel.pp * parallel.cp * parallel.dp == 32


def test_a_batch_that_divides_nothing():
    with pytest.raises(ConfigError, match=r"no layout of 7 GPUs .* = 2048; the nearest that works is 2051 samples"):
        search(base("llama-7b"), 7, hardware.find("h100"))
    search(base("llama-7b", batch=2051 * 2048), 7, hardware.find("h100"))


def test_a_model_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"no layout of 1 x a100-40gb fits .*; the nearest that works is 4 GPUs"):
        search(base("llama-7b"), 1, hardware.find("a100-40gb"))
    assert search(base("llama-7b"), 4, hardware.find("a100-40gb"))


def test_a_step_of_less_than_one_sample():
    with pytest.raises(ConfigError, match="less than one sample of 2048; the nearest is 2048"):
        base("llama-7b", batch=100)


def test_parts_of_a_step_add_up(thirteen_billion):
    for one in thirteen_billion[::50]:
        prediction = one.prediction
        assert sum(vars(prediction.time).values()) == pytest.approx(prediction.time.total)
        assert 0 < prediction.mfu("causal") < prediction.mfu("full") < 1
        assert 0 <= prediction.bubble < 1
        assert 0 <= prediction.exposed_communication < 1


def test_better_hardware_is_faster(thirteen_billion):
    """Each efficiency and each bandwidth works in its direction, in layouts of every kind."""
    for one in thirteen_billion[::40]:
        job = one.prediction.job
        efficiency = job.cluster.hardware.efficiency
        for name in ("product", "attention", "memory", "link", "network"):
            better = with_efficiency(job, replace(efficiency, **{name: 1.1 * getattr(efficiency, name)}))
            assert step_time(better).total <= one.prediction.time.total * (1 + 1e-9), name
        for name in ("launch_seconds", "jitter", "contention"):
            worse = with_efficiency(job, replace(efficiency, **{name: 2 * getattr(efficiency, name) + 1e-3}))
            assert step_time(worse).total >= one.prediction.time.total, name


def test_calibration_scales_the_step():
    config = search(base("llama-7b"), 8, hardware.find("h100"))[0].config
    plain, slower = (predict(config, 8, hardware.find("h100"), factor) for factor in (1.0, 1.25))
    assert slower.step_seconds == pytest.approx(1.25 * plain.step_seconds)
    assert slower.mfu("full") == pytest.approx(plain.mfu("full") / 1.25)


def test_energy_of_llama_65b():
    """Touvron et al. 2023, table 15: 1,022,362 GPU-hours of A100s at 400 W and PUE 1.1 are 449 MWh and 173 t."""
    found = search(base("llama-7b"), 8, hardware.find("a100-80gb"))[0].prediction
    tokens = round(1_022_362 * 3600 * found.tokens_per_second_per_gpu)
    cost = bill(found, tokens, Rates(price=2.0))
    assert cost.gpu_hours == pytest.approx(1_022_362)
    assert cost.megawatt_hours == pytest.approx(449, abs=1)
    assert cost.tonnes_co2 == pytest.approx(173, abs=1)
    assert cost.cost == pytest.approx(2 * cost.gpu_hours)
    assert cost.seconds * 8 / 3600 == pytest.approx(cost.gpu_hours)
