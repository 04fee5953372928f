"""Each plain-torch kernel against an independent formula or torch's own."""

import pytest
import torch
import torch.nn.functional as F

from parallel.groups import Axis
from parallel.kernels import reference_kernels, torch_attention, torch_kernels
from parallel.kernels.documents import Documents
from tests.parallel.building import randn

S, B, N, D = 6, 2, 4, 8


def tables(length, width, dtype=torch.float32):
    """cos and sin [s, 1, d/2] of LLaMA's angles."""
    angles = torch.arange(length, dtype=dtype)[:, None, None] * 1e4 ** (-torch.arange(0, width, 2, dtype=dtype) / width)
    return angles.cos(), angles.sin()


def rotate_half(x):
    """As Hugging Face's LLaMA has it."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([-second, first], dim=-1)


def assert_gradients_close(ours, right, inputs, **tolerance):
    """The gradients of two functions with respect to their inputs, for one random output gradient."""
    results = []
    for function in (ours, right):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        y.backward(randn(*y.shape, seed=77).to(y))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_rms_norm_is_torchs():
    x, weight = randn(S, B, 16) * 3, randn(16, seed=1)
    assert_gradients_close(
        lambda x, w: reference_kernels.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (16,), w, 1e-5), (x, weight)
    )


def test_rms_norm_counts_eps_inside_the_root():
    y = reference_kernels.rms_norm(torch.full((1, 1, 4), 3.0), torch.tensor([1.0, 1.0, 2.0, 2.0]), eps=16.0)
    assert y.flatten().tolist() == pytest.approx([0.6, 0.6, 1.2, 1.2])  # 3 / sqrt(9 + 16)


def test_rms_norm_of_bf16_has_fp32_statistics():
    """1 + 2^-8 squared and summed in bf16 would lose the small part; and 300 squared a thousand times would in fp16."""
    x, weight = randn(1, 1, 4096).bfloat16(), torch.ones(4096, dtype=torch.bfloat16)
    y = reference_kernels.rms_norm(x, weight, 1e-5)
    right = F.rms_norm(x.double(), (4096,), None, 1e-5)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), right, rtol=2.0**-8, atol=0)  # one rounding to 8 bits
    large = reference_kernels.rms_norm(torch.full((1, 1, 1000), 300.0, dtype=torch.float16), torch.ones(1000).half(), 1e-5)
    assert (large == 1).all()


def test_rope_is_hugging_faces_rotation():
    x, (cos, sin) = randn(S, B, N, D), tables(S, D)
    wide_cos, wide_sin = torch.cat([cos, cos], -1)[:, None], torch.cat([sin, sin], -1)[:, None]
    assert_gradients_close(
        lambda x: reference_kernels.rope(x, cos, sin), lambda x: x * wide_cos + rotate_half(x) * wide_sin, (x,)
    )


def test_rope_leaves_position_zero_and_lengths_alone():
    x, (cos, sin) = randn(S, B, N, D), tables(S, D)
    y = reference_kernels.rope(x, cos, sin)
    assert torch.equal(y[0], x[0]) and not torch.equal(y[1], x[1])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_rope_makes_scores_depend_on_the_distance_alone():
    cos, sin = tables(20, D)
    q, k = (randn(1, 1, 1, D, seed=seed).expand(20, 1, 1, D) for seed in (1, 2))
    q, k = reference_kernels.rope(q, cos, sin).flatten(1), reference_kernels.rope(k, cos, sin).flatten(1)
    scores = q @ k.t()
    for distance in (0, 3, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


def test_rope_of_bf16_rotates_in_fp32():
    x, (cos, sin) = randn(S, B, N, D).bfloat16(), tables(S, D)
    y = reference_kernels.rope(x, cos, sin)
    assert y.dtype == torch.bfloat16 and torch.equal(y, reference_kernels.rope(x.float(), cos, sin).bfloat16())


def test_swiglu_is_silu_of_the_first_half_times_the_second():
    gate_up = randn(S, B, 20)
    assert_gradients_close(
        reference_kernels.swiglu,
        lambda x: x[..., :10] / (1 + torch.exp(-x[..., :10])) * x[..., 10:],
        (gate_up,),
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kernel", [reference_kernels.attention, torch_attention.sdpa], ids=lambda k: k.__name__)
def test_attention_is_a_loop_over_heads_and_positions(kernel, kv_heads):
    """Each query sees keys up to its own position; query head i uses kv head i // (n/k)."""

    def loop(q, k, v):
        y = torch.zeros_like(q)
        for b in range(B):
            for head in range(N):
                kv_head = head // (N // kv_heads)
                for s in range(S):
                    scores = k[: s + 1, b, kv_head] @ q[s, b, head] / D**0.5
                    y[s, b, head] = scores.exp() / scores.exp().sum() @ v[: s + 1, b, kv_head]
        return y

    inputs = randn(S, B, N, D), randn(S, B, kv_heads, D, seed=1), randn(S, B, kv_heads, D, seed=2)
    assert_gradients_close(kernel, loop, inputs, rtol=1e-4, atol=1e-5)


DOCUMENTS = Documents(torch.tensor([0, 2, 3, 6, 11, 12, 12, 12], dtype=torch.int32), 5)  # 2, 1, 3 tokens; 5, 1; padding


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("kernel", [reference_kernels.attention, torch_attention.sdpa], ids=lambda k: k.__name__)
def test_attention_inside_documents_is_that_of_each_alone(kernel, kv_heads):
    def each_alone(q, k, v):
        y = torch.zeros_like(q)
        for sample, start, end in [(0, 0, 2), (0, 2, 3), (0, 3, 6), (1, 0, 5), (1, 5, 6)]:
            part = slice(start, end), slice(sample, sample + 1)
            y[part] = reference_kernels.attention(q[part], k[part], v[part])
        return y

    inputs = randn(S, B, N, D), randn(S, B, kv_heads, D, seed=1), randn(S, B, kv_heads, D, seed=2)
    assert_gradients_close(lambda *x: kernel(*x, DOCUMENTS), each_alone, inputs)


def test_one_document_a_sample_is_no_document_at_all():
    q, k, v = (randn(S, B, N, D, seed=seed) for seed in range(3))
    whole = Documents(torch.tensor([0, S, 2 * S], dtype=torch.int32), S)
    for kernel in (reference_kernels.attention, torch_attention.sdpa):
        torch.testing.assert_close(kernel(q, k, v, whole), kernel(q, k, v))


def test_rope_takes_positions_of_each_sample():
    x = randn(S, B, N, D)
    cos, sin = tables(S, D)
    both = [torch.cat([table, table.flip(0)], dim=1) for table in (cos, sin)]  # [s, 2, d/2]
    y = reference_kernels.rope(x, *both)
    torch.testing.assert_close(y[:, :1], reference_kernels.rope(x[:, :1], cos, sin))
    torch.testing.assert_close(y[:, 1:], reference_kernels.rope(x[:, 1:], cos.flip(0), sin.flip(0)))


def test_attention_is_torchs_scaled_dot_product():
    q, k, v = (randn(S, B, N, D, seed=seed) for seed in range(3))
    right = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(reference_kernels.attention(q, k, v), right.permute(2, 0, 1, 3))


def test_gradients_agree_with_finite_differences():
    """In fp64 but for the fp32 inside norm and rope, which finite differences cannot see through."""
    f64 = dict(dtype=torch.float64)
    assert torch.autograd.gradcheck(reference_kernels.swiglu, randn(2, 1, 6, **f64).requires_grad_())
    qkv = [randn(3, 1, heads, 2, seed=heads, **f64).requires_grad_() for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(torch_attention.sdpa, qkv)


@pytest.mark.parametrize("kernels", [reference_kernels, torch_kernels], ids=["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wgrad_adds_the_product_in_fp32(dtype, kernels):
    """bf16 inputs are exact in fp32, so the sum is that of the rounded inputs: no second rounding."""
    x, dy = randn(40, 5).to(dtype), randn(40, 3, seed=1).to(dtype)
    start = randn(3, 5, seed=2)
    main_grad = start.clone()
    kernels.wgrad(main_grad, x, dy)
    right = start.double() + dy.double().t() @ x.double()
    assert main_grad.dtype == torch.float32
    torch.testing.assert_close(main_grad.double(), right, rtol=1e-6, atol=1e-5)


def test_add_rms_norm_is_the_sum_and_its_norm():
    residual, delta, weight = randn(S, B, 16), randn(S, B, 16, seed=1), randn(16, seed=2)
    total, y = reference_kernels.add_rms_norm(residual, delta, weight, 1e-5)
    assert torch.equal(total, residual + delta)
    torch.testing.assert_close(y, F.rms_norm(residual + delta, (16,), weight, 1e-5))


def test_cross_entropy_ignores_the_padding_of_the_vocabulary():
    """Large logits beyond the vocabulary change nothing, and get a zero gradient."""
    logits = torch.cat([randn(S, B, 11), torch.full((S, B, 5), 50.0)], dim=-1).requires_grad_()
    targets = torch.arange(S * B).view(S, B) % 11
    losses = reference_kernels.cross_entropy(logits, targets, 11, Axis.single("tp"))
    right = -logits[..., :11].detach().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(losses.detach(), right)
    losses.sum().backward()
    assert logits.grad[..., 11:].abs().max() == 0
