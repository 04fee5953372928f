"""Parameter counts of the papers, FLOPs against an independent count, and device peaks."""

import pytest

from megatron_llama.config import ModelConfig, load_config
from megatron_llama.flops import (
    dense_peak_flops,
    flops_per_token,
    model_flops,
    model_flops_utilization,
    parameter_count,
)


@pytest.mark.parametrize(
    "name, count",
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-33b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("llama-2-34b", 33_743_970_304),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
    ],
)
def test_published_parameter_counts(name, count):
    assert parameter_count(load_config(["--model.preset", name]).model) == count


def test_flops_are_three_forwards_of_every_matrix_product():
    model = ModelConfig(num_layers=3, hidden_size=64, num_heads=8, num_kv_heads=2, ffn_hidden_size=96, vocab_size=100)
    sequence, head_dim = 32, 8
    # (rows, inner, columns) of each product of one sequence, 2 FLOPs per multiply-add
    layer = [(sequence, 64, 64), (sequence, 64, 16), (sequence, 64, 16), (sequence, 64, 64)]
    layer += [(sequence, 64, 96), (sequence, 64, 96), (sequence, 96, 64)]
    scores = [(sequence, head_dim, sequence), (sequence, sequence, head_dim)] * 8
    products = (layer + scores) * 3 + [(sequence, 64, 100)]
    forward = sum(2 * rows * inner * columns for rows, inner, columns in products)
    assert flops_per_token(model, sequence, "full") * sequence == 3 * forward
    attention = sum(2 * rows * inner * columns for rows, inner, columns in scores) * 3
    assert flops_per_token(model, sequence, "causal") * sequence == 3 * (forward - attention // 2)


def test_attention_inside_documents_costs_as_much_as_the_documents_alone():
    model = ModelConfig(num_layers=3, hidden_size=64, num_heads=8, num_kv_heads=2, ffn_hidden_size=96, vocab_size=100)
    lengths = [10, 1, 21]
    together = model_flops(model, sum(lengths), sum(length**2 for length in lengths))
    assert together == sum(length * flops_per_token(model, length) for length in lengths)
    assert together < 32 * flops_per_token(model, 32) == model_flops(model, 32, 32**2)


def test_full_over_causal_of_llama_3_8b_at_8k():
    model = load_config(["--model.preset", "llama-3-8b"]).model
    assert flops_per_token(model, 8192, "full") / flops_per_token(model, 8192, "causal") == pytest.approx(1.125, abs=2e-3)


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 120GB", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2450),
        ("NVIDIA L40S", 362.05),
    ],
)
def test_peaks_by_the_name_torch_gives(name, teraflops):
    assert dense_peak_flops(name) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("name", ["cpu", "", "NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla V100-SXM2-32GB"])
def test_unknown_devices_have_no_peak(name):
    assert dense_peak_flops(name) is None


def test_peak_is_for_bf16_alone():
    assert dense_peak_flops("NVIDIA H200", "fp32") is None


def test_mfu_of_the_paper_s_65b_run():
    """380 tokens/s on each A100: 6 x (65.29e9 - 0.26e9) + 6 x 80 x 8192 x 2048 = 398.2 GFLOP a token, 151 TFLOP/s."""
    model = load_config(["--model.preset", "llama-65b"]).model
    share = model_flops_utilization(380 * 2048, flops_per_token(model, 2048), 2048, dense_peak_flops("NVIDIA A100-SXM4-80GB"))
    assert share == pytest.approx(0.485, abs=0.001)
    assert model_flops_utilization(1.0, 1, 1, None) is None
