"""Our Triton kernels against their plain-torch twins, on the CPU in Triton's interpreter:

    TRITON_INTERPRET=1 python -m tests.parallel.kernels.triton_checks

A program of its own, because triton decides when it is imported whether to interpret; `test_triton_kernels.py` runs it. Prints
one JSON object: the name of each check, and what went wrong in it (empty where nothing did).
"""

from __future__ import annotations

import json
import traceback

import torch

from parallel.groups import Axis
from parallel.kernels import (
    cross_entropy_kernels,
    reference_kernels,
    triton_cross_entropy,
    triton_norm,
    triton_rope,
)
from parallel.tensor.cross_entropy import triton_cross_entropy as whole_cross_entropy
from tests.parallel.building import randn

S, B = 5, 3
# by norm, against the twin in fp32 from the same inputs; bf16 results are rounded up to three times to 8 bits
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def assert_close(ours, right, dtype):
    for place, (a, b) in enumerate(zip(ours, right, strict=True)):
        assert a.shape == b.shape, f"result {place} is {tuple(a.shape)}, not {tuple(b.shape)}"
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()
        assert error < TOLERANCES[dtype], f"result {place} is off by {error:.1e}"


def differentiate(kernel, inputs, settings, dtype):
    """Results and gradients, for output gradients that are the same whatever the dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = kernel(*leaves, *settings)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    assert all(y.dtype == leaves[0].dtype for y in outputs)
    gradients = [randn(*y.shape, seed=50 + i).to(dtype).to(y.dtype) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, gradients))


def compare(kernel, twin, inputs, settings, dtype):
    inputs = [x.to(dtype) for x in inputs]
    ours = differentiate(kernel, inputs, settings, dtype)
    assert all(x.dtype == dtype for x in ours)
    assert_close(ours, differentiate(twin, [x.float() for x in inputs], settings, dtype), dtype)


def check_logits(dtype, columns):
    """Rows of a wider matrix; targets on both sides of these columns; one row of equal logits, one of extreme ones."""
    logits = (randn(S * B, columns + 3) * 3).to(dtype)
    logits[0], logits[1, : columns // 2] = 0.0, 1e4
    targets = torch.arange(S * B) * 7 % (2 * columns) - columns // 2
    scale = torch.rand(S * B)
    results = []
    for kernels, wide in ((triton_cross_entropy.FUSED, dtype), (reference_kernels.head_loss, torch.float32)):
        mine = logits.clone().to(wide)
        found = kernels.statistics(mine[:, :columns], targets)
        kernels.gradient_(mine[:, :columns], targets, found[1].log() + found[0], scale)
        assert torch.equal(mine[:, columns:], logits[:, columns:].to(wide)), "columns beyond were touched"
        results.append([*found, mine[:, :columns]])
    assert_close(*results, dtype)


def check_logits_of_several_blocks():
    triton_cross_entropy.MAX_BLOCK, before = 16, triton_cross_entropy.MAX_BLOCK
    check_logits(torch.float32, 50)
    triton_cross_entropy.MAX_BLOCK = before


def check_a_rank_without_columns():
    logits, targets = torch.zeros(4, 8), torch.tensor([0, 1, 2, 3])
    found = triton_cross_entropy.FUSED.statistics(logits[:, :0], targets)
    assert torch.equal(found, cross_entropy_kernels.BLOCKED.statistics(logits[:, :0], targets))
    triton_cross_entropy.FUSED.gradient_(logits[:, :0], targets, torch.zeros(4), torch.ones(4))


def check_whole_cross_entropy():
    targets = torch.randint(0, 21, (S, B), generator=torch.Generator().manual_seed(3))
    logits = randn(S, B, 24).requires_grad_()
    losses = whole_cross_entropy(logits.clone(), targets, 21, Axis.single("tp"))
    right = reference_kernels.cross_entropy(logits, targets, 21, Axis.single("tp"))
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (losses, right)]
    assert_close([losses.detach(), gradients[0]], [right.detach(), gradients[1]], torch.float32)


def check_rms_norm(dtype, hidden):
    compare(triton_norm.rms_norm, reference_kernels.rms_norm, [randn(S, B, hidden) * 3, randn(hidden, seed=1)], [1e-2], dtype)


def check_add_rms_norm(dtype, hidden):
    inputs = [randn(S, B, hidden) * 3, randn(S, B, hidden, seed=2), randn(hidden, seed=1)]
    compare(triton_norm.add_rms_norm, reference_kernels.add_rms_norm, inputs, [1e-2], dtype)


def check_norm_with_fewer_programs_than_tokens():
    """Each program adds up several rows' part of the weight's gradient."""
    triton_norm.MAX_PROGRAMS, before = 4, triton_norm.MAX_PROGRAMS
    check_rms_norm(torch.float32, 24)
    triton_norm.MAX_PROGRAMS = before


def check_qkv_rope(dtype, heads, kv_heads, d, tables):
    angles = torch.rand(S, tables, d // 2, generator=torch.Generator().manual_seed(3)) * 6.0
    settings = [angles.cos(), angles.sin(), heads, kv_heads]
    compare(triton_rope.qkv_rope, reference_kernels.qkv_rope, [randn(S, B, (heads + 2 * kv_heads) * d)], settings, dtype)


def check_rope_of_many_heads():
    triton_rope.MAX_HEADS, before = 4, triton_rope.MAX_HEADS
    check_qkv_rope(torch.float32, 6, 2, 8, 1)
    triton_rope.MAX_HEADS = before


def check_rope_lays_out_for_attention_and_takes_any_gradient():
    """A head's tokens follow one another; gradients come in other layouts, some with a strided last dim."""
    qkv, angles = randn(S, B, 4 * 8).requires_grad_(), torch.rand(S, 1, 4)
    results = []
    for kernel in (triton_rope.qkv_rope, reference_kernels.qkv_rope):
        outputs = kernel(qkv, angles.cos(), angles.sin(), 2, 1)
        strides = [y.permute(1, 2, 0, 3).stride()[2:] for y in outputs]
        gradients = [randn(B, heads, 8, S, seed=i).permute(3, 0, 1, 2) for i, heads in enumerate((2, 1))]
        gradients.append(randn(B, 1, S, 8, seed=9).permute(2, 0, 1, 3))
        results.append((strides, torch.autograd.grad(outputs, qkv, gradients)))
    assert results[0][0] == [(8, 1)] * 3
    assert_close(results[0][1], results[1][1], torch.float32)


CHECKS = {
    **{f"logits {name}": (check_logits, dtype, 37) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))},
    "logits of several blocks": (check_logits_of_several_blocks,),
    "a rank without columns": (check_a_rank_without_columns,),
    "whole cross entropy": (check_whole_cross_entropy,),
    "rms_norm fp32": (check_rms_norm, torch.float32, 24),
    "rms_norm bf16": (check_rms_norm, torch.bfloat16, 32),
    "rms_norm with fewer programs than tokens": (check_norm_with_fewer_programs_than_tokens,),
    "add_rms_norm fp32": (check_add_rms_norm, torch.float32, 24),
    "add_rms_norm bf16": (check_add_rms_norm, torch.bfloat16, 32),
    "qkv_rope fp32": (check_qkv_rope, torch.float32, 4, 2, 8, 1),
    "qkv_rope bf16, tables of each sample": (check_qkv_rope, torch.bfloat16, 3, 1, 12, B),
    "rope of many heads": (check_rope_of_many_heads,),
    "rope lays out for attention": (check_rope_lays_out_for_attention_and_takes_any_gradient,),
}


def run(check, *arguments) -> str:
    """What went wrong in a check."""
    try:
        check(*arguments)
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    print(json.dumps({name: run(*check) for name, check in CHECKS.items()}))
