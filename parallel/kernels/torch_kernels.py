"""Plain-torch kernels: the references of every operation in the table.

Legend: s sequence, b micro-batch, h hidden, n heads, k kv heads, d head dim, f ffn, o outputs, i inputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [s, b, h], [h] -> [s, b, h]
    """x / sqrt(mean(x^2) + eps) * weight. Source: Zhang and Sennrich 2019, equation 4."""
    wide = x.float()  # fp32: statistics
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [s, b, n, d], [s, d/2] fp32 -> [s, b, n, d]
    """Rotate each pair (x[j], x[j + d/2]) by its angle (half-split order). Source: Su et al. 2021, equation 34."""
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    first, second = x.float().chunk(2, dim=-1)  # fp32: tables and rotation
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:  # [s, b, 2f] -> [s, b, f]
    """silu(gate) * up, gate being the first half. Source: Shazeer 2020, equation 6."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """Causal softmax attention, each kv head shared by n/k query heads."""
    s, _, n, d = q.shape
    groups = n // k.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(d)  # fp32: softmax
    future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(q.dtype)
    return (weights @ v).permute(2, 0, 1, 3)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """The same by torch's scaled_dot_product_attention (flash and cuDNN kernels on GPUs)."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.permute(2, 0, 1, 3)


def wgrad(main_grad: Tensor, x: Tensor, dy: Tensor) -> None:  # [o, i] fp32, [t, i], [t, o]
    """main_grad += dy^T x, the product kept in fp32."""
    if x.dtype == torch.float32:
        main_grad.addmm_(dy.t(), x)
    elif x.is_cuda:
        main_grad.add_(torch.mm(dy.t(), x, out_dtype=torch.float32))
    else:
        main_grad.addmm_(dy.t().float(), x.float())
