"""Plain-torch kernels: the references of every operation in the table, which all providers are tested against.

Legend: s sequence, b micro-batch, h hidden, n heads, k kv heads, d head dim, f ffn, v vocabulary, o outputs, i inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.groups import Axis
from parallel.kernels.cross_entropy_kernels import CrossEntropyKernels, locate, no_columns
from parallel.kernels.documents import Documents


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [s, b, h], [h] -> [s, b, h]
    """x / sqrt(mean(x^2) + eps) * weight. Source: Zhang and Sennrich 2019, equation 4."""
    wide = x.float()  # fp32: statistics
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def add_rms_norm(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # [s, b, h] twice, [h] -> [s, b, h] twice
    """residual + delta, and its `rms_norm`."""
    total = residual + delta
    return total, rms_norm(total, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [s, b, n, d], [s, b or 1, d/2] fp32 -> [s, b, n, d]
    """Rotate each pair (x[j], x[j + d/2]) by its angle (half-split order). Source: Su et al. 2021, equation 34."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x.float().chunk(2, dim=-1)  # fp32: tables and rotation
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def qkv_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, rotate: Callable[..., Tensor] = rope
) -> tuple[Tensor, Tensor, Tensor]:  # [s, b, (n + 2k) d], [s, b or 1, d/2] fp32 twice -> [s, b, n, d], [s, b, k, d] twice
    """q, k and v of a fused projection, q and k rotated by `rotate`; a fused provider has a rotation of its own."""
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def swiglu(gate_up: Tensor) -> Tensor:  # [s, b, 2f] -> [s, b, f]
    """silu(gate) * up, gate being the first half. Source: Shazeer 2020, equation 6."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """Causal softmax attention, each kv head shared by n/k query heads; with `documents`, inside each of them."""
    s, b, n, d = q.shape
    groups = n // k.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(d)  # fp32: softmax
    visible = causal_mask(s, b, documents, q.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(q.dtype)
    return (weights @ v).permute(2, 0, 1, 3)


def causal_mask(s: int, b: int, documents: Documents | None, device: torch.device) -> Tensor:  # [s, s] or [b, 1, s, s]
    """True where a query (second to last dim) may look at a key (last dim): not ahead, and in its document."""
    past = torch.ones(s, s, dtype=torch.bool, device=device).tril()
    if documents is None:
        return past
    ids = documents.ids(s, b)
    return past & (ids[:, None, :, None] == ids[:, None, None, :])


def cross_entropy(logits: Tensor, targets: Tensor, vocabulary: int, tp: Axis) -> Tensor:  # [s, b, v], [s, b] -> [s, b] fp32
    """Loss of each token over the first `vocabulary` logits (those beyond are padding). For a `tp` of size 1."""
    assert tp.size == 1
    values = logits[..., :vocabulary].float()  # fp32: the loss and its softmax
    return F.cross_entropy(values.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def _logit_statistics(logits: Tensor, targets: Tensor) -> Tensor:  # [t, c], [t] -> [3, t]
    if logits.shape[1] == 0:
        return no_columns(targets)
    values = logits.float()  # fp32: the loss and its softmax
    here, column = locate(targets, logits.shape[1])
    top, target = values.amax(-1), values.gather(1, column).masked_fill(~here, 0.0)
    return torch.stack([top, (values - top[:, None]).exp().sum(-1), target[:, 0]])


def _logit_gradient_(logits: Tensor, targets: Tensor, log_sum: Tensor, scale: Tensor) -> None:
    if logits.shape[1]:
        here, column = locate(targets, logits.shape[1])
        softmax = (logits.float() - log_sum[:, None]).exp().scatter_add(1, column, -here.float())
        logits.copy_(softmax * scale[:, None])


# The two passes over logits that are made in chunks, with the head.
head_loss = CrossEntropyKernels(_logit_statistics, _logit_gradient_)


def fprop(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:  # [..., i], [o, i] -> [..., o]
    """A linear's output: y = x W^T, written to `out` where that is given."""
    return torch.matmul(x, weight.t(), out=out)


def dgrad(dy: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:  # [..., o], [o, i] -> [..., i]
    """A linear's input gradient: dx = dy W, written to `out` where that is given."""
    return torch.matmul(dy, weight, out=out)


def wgrad(main_grad: Tensor, x: Tensor, dy: Tensor) -> None:  # [o, i] fp32, [t, i], [t, o]
    """main_grad += dy^T x, the product kept in fp32."""
    main_grad.add_(dy.t().float() @ x.float())
