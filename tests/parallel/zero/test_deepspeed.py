"""The fence around DeepSpeed: what is imported and how, what it is told, what it leaves behind, holds and sends."""

from __future__ import annotations

import os
import sys
from collections import Counter
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.errors import ConfigError
from parallel.launch import lent_environment, provide_local_rank
from parallel.zero import deepspeed_setup
from parallel.zero.deepspeed_engine import DeepSpeedZero
from parallel.zero.deepspeed_setup import VERSION, DeepSpeedOptions, deepspeed_settings
from parallel.zero.engine import OptimizerSettings
from parallel.zero.native import NativeZero
from tests.parallel.building import grid, parameter, randn, whole
from tests.ranks import run_ranks
from tests.with_deepspeed import deepspeed_imported  # noqa: F401

HIDDEN, LAYERS = 64, 6
NUMEL = LAYERS * HIDDEN * HIDDEN


def test_a_package_that_is_missing_or_broken_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=f"fails to import .*: pip install deepspeed=={VERSION} .*--zero.engine native"):
        deepspeed_setup.import_deepspeed()


def test_another_version_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="0.18.2"))
    with pytest.raises(ConfigError, match=f"needs deepspeed {VERSION}, and 0.18.2 is installed"):
        deepspeed_setup.import_deepspeed()


def test_the_extra_pins_the_version_that_the_engine_wants() -> None:
    setup = (deepspeed_setup.__file__).rsplit("/parallel/", 1)[0] + "/setup.py"
    assert f'"deepspeed=={VERSION}"' in open(setup, encoding="utf-8").read()


def test_an_optimizer_that_the_engine_does_not_know_is_not_reached_into() -> None:
    engine = object.__new__(DeepSpeedZero)
    engine.groups = SimpleNamespace(data=SimpleNamespace(rank=0, size=1))
    with pytest.raises(AssertionError, match="DeepSpeed has chosen FP16_UnfusedOptimizer"):
        engine._parts_of(type("FP16_UnfusedOptimizer", (), {})(), [])


def test_the_environment_is_lent_and_given_back(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with lent_environment({"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}):
        os.environ["SET_BY_A_LIBRARY"] = "1"
        assert os.environ["LOCAL_RANK"] == "0"
    assert os.environ["LOCAL_RANK"] == "3" and "SET_BY_A_LIBRARY" not in os.environ and "DS_ACCELERATOR" not in os.environ
    provide_local_rank(5)
    assert os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_is_told(stage: int) -> None:
    """Sums instead of means where it can, no clipping, no norm where it is not needed; a user's settings beside ours."""
    extra = {"wall_clock_breakdown": True, "zero_optimization": {"stage3_prefetch_bucket_size": 7, "stage": 0}}
    settings = OptimizerSettings(zero_stage=stage, bucket_size=99, reduce_dtype=torch.bfloat16, clip_norm=1.0)
    told = deepspeed_settings(torch.bfloat16, settings, DeepSpeedOptions(micro_batch_size=4, extra=extra))
    assert told["gradient_allreduce_op"] == ("mean" if stage == 3 else "sum")
    assert told["gradient_clipping"] == 0.0 and told["gradient_accumulation_steps"] == 1
    assert told["communication_data_type"] == "bf16" and told["data_types"] == {"grad_accum_dtype": "fp32"}
    assert told["wall_clock_breakdown"] and told["train_micro_batch_size_per_gpu"] == 4
    zero = told["zero_optimization"]
    assert zero["stage"] == stage and zero["reduce_bucket_size"] == 99 and zero["stage3_prefetch_bucket_size"] == 7
    assert zero["overlap_comm"] == (stage > 1) and zero.get("compute_grad_norm", True) == (stage != 2)
    offloaded = deepspeed_settings(torch.float32, settings, DeepSpeedOptions(offload="cpu"))["zero_optimization"]
    assert offloaded["offload_optimizer"] == {"device": "cpu"} and "compute_grad_norm" not in offloaded


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends by the ring formulas, by kind of collective."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent = ranks, Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        kind = operation.name().removeprefix("c10d::")
        if kind != operation.name():
            tensors = [t for a in arguments[:2] for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            largest = max((t.nbytes for t in tensors), default=0)
            self.sent[kind] += (2 if "allreduce" in kind else 1) * largest * (self.ranks - 1) // self.ranks
        return operation(*arguments, **(keywords or {}))


class Product(torch.nn.Module):
    """x W^T, whose weight gradient comes by autograd."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


def small_net(dtype: torch.dtype) -> torch.nn.Sequential:
    shape = (HIDDEN, HIDDEN)
    made = [parameter(whole(f"w{i}", shape), {f"w{i}": randn(*shape, seed=i).to(dtype) * 0.1}) for i in range(LAYERS)]
    return torch.nn.Sequential(*map(Product, made))


def one_step(rank: int, world_size: int, stage: int, native: bool, passes: int):
    """A second step's traffic, the state's bytes, and what was printed or left in the environment."""
    before = dict(os.environ)
    net, groups = small_net(torch.bfloat16), grid(rank, dp=world_size)
    settings = OptimizerSettings(zero_stage=stage)
    names = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold")
    at_once = {f"stage3_{name}": 0 for name in names}
    options = DeepSpeedOptions(extra={"zero_optimization": at_once} if stage == 3 else {})  # nothing stays from F to B
    engine = NativeZero([net], groups, settings) if native else DeepSpeedZero([net], groups, settings, options)
    left = {name for name in os.environ if os.environ[name] != before.get(name)}
    for step in range(2):
        with Traffic(world_size) as traffic:
            engine.begin_step()
            engine.expect_passes(passes)
            for number in range(passes):
                x = randn(2, HIDDEN, seed=100 * step + 10 * number + rank, dtype=torch.bfloat16)
                engine.chunks[0](x).float().sum().backward()
            engine.step(0.01, torch.zeros(1, dtype=torch.float64))
            engine.finish()
    return sum(size for size in traffic.sent.values() if size > 1000), engine.state_bytes, left


@cache
def of_engine(stage: int, native: bool):
    return run_ranks(2, one_step, stage, native, 2)


# bytes per parameter: what is held (D data ranks), and what is sent in a step of M passes, times (D-1)/D
EXPECTED = {
    1: (lambda d: 2 + 4 + 12 / d, lambda m: 8 + 2),
    2: (lambda d: 2 + 16 / d, lambda m: 8 * m + 2),
    3: (lambda d: 18 / d, lambda m: (4 + 2 * 2) * m),
}


@pytest.mark.usefixtures("deepspeed_imported")
@pytest.mark.parametrize("stage", EXPECTED)
def test_bytes_held_and_sent_are_those_of_the_page(stage: int) -> None:
    held, sent = EXPECTED[stage]
    for traffic, state_bytes, left in of_engine(stage, native=False):
        assert state_bytes / NUMEL == pytest.approx(held(2), rel=2e-3)
        assert traffic / NUMEL == pytest.approx(sent(2) / 2, rel=2e-3)
        assert left == ({"LOCAL_RANK"} if stage == 3 else set())


@pytest.mark.usefixtures("deepspeed_imported")
def test_the_native_engine_sends_at_most_two_thirds_of_what_deepspeed_sends() -> None:
    (native, _, _), *_ = of_engine(1, native=True)
    (deepspeed, _, _), *_ = of_engine(1, native=False)
    assert native / NUMEL == pytest.approx((4 + 2) / 2, rel=2e-3)
    assert native <= deepspeed * 2 / 3
