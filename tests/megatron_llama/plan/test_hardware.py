"""Hardware profiles: those of the project, a user's own, and fitting their efficiencies."""

from dataclasses import replace

import pytest

from megatron_llama.flops import dense_peak_flops
from megatron_llama.plan import fit, hardware
from megatron_llama.plan.hardware import Efficiency, find
from megatron_llama.plan.rows import job_of, read_rows
from megatron_llama.plan.step_time import step_time
from parallel.errors import ConfigError


@pytest.mark.parametrize("name", hardware.names())
def test_profiles_of_the_project(name):
    found = find(name)
    assert found.name == name
    assert set(found.attention) == {"flash1", "flash2", "flash3", "cudnn"} or name.startswith("a100")
    for shares in found.attention.values():
        assert 0 < shares[1] <= shares[0] < 1
    assert 0.3 < found.efficiency.product < 1


@pytest.mark.parametrize(("name", "device"), [("a100-80gb", "A100-SXM4-80GB"), ("h200", "NVIDIA H200"), ("b200", "B200")])
def test_peaks_are_those_of_utilisation(name, device):
    assert find(name).bf16_flops == dense_peak_flops(device)


def test_a_profile_of_ones_own(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text('based_on = "h100"\nnetwork_gb_per_second = 12.5\n[efficiency]\nproduct = 0.6\n')
    own, h100 = find(str(path)), find("h100")
    assert own.network_bytes_per_second == 12.5e9
    assert own.efficiency == replace(h100.efficiency, product=0.6)
    assert (own.bf16_flops, own.attention) == (h100.bf16_flops, h100.attention)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('based_on = "h100"\nnetwork_gbps = 1', "unknown key network_gbps; the closest known one is network_gb_per_second"),
        ('based_on = "v100"', "based_on must be one of a100-40gb"),
        ("memory_gib = 80", "bf16_tflops must be a number above 0, and is None"),
        ('based_on = "h100"\nwatts = -1', "watts must be a number above 0, and is -1"),
        ('based_on = "h100"\n[efficiency]\nspeed = 1', "unknown key efficiency.speed"),
        ("watts =", "hardware profile"),
    ],
)
def test_mistakes_in_a_profile(tmp_path, text, named):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        find(str(path))


@pytest.mark.parametrize(("name", "nearest"), [("a100", "a100-40gb"), ("H100-SXM", "h100"), ("V100", "h100"), ("gb2", "gb200")])
def test_an_unknown_gpu(name, nearest):
    with pytest.raises(ConfigError, match=f"unknown GPU '{name}'; the nearest known one is {nearest}"):
        find(name)


def test_fitting_finds_the_efficiency_that_made_the_steps():
    rows = [row for row in read_rows() if row["group"] in ("dgxc-bf16", "mosaic-H100")][::4]
    true = Efficiency(product=0.6, product_depth=300.0, memory=0.7, network=0.6)
    jobs = [job_of(row) for row in rows]
    measured = [(job, step_time(fit.with_efficiency(job, true)).total, "one source", 1.0) for job in jobs]
    found = fit.fit(measured, Efficiency(), {name: fit.LIMITS[name] for name in ("product", "product_depth", "memory")})
    errors = [abs(step_time(fit.with_efficiency(job, found)).total / seconds - 1) for job, seconds, _, _ in measured]
    assert sorted(errors)[len(errors) // 2] < 0.01
    assert found.product == pytest.approx(true.product, abs=0.03)
