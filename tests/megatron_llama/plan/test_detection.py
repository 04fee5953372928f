"""The profile of a GPU by its name: every kind that profiles are made of, and no other."""

import pytest

from megatron_llama.flops import dense_peak_flops
from megatron_llama.plan.detection import profile_of
from megatron_llama.plan.hardware import GIB, find


@pytest.mark.parametrize(
    ("device", "memory_gib", "profile"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA B200", 178.4, "b200"),
        ("NVIDIA GB200", 184.0, "gb200"),
        ("NVIDIA GB300", 277.0, "gb300"),
        ("AMD Instinct MI300X", 191.5, "mi300x"),
    ],
)
def test_gpus_that_have_a_profile(device, memory_gib, profile):
    assert profile_of(device, round(memory_gib * GIB)) == profile
    found = find(profile)
    assert found.memory_bytes == pytest.approx(memory_gib * GIB, rel=0.02)
    assert dense_peak_flops(device) in (None, found.bf16_flops)  # None: not tabulated there


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA H100 PCIe",  # slower, and without NVLink
        "NVIDIA A100 80GB PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA L40S",
    ],
)
def test_others_have_none(device):
    assert profile_of(device, 80 * GIB) is None
