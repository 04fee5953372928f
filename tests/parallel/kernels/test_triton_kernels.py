"""Our own Triton kernels: on the CPU in Triton's interpreter (`triton_checks.py`), and on a GPU as they are compiled."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.kernels.providers import Workload, is_installed
from parallel.kernels.self_test import failure
from parallel.kernels.table import ROWS

ROOT = Path(__file__).resolve().parents[3]
CHECKS = "tests.parallel.kernels.triton_checks"
NAMES = [
    "logits fp32",
    "logits bf16",
    "logits of several blocks",
    "a rank without columns",
    "whole cross entropy",
    "rms_norm fp32",
    "rms_norm bf16",
    "rms_norm with fewer programs than tokens",
    "add_rms_norm fp32",
    "add_rms_norm bf16",
    "qkv_rope fp32",
    "qkv_rope bf16, tables of each sample",
    "rope of many heads",
    "rope lays out for attention",
]


@pytest.fixture(scope="module")
def outcomes():
    """What each check found, all of them in one process with an interpreting triton."""
    if not is_installed("triton"):
        pytest.skip("needs the package triton")
    command, environment = [sys.executable, "-m", CHECKS], {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(name, outcomes):
    assert outcomes[name] == "", outcomes[name]


def test_every_check_is_looked_at(outcomes):
    assert list(outcomes) == NAMES


# Arguments that are not fp32 pointers: the kernels' dtype (bf16), targets, eps; all others are integers.
FP32 = {"found", "log_sum", "scale", "dweight", "cos", "sin"}
BF16 = {"logits", "x", "delta", "weight", "total", "y", "dy", "dtotal", "dx", "qkv", "out", "dq", "dk", "dv", "dqkv"}
KERNELS = [
    ("triton_cross_entropy", "_statistics_kernel", {"BLOCK": 4096}),
    ("triton_cross_entropy", "_gradient_kernel", {"BLOCK": 4096}),
    ("triton_norm", "_forward_kernel", {"ADD": False, "BLOCK": 4096}),
    ("triton_norm", "_forward_kernel", {"ADD": True, "BLOCK": 4096}),
    ("triton_norm", "_backward_kernel", {"ADD": False, "BLOCK": 4096}),
    ("triton_norm", "_backward_kernel", {"ADD": True, "BLOCK": 4096}),
    ("triton_rope", "_forward_kernel", {"BLOCK": 32, "HALF": 64}),
    ("triton_rope", "_backward_kernel", {"BLOCK": 32, "HALF": 64}),
]


@pytest.mark.parametrize(("module", "name", "constants"), KERNELS)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles_for_a_gpu_that_need_not_be_there(module, name, constants):
    """To machine code of compute capability 9.0: what the interpreter accepts, the compiler may not."""
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    kernel = getattr(importlib.import_module(f"parallel.kernels.{module}"), name)
    types = {**dict.fromkeys(FP32, "*fp32"), **dict.fromkeys(BF16, "*bf16"), "targets": "*i64", "eps": "fp32"}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    places = {(kernel.arg_names.index(a),): value for a, value in constants.items()}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=places)
    assert compiler.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["cubin"]


OURS = [(operation, provider) for operation, row in ROWS.items() for provider in row if provider.name == "triton"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("operation", "provider"), OURS, ids=[operation for operation, _ in OURS])
def test_compiled_for_a_gpu(operation, provider, dtype):
    """It has not run yet: there was no GPU."""
    assert failure(operation, provider, ROWS[operation][-1], Workload(torch.device("cuda"), dtype)) is None
