"""What is predicted of a run: by which profile, what is said, and that a prediction that fails stops nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_llama import forecast
from megatron_llama.config import RunConfig, load_config
from megatron_llama.forecast import Forecast, make_forecast, seconds_text
from megatron_llama.plan.configured import predict
from megatron_llama.plan.hardware import GIB, find
from megatron_llama.plan.memory import Memory
from parallel.errors import ConfigError
from parallel.launch import Launch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NODES = Launch(world_size=16, local_world_size=4)  # four of them


def config_of(*flags: object) -> RunConfig:
    shared = ("--model.preset", "llama-7b", "--train.steps", 10, "--data.train", "x", "--parallel.tp", 8)
    return load_config([str(word) for word in (*shared, *flags)])


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU as torch describes it."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=round(79.1 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


def test_a_gpu_is_predicted_by_its_own_profile_and_the_jobs_nodes(h100: SimpleNamespace) -> None:
    config = config_of()
    found = make_forecast(config, NODES, GPU)
    expected = predict(config, 16, replace(find("h100"), gpus_per_node=4))
    assert found.step_seconds == expected.step_seconds > 1.1 * predict(config, 16, find("h100")).step_seconds
    assert found.tokens_per_second_per_gpu == expected.tokens_per_second_per_gpu and found.mfu == expected.mfu("causal")
    assert found.memory == expected.largest and found.capacity_bytes == find("h100").memory_bytes
    assert (found.profile, found.reasons) == ("h100", ())
    assert found.state_bytes == found.memory.weights + found.memory.gradients + found.memory.optimizer


def test_the_node_of_a_rack_is_larger_than_a_host() -> None:
    config = config_of("--log.hardware", "gb200")
    assert make_forecast(config, NODES, GPU).step_seconds == predict(config, 16, find("gb200")).step_seconds


def test_a_profile_can_be_named_or_measured(tmp_path: Path) -> None:
    path = tmp_path / "laptop.toml"
    path.write_text('based_on = "a100-40gb"\nbf16_tflops = 3\n')
    named, measured = (make_forecast(config_of("--log.hardware", name), NODES, CPU) for name in ("a100-40gb", path))
    assert (named.profile, measured.profile) == ("a100-40gb", "laptop")
    assert measured.step_seconds > 10 * named.step_seconds and measured.memory == named.memory
    assert measured.capacity_bytes is None  # a CPU's memory is not a GPU's


def test_a_cpu_and_an_unknown_gpu_have_no_time_but_memory(h100: SimpleNamespace) -> None:
    known = make_forecast(config_of(), NODES, GPU)
    h100.name = "NVIDIA H100 PCIe"
    for device, name in ((CPU, "a CPU"), (GPU, "NVIDIA H100 PCIe")):
        found = make_forecast(config_of(), NODES, device)
        assert found.memory == known.memory and found.state_bytes == known.state_bytes and found.step_seconds is None
        assert found.reasons[0].startswith(f"no step time: there is no hardware profile of {name}")
        assert "--log.hardware FILE.toml" in found.lines()[-1]


def test_32_bit_products_are_not_predicted_by_16_bit_profiles(h100: SimpleNamespace) -> None:
    found = make_forecast(config_of("--train.dtype", "fp32"), NODES, GPU)
    assert found.step_seconds is None and "train.dtype = fp32" in found.reasons[0]
    assert found.memory is not None and found.capacity_bytes is not None
    assert make_forecast(config_of("--train.dtype", "fp16"), NODES, GPU).step_seconds is not None


def test_state_on_the_host_is_not_compared() -> None:
    config = config_of("--parallel.tp", 1, "--zero.engine", "deepspeed", "--zero.stage", 2, "--zero.offload", "cpu")
    assert make_forecast(config, NODES, CPU).compared.keys() == {"allocated_bytes"}


def test_nothing_is_predicted_where_nobody_asks() -> None:
    assert make_forecast(config_of("--log.hardware", "none"), NODES, CPU) is None


def test_a_profile_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="log.hardware = h1000: unknown GPU 'h1000'; the nearest known one is h100 .*none"):
        make_forecast(config_of("--log.hardware", "h1000"), NODES, CPU)


def test_a_prediction_that_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("flash9")

    config = config_of("--log.hardware", "h100")
    monkeypatch.setattr(forecast, "predict", fail)
    found = make_forecast(config, NODES, CPU)
    assert found.memory is not None and found.lines()[-1].strip() == "no step time: KeyError: 'flash9'"
    monkeypatch.setattr(forecast, "rank_memory", fail)
    found = make_forecast(config, NODES, CPU)
    assert found.lines() == ["predicted no memory: KeyError: 'flash9'", "          no step time: KeyError: 'flash9'"]
    assert found.record() == found.compared == {}


def test_lines() -> None:
    names = ("weights", "gradients", "optimizer", "activations", "workspace", "buffers", "framework")
    sizes = (12.0, 24.0, 3.5, 18.25, 2.0, 1.25, 8.0)
    memory = Memory(**{name: size * GIB for name, size in zip(names, sizes, strict=True)})
    known = Forecast("h100", 1.2345, 4321.4, 0.45, memory, 39.5 * GIB, 80 * GIB)
    assert known.lines() == [
        "predicted step 1.23 s, 4,321 tokens/s per device, MFU 45.0% (h100)",
        "          the fullest rank allocates 61.0 GiB: weights 12.0, gradients 24.0, optimizer 3.5, activations 18.2, "
        "workspace 2.0, buffers 1.2; with fragmentation and the framework's share 69.0 of 80.0 GiB",
    ]
    assert known.record()["memory_bytes"]["allocated"] == 61 * GIB
    assert [seconds_text(seconds) for seconds in (1234.5, 1.0, 0.0123456)] == ["1,234.50 s", "1.00 s", "12.3 ms"]
