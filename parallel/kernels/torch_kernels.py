"""Plain-torch kernels: the references of every operation in the table.

Legend: s sequence, b micro-batch, h hidden, n heads, k kv heads, d head dim, f ffn, o outputs, i inputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.kernels.documents import Documents


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [s, b, h], [h] -> [s, b, h]
    """x / sqrt(mean(x^2) + eps) * weight. Source: Zhang and Sennrich 2019, equation 4."""
    wide = x.float()  # fp32: statistics
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [s, b, n, d], [s, b or 1, d/2] fp32 -> [s, b, n, d]
    """Rotate each pair (x[j], x[j + d/2]) by its angle (half-split order). Source: Su et al. 2021, equation 34."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x.float().chunk(2, dim=-1)  # fp32: tables and rotation
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


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
    visible = _visible(s, b, documents, q.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(q.dtype)
    return (weights @ v).permute(2, 0, 1, 3)


def _visible(s: int, b: int, documents: Documents | None, device: torch.device) -> Tensor:  # [s, s] or [b, 1, s, s]
    """True where a query (second to last dim) may look at a key (last dim): not ahead, and in its document."""
    past = torch.ones(s, s, dtype=torch.bool, device=device).tril()
    if documents is None:
        return past
    ids = documents.ids(s, b)
    return past & (ids[:, None, :, None] == ids[:, None, None, :])


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """The same by torch's scaled_dot_product_attention (flash and cuDNN kernels on GPUs).

    With `documents`: one call for each document on the CPU; on GPUs one call with a mask [b, 1, s, s], for which "varlen" is
    the better backend.
    """
    if documents is None:
        return _sdpa(q, k, v, is_causal=True)
    s, b = q.shape[:2]
    if q.is_cuda:
        return _sdpa(q, k, v, attn_mask=_visible(s, b, documents, q.device))
    columns = []
    for lengths, *sample in zip(documents.lengths(s, b), q.split(1, 1), k.split(1, 1), v.split(1, 1), strict=True):
        parts = zip(*(x.split(lengths) for x in sample), strict=True)
        columns.append(torch.cat([_sdpa(*part, is_causal=True) for part in parts]))
    return torch.cat(columns, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask)
    return y.permute(2, 0, 1, 3)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """The same by torch's variable-length flash attention: one call for all documents, and no mask.

    It knows half precision only; fp32, and micro-batches without documents, go to `sdpa_attention`.
    """
    if documents is None or q.dtype == torch.float32:
        return sdpa_attention(q, k, v, documents)
    from torch.nn.attention.varlen import varlen_attn  # the module needs CUDA kernels that a laptop's torch may lack

    s, b, n, d = q.shape
    groups = n // k.shape[2]
    if groups > 1:  # torch 2.11 has no grouped heads here
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    packed = [x.transpose(0, 1).reshape(b * s, n, d) for x in (q, k, v)]
    ends, longest = documents.cu_seqlens, documents.max_length
    y = varlen_attn(*packed, ends, ends, longest, longest, window_size=(-1, 0))  # (-1, 0): causal
    return y.view(b, s, n, d).transpose(0, 1)


def varlen_missing(device: torch.device) -> str | None:
    """Why `varlen_attention` cannot run there, or None."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "torch's variable-length attention needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "torch's variable-length attention needs an NVIDIA GPU of the Ampere generation or later"
    return None


def fprop(x: Tensor, weight: Tensor) -> Tensor:  # [..., i], [o, i] -> [..., o]
    """A linear's output: y = x W^T."""
    return x @ weight.t()


def dgrad(dy: Tensor, weight: Tensor) -> Tensor:  # [..., o], [o, i] -> [..., i]
    """A linear's input gradient: dx = dy W."""
    return dy @ weight


def wgrad(main_grad: Tensor, x: Tensor, dy: Tensor) -> None:  # [o, i] fp32, [t, i], [t, o]
    """main_grad += dy^T x, the product kept in fp32."""
    if x.dtype == torch.float32:
        main_grad.addmm_(dy.t(), x)
    elif x.is_cuda:
        main_grad.add_(torch.mm(dy.t(), x, out_dtype=torch.float32))
    else:
        main_grad.addmm_(dy.t().float(), x.float())
