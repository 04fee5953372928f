"""The self-test finds wrong results, wrong gradients, lost documents and exceptions."""

import pytest
import torch

from parallel.kernels import optimizer_kernels, reference_kernels
from parallel.kernels.providers import Provider, Workload
from parallel.kernels.self_test import failure
from parallel.kernels.table import ROWS


class HalfGradient(torch.autograd.Function):
    """The identity with half its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy / 2


def weight_gradient_halved(x, weight, eps):
    return reference_kernels.rms_norm(x, HalfGradient.apply(weight), eps)


def residual_gradient_lost(residual, delta, weight, eps):
    total, y = reference_kernels.add_rms_norm(residual, delta, weight, eps)
    return total.detach() + 0 * y, y


def rotated_the_other_way(x, cos, sin):
    return reference_kernels.rope(x, cos, -sin)


def one_table_for_all(x, cos, sin):
    return reference_kernels.rope(x, cos[:, :1], sin[:, :1])


def halves_swapped(gate_up):
    return reference_kernels.swiglu(gate_up.roll(gate_up.shape[-1] // 2, -1))


def documents_forgotten(q, k, v, documents=None):
    return reference_kernels.attention(q, k, v)


def kv_heads_shifted(q, k, v, documents=None):
    return reference_kernels.attention(q, k.roll(1, 2), v.roll(1, 2), documents)


def overwritten(main_grad, x, dy):
    main_grad.zero_()
    reference_kernels.wgrad(main_grad, x, dy)


def padding_counted(logits, targets, vocabulary, tp):
    return reference_kernels.cross_entropy(logits, targets, logits.shape[-1], tp)


def id_0_ignored(logits, targets, vocabulary, tp):
    return reference_kernels.cross_entropy(logits, targets, vocabulary, tp) * (targets != 0)


def mask_ignored(*tensors, found_inf, **settings):
    optimizer_kernels.adamw_reference(*tensors, found_inf=torch.zeros_like(found_inf), **settings)


def coupled_decay(masters, grads, *state, weight_decay, grad_scale, **settings):
    grads = [grad + weight_decay * master * grad_scale for master, grad in zip(masters, grads, strict=True)]
    optimizer_kernels.adamw_reference(masters, grads, *state, weight_decay=0.0, grad_scale=grad_scale, **settings)


def last_tensor_forgotten(tensors):
    return optimizer_kernels.l2_norm_reference(tensors[:-1])


def broken(*arguments):
    raise OSError("undefined symbol: _ZN3c10")


WRONG = {
    weight_gradient_halved: "rms_norm",
    residual_gradient_lost: "add_rms_norm",
    rotated_the_other_way: "rope",
    one_table_for_all: "rope",
    halves_swapped: "swiglu",
    documents_forgotten: "attention",
    kv_heads_shifted: "attention",
    overwritten: "wgrad",
    padding_counted: "cross_entropy",
    id_0_ignored: "cross_entropy",
    mask_ignored: "adamw",
    coupled_decay: "adamw",
    last_tensor_forgotten: "l2_norm",
}


def result_of(function, operation, dtype):
    provider = Provider("planted", f"{__name__}:{function.__name__}")
    return failure(operation, provider, ROWS[operation][-1], Workload(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_a_wrong_kernel_is_found(function, dtype):
    assert "differs from the reference by" in result_of(function, WRONG[function], dtype)


def test_an_exception_of_any_kind_is_a_failure():
    assert result_of(broken, "swiglu", torch.float32) == "planted fails its self-test: OSError: undefined symbol: _ZN3c10"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("operation", ROWS)
def test_torchs_kernels_and_the_references_pass(operation, dtype):
    for provider in ROWS[operation]:
        if provider.name in ("torch", "sdpa", "reference"):
            assert failure(operation, provider, ROWS[operation][-1], Workload(dtype=dtype)) is None


def test_torchs_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    assert failure("rope", ROWS["rope"][-1], ROWS["rope"][-1], Workload()) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm", "rope", "swiglu"])
def test_compiled_kernels_pass_on_the_cpu(operation):
    provider = next(provider for provider in ROWS[operation] if provider.name == "compiled")
    if reason := provider.missing(Workload()):
        pytest.skip(reason)
    assert failure(operation, provider, ROWS[operation][-1], Workload()) is None
