"""The torch kernels against their references: values, gradients, and what they keep for the backward pass."""

import pytest
import torch

from parallel.kernels import reference_kernels, torch_kernels
from tests.parallel.building import randn

S, B = 6, 2


def example(operation, dtype):
    """Differentiable inputs, and the others."""
    angles = torch.rand(S, 1, 4, generator=torch.Generator().manual_seed(3)) * 6.0
    inputs = {
        "rms_norm": ((randn(S, B, 16) * 3, randn(16, seed=1)), (1e-2,)),
        "add_rms_norm": ((randn(S, B, 16) * 3, randn(S, B, 16, seed=2), randn(16, seed=1)), (1e-2,)),
        "rope": ((randn(S, B, 3, 8),), (angles.cos(), angles.sin())),
        "swiglu": ((randn(S, B, 24),), ()),
    }[operation]
    return [x.to(dtype) for x in inputs[0]], inputs[1]


def run(kernel, inputs, settings):
    """[outputs, gradient of each input], and the bytes that autograd keeps, each storage once, without inputs and outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}), x)[1], lambda x: x
    ):
        outputs = kernel(*leaves, *settings)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    for x in (*leaves, *outputs, *(x for x in settings if isinstance(x, torch.Tensor))):
        kept.pop(x.untyped_storage().data_ptr(), None)
    torch.autograd.backward(outputs, [randn(*y.shape, seed=77 + place).to(y) for place, y in enumerate(outputs)])
    return [*(y.detach() for y in outputs), *(leaf.grad for leaf in leaves)], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm", "rope", "swiglu"])
def test_values_and_gradients_are_those_of_the_twin(operation, dtype):
    inputs, settings = example(operation, dtype)
    ours, _ = run(getattr(torch_kernels, operation), inputs, settings)
    # the twin in fp32 and rounded once: in bf16 it rounds between operations
    right, _ = run(getattr(reference_kernels, operation), [x.float() for x in inputs], settings)
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}  # bf16 has 8 bits
    for a, b in zip(ours, right, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, **tolerance)


OF_ROWS = [("rms_norm", 4 * S * B), ("add_rms_norm", 4 * S * B), ("rope", 0), ("swiglu", 0)]


@pytest.mark.parametrize(("operation", "kept_bytes"), OF_ROWS)
def test_nothing_of_the_activations_size_is_kept(operation, kept_bytes):
    inputs, settings = example(operation, torch.float32)
    _, ours = run(getattr(torch_kernels, operation), inputs, settings)
    _, twins = run(getattr(reference_kernels, operation), inputs, settings)
    assert ours == kept_bytes
    assert operation == "rope" or twins > kept_bytes + 4 * S * B  # the measure sees what the twin keeps


def test_strided_inputs_and_gradients():
    """Heads are slices of a fused projection, and attention hands back permuted gradients."""
    _, settings = example("rope", torch.float32)
    fused = randn(S, B, 9, 8)
    dy = randn(B, S, 3, 8, seed=5).transpose(0, 1)
    gradients = []
    for kernels in (torch_kernels, reference_kernels):
        x = fused.clone().requires_grad_()
        kernels.rope(x[:, :, 3:6], *settings).backward(dy)
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
