"""The adapters of packages that need CUDA, against stand-ins with the packages' signatures; and Liger itself, interpreted."""

import subprocess
import sys

import pytest
import torch

from parallel.groups import Axis
from parallel.kernels import apex_kernels, flash_attention_kernels, multi_tensor_kernels
from parallel.kernels.providers import Workload, is_installed
from parallel.kernels.self_test import failure
from parallel.kernels.table import ROWS
from tests.parallel.building import randn
from tests.parallel.kernels import fakes

NAMES = ("apex", "transformer_engine", "flash_attention_2", "flash_attention_3", "flash_attention_4")
CASES = [
    pytest.param(operation, provider, dtype, id=f"{operation}-{provider.name}-{str(dtype)[6:]}")
    for operation, row in ROWS.items()
    for provider in row
    if provider.name in NAMES
    for dtype in provider.dtypes
]


@pytest.fixture
def packages(monkeypatch):
    made = fakes.packages()
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.mark.parametrize(("operation", "provider", "dtype"), CASES)
def test_an_adapter_agrees_with_the_reference(operation, provider, dtype, packages):
    """Forward and backward, with the dtypes, shapes and layouts that the package demands."""
    assert failure(operation, provider, ROWS[operation][-1], Workload(dtype=dtype)) is None


def test_without_the_package_an_adapter_says_so():
    reason = failure("rms_norm", ROWS["rms_norm"][0], ROWS["rms_norm"][-1], Workload())
    assert reason == "apex fails its self-test: ModuleNotFoundError: No module named 'fused_layer_norm_cuda'"


def test_apex_cross_entropy_counts_the_token_with_id_0(packages):
    logits = randn(4, 1, 10)
    losses = apex_kernels.cross_entropy(logits, torch.zeros(4, 1, dtype=torch.int64), 10, Axis.single("tp"))
    torch.testing.assert_close(losses, -logits.log_softmax(-1)[..., 0])


def test_apex_rope_reads_slices_of_a_projection_as_they_lie(packages):
    """No copy of x: the kernel takes strides, also of sequence and batch folded into one."""
    seen = []
    module = packages["fused_rotary_positional_embedding"]
    forward = module.forward_cached
    module.forward_cached = lambda x, *others: (seen.append(x.data_ptr()), forward(x, *others))[1]
    x = randn(6, 2, 8, 4)[:, :, 3:5]
    for b in (1, 2):
        angles = randn(6, b, 2)
        apex_kernels.rope(x, angles.cos(), angles.sin())
    assert seen == [x.data_ptr()] * 2


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_follows_torchs_deterministic_algorithms(deterministic, packages):
    asked = []
    attend = fakes.flash_2
    packages["flash_attn"].flash_attn_func = lambda *x, **settings: (asked.append(settings), attend(*x, **settings))[1]
    qkv = [randn(4, 1, 2, 8).bfloat16() for _ in range(3)]
    torch.use_deterministic_algorithms(deterministic)
    try:
        flash_attention_kernels.flash_attention_2(*qkv)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [{"causal": True, "deterministic": deterministic}]


def test_an_update_without_elements_calls_nothing():
    """The extension isn't even imported (there is none here)."""
    empty = [torch.empty(0)]
    scalars = {"grad_scale": torch.ones(()), "found_inf": torch.zeros(())}
    numbers = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    multi_tensor_kernels.apex_adamw(empty, empty, empty, empty, torch.ones(()), **numbers, **scalars)
    assert multi_tensor_kernels.apex_l2_norm(empty).item() == 0.0


LIGER = """
import numpy as np, torch, triton.language as tl, triton.runtime.interpreter as interpreter
from liger_kernel.ops import fused_add_rms_norm, rms_norm
from parallel.kernels import liger_kernels, self_test
from parallel.kernels.providers import Workload
from parallel.kernels.table import ROWS

convert = interpreter._implicit_cvt
def as_compiled(argument):  # compiled kernels get floats as fp32 scalars, interpreted ones as Python's
    if isinstance(argument, float):
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
    return convert(argument)
interpreter._implicit_cvt = as_compiled
fused_add_rms_norm.rsqrt = rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # CUDA's library of mathematics is not interpreted

self_test.S, self_test.D = 4, 16
for operation, row in ROWS.items():
    for provider in row:
        if provider.name == "liger":
            for dtype in (torch.float32, torch.float16):  # the interpreter multiplies bf16 as if it were integers
                print(operation, dtype, self_test.failure(operation, provider, row[-1], Workload(dtype=dtype)))

x, dy, angles = torch.ones(3, 1, 2, 8, requires_grad=True), torch.ones(3, 1, 2, 8), torch.ones(3, 1, 4)
liger_kernels.rope(x, angles.cos(), angles.sin()).backward(dy)
print("written over: ", None if (x == 1).all() and (dy == 1).all() else (x, dy))
"""


@pytest.mark.skipif(not is_installed("liger_kernel") or not is_installed("triton"), reason="needs liger-kernel and triton")
def test_liger_itself_agrees_with_the_reference_in_tritons_interpreter(monkeypatch):
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", LIGER], capture_output=True, text=True, timeout=200)
    lines = done.stdout.splitlines()
    assert len(lines) == 9, done.stderr
    assert all(line.endswith("None") for line in lines), lines


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("operation", ROWS)
def test_every_provider_at_hand_agrees_with_the_reference_on_the_gpu(operation):
    """Not run yet: no GPU was at hand."""
    row = ROWS[operation]
    for provider in row:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            workload = Workload(torch.device("cuda"), dtype)
            if provider.missing(workload) is None:
                assert failure(operation, provider, row[-1], workload) is None
