"""Each plain-torch kernel against an independent formula or torch's own, and every other backend against its torch twin."""

import pytest
import torch
import torch.nn.functional as F

from parallel.kernels import torch_kernels
from parallel.kernels.documents import Documents
from parallel.kernels.table import ROWS
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
        lambda x, w: torch_kernels.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (16,), w, 1e-5), (x, weight)
    )


def test_rms_norm_counts_eps_inside_the_root():
    y = torch_kernels.rms_norm(torch.full((1, 1, 4), 3.0), torch.tensor([1.0, 1.0, 2.0, 2.0]), eps=16.0)
    assert y.flatten().tolist() == pytest.approx([0.6, 0.6, 1.2, 1.2])  # 3 / sqrt(9 + 16)


def test_rms_norm_of_bf16_has_fp32_statistics():
    """1 + 2^-8 squared and summed in bf16 would lose the small part; and 300 squared a thousand times would in fp16."""
    x, weight = randn(1, 1, 4096).bfloat16(), torch.ones(4096, dtype=torch.bfloat16)
    y = torch_kernels.rms_norm(x, weight, 1e-5)
    right = F.rms_norm(x.double(), (4096,), None, 1e-5)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), right, rtol=2.0**-8, atol=0)  # one rounding to 8 bits
    large = torch_kernels.rms_norm(torch.full((1, 1, 1000), 300.0, dtype=torch.float16), torch.ones(1000).half(), 1e-5)
    assert (large == 1).all()


def test_rope_is_hugging_faces_rotation():
    x, (cos, sin) = randn(S, B, N, D), tables(S, D)
    wide_cos, wide_sin = torch.cat([cos, cos], -1)[:, None], torch.cat([sin, sin], -1)[:, None]
    assert_gradients_close(lambda x: torch_kernels.rope(x, cos, sin), lambda x: x * wide_cos + rotate_half(x) * wide_sin, (x,))


def test_rope_leaves_position_zero_and_lengths_alone():
    x, (cos, sin) = randn(S, B, N, D), tables(S, D)
    y = torch_kernels.rope(x, cos, sin)
    assert torch.equal(y[0], x[0]) and not torch.equal(y[1], x[1])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_rope_makes_scores_depend_on_the_distance_alone():
    cos, sin = tables(20, D)
    q, k = (randn(1, 1, 1, D, seed=seed).expand(20, 1, 1, D) for seed in (1, 2))
    q, k = torch_kernels.rope(q, cos, sin).flatten(1), torch_kernels.rope(k, cos, sin).flatten(1)
    scores = q @ k.t()
    for distance in (0, 3, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


def test_rope_of_bf16_rotates_in_fp32():
    x, (cos, sin) = randn(S, B, N, D).bfloat16(), tables(S, D)
    y = torch_kernels.rope(x, cos, sin)
    assert y.dtype == torch.bfloat16 and torch.equal(y, torch_kernels.rope(x.float(), cos, sin).bfloat16())


def test_swiglu_is_silu_of_the_first_half_times_the_second():
    gate_up = randn(S, B, 20)
    assert_gradients_close(
        torch_kernels.swiglu,
        lambda x: x[..., :10] / (1 + torch.exp(-x[..., :10])) * x[..., 10:],
        (gate_up,),
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kernel", [torch_kernels.attention, torch_kernels.sdpa_attention], ids=lambda k: k.__name__)
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
@pytest.mark.parametrize("kernel", [torch_kernels.attention, torch_kernels.sdpa_attention], ids=lambda k: k.__name__)
def test_attention_inside_documents_is_that_of_each_alone(kernel, kv_heads):
    def each_alone(q, k, v):
        y = torch.zeros_like(q)
        for sample, start, end in [(0, 0, 2), (0, 2, 3), (0, 3, 6), (1, 0, 5), (1, 5, 6)]:
            part = slice(start, end), slice(sample, sample + 1)
            y[part] = torch_kernels.attention(q[part], k[part], v[part])
        return y

    inputs = randn(S, B, N, D), randn(S, B, kv_heads, D, seed=1), randn(S, B, kv_heads, D, seed=2)
    assert_gradients_close(lambda *x: kernel(*x, DOCUMENTS), each_alone, inputs)


def test_one_document_a_sample_is_no_document_at_all():
    q, k, v = (randn(S, B, N, D, seed=seed) for seed in range(3))
    whole = Documents(torch.tensor([0, S, 2 * S], dtype=torch.int32), S)
    for kernel in (torch_kernels.attention, torch_kernels.sdpa_attention):
        torch.testing.assert_close(kernel(q, k, v, whole), kernel(q, k, v))


def test_rope_takes_positions_of_each_sample():
    x = randn(S, B, N, D)
    cos, sin = tables(S, D)
    both = [torch.cat([table, table.flip(0)], dim=1) for table in (cos, sin)]  # [s, 2, d/2]
    y = torch_kernels.rope(x, *both)
    torch.testing.assert_close(y[:, :1], torch_kernels.rope(x[:, :1], cos, sin))
    torch.testing.assert_close(y[:, 1:], torch_kernels.rope(x[:, 1:], cos.flip(0), sin.flip(0)))


def test_attention_is_torchs_scaled_dot_product():
    q, k, v = (randn(S, B, N, D, seed=seed) for seed in range(3))
    right = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(torch_kernels.attention(q, k, v), right.permute(2, 0, 1, 3))


def test_gradients_agree_with_finite_differences():
    """In fp64 but for the fp32 inside norm and rope, which finite differences cannot see through."""
    f64 = dict(dtype=torch.float64)
    assert torch.autograd.gradcheck(torch_kernels.swiglu, randn(2, 1, 6, **f64).requires_grad_())
    qkv = [randn(3, 1, heads, 2, seed=heads, **f64).requires_grad_() for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(torch_kernels.sdpa_attention, qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wgrad_adds_the_product_in_fp32(dtype):
    """bf16 inputs are exact in fp32, so the sum is that of the rounded inputs: no second rounding."""
    x, dy = randn(40, 5).to(dtype), randn(40, 3, seed=1).to(dtype)
    start = randn(3, 5, seed=2)
    main_grad = start.clone()
    torch_kernels.wgrad(main_grad, x, dy)
    right = start.double() + dy.double().t() @ x.double()
    assert main_grad.dtype == torch.float32
    torch.testing.assert_close(main_grad.double(), right, rtol=1e-6, atol=1e-5)


OTHERS = [(operation, backend) for operation, row in ROWS.items() for backend in row if backend.name != "torch"]


def example_inputs(operation, device, dtype):
    """Differentiable inputs, and the others."""
    heads = [randn(128, B, n, 64, seed=n).to(device, dtype) for n in (8, 2, 2)]
    cos, sin = (table.to(device) for table in tables(128, 64))
    return {
        "rms_norm": ((randn(128, B, 256).to(device, dtype), randn(256, seed=1).to(device, dtype)), (1e-5,)),
        "rope": ((heads[0],), (cos, sin)),
        "swiglu": ((randn(128, B, 512).to(device, dtype),), ()),
        "attention": (tuple(heads), (Documents(torch.tensor([0, 50, 128, 200, 256], dtype=torch.int32, device=device), 78),)),
    }[operation]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("operation", "backend"), OTHERS, ids=lambda value: value if isinstance(value, str) else value.name)
def test_every_backend_agrees_with_its_torch_twin_in_bf16_on_the_gpu(operation, backend):
    device = torch.device("cuda")
    reason = backend.missing(device)
    if reason is not None:
        pytest.skip(reason)
    twin = getattr(torch_kernels, operation)
    if operation == "wgrad":
        x, dy = randn(512, 128).to(device, torch.bfloat16), randn(512, 64, seed=1).to(device, torch.bfloat16)
        ours, right = torch.zeros(64, 128, device=device), torch.zeros(64, 128, device=device)
        backend.function(ours, x, dy)
        twin(right, x, dy)
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-3)  # sums of 512 products in another order
        return
    inputs, settings = example_inputs(operation, device, torch.bfloat16)
    assert_gradients_close(
        lambda *x: backend.function(*x, *settings),
        lambda *x: twin(*x, *settings),
        inputs,
        rtol=2e-2,  # bf16 has 8 bits; a kernel may round once more or less
        atol=2e-2,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_wgrad_of_bf16_keeps_fp32_sums_on_the_gpu():
    x, dy = randn(4096, 64).cuda().bfloat16(), randn(4096, 32, seed=1).cuda().bfloat16()
    main_grad = torch.zeros(32, 64, device="cuda")
    torch_kernels.wgrad(main_grad, x, dy)
    right = dy.double().t() @ x.double()
    torch.testing.assert_close(main_grad.double(), right, rtol=1e-5, atol=1e-3)
