"""The program for one GPU, at a tiny size on the CPU. Its CUDA path has not run: the test of it needs a device."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).parents[2]
TINY = (
    *("--preset", "llama-tiny", "--num-layers", 1, "--vocab-size", 200, "--sequence-length", 16, "--micro-batches", 2),
    *("--warm-up", 1, "--steps", 2),
)


@pytest.fixture
def profiling(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import _profiling

    return _profiling


def run(*arguments):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "tools/benchmark_gpu.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=250,
    )


def check(done, folder, names):
    """A row per contestant, the same first step, and a trace, seconds and a bar for each."""
    assert done.returncode == 0, done.stderr
    for name in names:
        assert re.search(rf"^{name} +[\d.]+  \([\d.]+ to [\d.]+\) +\d+ +[\d.]+ ", done.stdout, re.MULTILINE)
        trace = json.loads(gzip.decompress((folder / f"{name}.trace.json.gz").read_bytes()))
        assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
        assert json.loads((folder / f"{name}.json").read_text())["matrix products"] > 0
    for name in names[1:]:
        assert f"{name} / ours: " in done.stdout
        assert len(re.findall(rf"^first (?:loss|norm) +ours [\d.]+  {name} ", done.stdout, re.MULTILINE)) == 2
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_on_a_cpu(tmp_path):
    pytest.importorskip("transformers")
    done = run(*TINY, "--device", "cpu", "--peers", "transformers", "--profile", tmp_path)
    check(done, tmp_path, ["ours", "transformers"])
    assert "peak unknown" in done.stdout and "needed" not in done.stdout


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    pytest.importorskip("liger_kernel")
    done = run(*TINY, "--device", "cuda", "--peers", "compile", "liger", "--profile", tmp_path)
    check(done, tmp_path, ["ours", "compile", "liger"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matrix products"),
        ("aten::addmm_", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x128x64", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("liger_cross_entropy_kernel", "head and loss"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>", "copies and fills"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", "element-wise and sums"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "element-wise and sums"),
        ("ProfilerStep", "other"),
    ],
)
def test_kinds(profiling, name, kind):
    assert profiling.kind_of(name) == kind


def test_kernels_count_once_on_a_gpu(profiling):
    """Neither the operations that launch them nor the user's spans around them do."""

    def event(name, device, cpu, gpu, is_annotation=False):
        times = {"self_cpu_time_total": cpu, "self_device_time_total": gpu}
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=is_annotation, **times)

    events = [
        event("aten::mm", DeviceType.CPU, 50.0, 0.0),
        event("nvjet_tst_1", DeviceType.CUDA, 0.0, 2e6),
        event("nvjet_tst_2", DeviceType.CUDA, 0.0, 1e6),
        event("all_gather/tp", DeviceType.CUDA, 0.0, 9e6, is_annotation=True),
    ]
    assert profiling.seconds_by_kind(events, on_gpu=True) == {"matrix products": 3.0}
    assert profiling.seconds_by_kind(events[:1], on_gpu=False) == {"matrix products": 5e-5}


def test_profiled_leaves_other_steps_alone(profiling, tmp_path):
    numbers = []

    class Contestant:
        def run(self, number):
            numbers.append(number)
            torch.ones(8, 8) @ torch.ones(8, 8)
            return 1.0, 2.0

    profiled = profiling.Profiled(Contestant(), tmp_path / "it", "cpu")
    assert profiled.run(4) == (1.0, 2.0) and list(tmp_path.iterdir()) == []
    assert profiled.run(profiled.NUMBER) == (1.0, 2.0)
    assert {path.name for path in tmp_path.iterdir()} == {"it.json", "it.trace.json.gz"}
    assert numbers == [4, 0]
