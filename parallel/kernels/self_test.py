"""The numeric self-test: a provider against the reference on the device that it is about to run on, forward and backward.

Legend: s sequence, b micro-batch, h hidden, n heads, k kv heads, d head dim, f ffn, v vocabulary, o outputs, i inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.groups import Axis
from parallel.kernels.cross_entropy_kernels import CrossEntropyKernels
from parallel.kernels.documents import Documents
from parallel.kernels.providers import Kernel, Provider, Workload

S, B, N, K, D = 32, 2, 4, 2, 64
EPS = 1e-5
# ||ours - reference|| / ||reference||, by the result's dtype: fp32 sums in another order; roundings to 8 or 11 bits
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Numbers:
    """Random tensors: the same of each place in a sequence of calls, rounded to `dtype`, given in `wide` on the device."""

    def __init__(self, workload: Workload, wide: torch.dtype) -> None:
        self.device, self.dtype, self.wide = workload.device, workload.dtype, wide
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator).to(dtype or self.dtype)
        return values.to(self.device, dtype or self.wide)


def differentiate(kernel: Kernel, numbers: Numbers, inputs: list[Tensor], *settings: Any) -> list[Tensor]:
    """What the kernel gives, and the gradients of `inputs` for random output gradients."""
    leaves = [x.requires_grad_() for x in inputs]
    outputs = kernel(*leaves, *settings)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    gradients = [numbers(*y.shape).to(y.dtype) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, gradients))


def _rms_norm(kernel: Kernel, numbers: Numbers) -> list[Tensor]:
    return differentiate(kernel, numbers, [numbers(S, B, 256), numbers(256)], EPS)


def _add_rms_norm(kernel: Kernel, numbers: Numbers) -> list[Tensor]:
    return differentiate(kernel, numbers, [numbers(S, B, 256), numbers(S, B, 256), numbers(256)], EPS)


def _rope(kernel: Kernel, numbers: Numbers) -> list[Tensor]:
    """One table for all samples, then one for each; x is a slice of a projection, as in the model."""
    results = []
    for b in (1, B):
        angles = numbers(S, b, D // 2, dtype=torch.float32)
        x = numbers(S, B, N + 2 * K, D)[:, :, :N].detach()
        results += differentiate(kernel, numbers, [x], angles.cos(), angles.sin())
    return results


def _qkv_rope(kernel: Kernel, numbers: Numbers) -> list[Tensor]:
    results = []
    for b in (1, B):
        angles = numbers(S, b, D // 2, dtype=torch.float32)
        results += differentiate(kernel, numbers, [numbers(S, B, (N + 2 * K) * D)], angles.cos(), angles.sin(), N, K)
    return results


def _swiglu(kernel: Kernel, numbers: Numbers) -> list[Tensor]:
    return differentiate(kernel, numbers, [numbers(S, B, 512)])


def _attention(kernel: Kernel, numbers: Numbers) -> list[Tensor]:
    """Without documents, then with some: they end at each sample's end, and the last end is repeated as padding."""
    ends = torch.tensor([0, 12, S, S + 25, 2 * S, 2 * S], dtype=torch.int32, device=numbers.device)
    results = []
    for documents in (None, Documents(ends, 25)):
        inputs = [numbers(S, B, heads, D) for heads in (N, K, K)]
        results += differentiate(kernel, numbers, inputs, documents)
    return results


def _wgrad(kernel: Kernel, numbers: Numbers) -> list[Tensor]:
    main_grad, x, dy = numbers(96, 128, dtype=torch.float32), numbers(S * B, 128), numbers(S * B, 96)
    kernel(main_grad, x, dy)
    return [main_grad]


def _cross_entropy(kernel: Kernel, numbers: Numbers) -> list[Tensor]:
    """Targets with the first and the last id among them; the last 12 logits are padding."""
    targets = torch.arange(S * B, device=numbers.device).view(S, B) * 7 % 500
    targets[0, 0], targets[-1, -1] = 0, 499
    return differentiate(kernel, numbers, [numbers(S, B, 512)], targets, 500, Axis.single("tp"))


def _head_loss(kernels: CrossEntropyKernels, numbers: Numbers) -> list[Tensor]:
    """Targets on both sides of these columns, which are a part of wider rows."""
    logits = numbers(S * B, 512)[:, :500]
    targets = torch.arange(S * B, device=numbers.device) * 7 % 700 - 100
    statistics = kernels.statistics(logits, targets)
    log_sum, scale = statistics[1].log() + statistics[0], numbers(S * B, dtype=torch.float32)
    kernels.gradient_(logits, targets, log_sum, scale)
    return [*statistics, logits]


def _adamw(kernel: Kernel, numbers: Numbers) -> list[Tensor]:
    """Two updates of two shards, the second of them masked; an empty shard takes part. All fp32."""
    masters, grads, means, squares = ([numbers(size, dtype=torch.float32) for size in (3000, 0, 70)] for _ in range(4))
    squares = [x.square() for x in squares]
    scalar = partial(torch.tensor, dtype=torch.float32, device=numbers.device)
    settings = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    for step, found_inf in ((3.0, 0.0), (4.0, 1.0)):
        gradients = [x.clone() for x in grads]
        device_scalars = {"grad_scale": scalar(8.0), "found_inf": scalar(found_inf)}
        kernel(masters, gradients, means, squares, scalar(step), **settings, **device_scalars)
    return [torch.cat(tensors) for tensors in (masters, means, squares)]


def _l2_norm(kernel: Kernel, numbers: Numbers) -> list[Tensor]:
    return [kernel([numbers(size, dtype=torch.float32) for size in (70_000, 3)])]


# operation -> a run of its kernel on an example: what is compared
EXAMPLES: Mapping[str, Callable[[Kernel, Numbers], list[Tensor]]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "qkv_rope": _qkv_rope,
    "swiglu": _swiglu,
    "attention": _attention,
    "wgrad": _wgrad,
    "cross_entropy": _cross_entropy,
    "head_loss": _head_loss,
    "adamw": _adamw,
    "l2_norm": _l2_norm,
}


def failure(operation: str, provider: Provider, reference: Provider, workload: Workload) -> str | None:
    """Run the provider's kernel on an example. Returns what is wrong with it, or None where it agrees with the reference.

    The reference computes in fp32 from the same inputs.
    """
    try:
        kernel = provider.load()
        ours = EXAMPLES[operation](kernel, Numbers(workload, workload.dtype))
        if workload.device.type == "cuda":
            torch.cuda.synchronize(workload.device)
    except Exception as error:  # a broken installation may raise anything
        return f"{provider.name} fails its self-test: {type(error).__name__}: {error}"
    right = EXAMPLES[operation](reference.load(), Numbers(workload, torch.float32))
    for place, (a, b) in enumerate(zip(ours, right, strict=True), start=1):
        error = float((a.float() - b.float()).norm() / b.float().norm())
        tolerance = TOLERANCES[a.dtype]
        if not error <= tolerance:
            return (
                f"{provider.name} fails its self-test: result {place} of {len(ours)} differs from the reference by "
                f"{error:.1e} (relative, by norm), more than {tolerance:.0e}"
            )
    return None
