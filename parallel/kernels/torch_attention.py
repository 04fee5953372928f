"""Attention by torch's own fused kernels.

Legend: s sequence, b micro-batch, n heads, k kv heads, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.kernels.documents import Documents
from parallel.kernels.reference_kernels import causal_mask


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """Causal attention by torch's scaled_dot_product_attention (flash and cuDNN kernels on GPUs).

    With `documents`: one call for each document on the CPU; on GPUs one call with a mask [b, 1, s, s], for which `varlen` is
    the better provider.
    """
    if documents is None:
        return _sdpa(q, k, v, is_causal=True)
    s, b = q.shape[:2]
    if q.is_cuda:
        return _sdpa(q, k, v, attn_mask=causal_mask(s, b, documents, q.device))
    columns = []
    for lengths, *sample in zip(documents.lengths(s, b), q.split(1, 1), k.split(1, 1), v.split(1, 1), strict=True):
        parts = zip(*(x.split(lengths) for x in sample), strict=True)
        columns.append(torch.cat([_sdpa(*part, is_causal=True) for part in parts]))
    return torch.cat(columns, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask)
    return y.permute(2, 0, 1, 3)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """Causal attention by torch's variable-length flash attention: one call for all documents, and no mask.

    Micro-batches without documents go to `sdpa`.
    """
    if documents is None:
        return sdpa(q, k, v)
    from torch.nn.attention.varlen import varlen_attn  # the module needs CUDA kernels that a laptop's torch may lack

    s, b, n, d = q.shape
    groups = n // k.shape[2]
    if groups > 1:  # torch 2.11 has no grouped heads here
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    packed = [batch_major(x) for x in (q, k, v)]
    ends, longest = documents.cu_seqlens, documents.max_length
    y = varlen_attn(*packed, ends, ends, longest, longest, window_size=(-1, 0))  # (-1, 0): causal
    return y.view(b, s, n, d).transpose(0, 1)


def batch_major(x: Tensor) -> Tensor:  # [s, b, n, d] -> [b s, n, d], contiguous
    """The tokens one after the other, all of sample 0 first: the layout of variable-length kernels."""
    return x.transpose(0, 1).flatten(0, 1).contiguous()
