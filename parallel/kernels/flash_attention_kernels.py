"""FlashAttention behind the table's signature: versions 2 (`flash_attn`), 3 (`flash_attn_interface`) and 4 (`flash_attn.cute`).

All take batch-first tensors of any strides with a contiguous head dim, share kv heads between query heads themselves, and
scale by 1/sqrt(d). Their gradients are the same in every run where `torch.use_deterministic_algorithms` is on.

Legend: s sequence, b micro-batch, n heads, k kv heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from parallel.kernels.documents import Documents
from parallel.kernels.torch_attention import batch_major

Result = Tensor | tuple[Any, ...]


def _attention(package: ModuleType, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """One call for all samples, or for all documents of all samples."""
    settings = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if documents is None:
        y = _output(package.flash_attn_func, *(x.transpose(0, 1) for x in (q, k, v)), **settings)
        return y.transpose(0, 1)
    s, b, n, d = q.shape
    ends, longest = documents.cu_seqlens, documents.max_length
    y = _output(
        package.flash_attn_varlen_func,
        *map(batch_major, (q, k, v)),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        **settings,
    )
    return y.view(b, s, n, d).transpose(0, 1)


def _output(function: Callable[..., Result], *inputs: Tensor, **settings: Any) -> Tensor:
    """The attention alone: version 4 gives the logarithm of the softmax's sum too, asked for or not, as early ones of 3 do."""
    result = function(*inputs, **settings)
    return result[0] if isinstance(result, tuple) else result


def flash_attention_2(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """Causal attention, inside documents where they are given, by FlashAttention 2."""
    import flash_attn

    return _attention(flash_attn, q, k, v, documents)


def flash_attention_3(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """Causal attention, inside documents where they are given, by FlashAttention 3."""
    import flash_attn_interface

    return _attention(flash_attn_interface, q, k, v, documents)


def flash_attention_4(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:  # [s, b, n, d], [s, b, k, d] twice -> [s, b, n, d]
    """Causal attention, inside documents where they are given, by FlashAttention 4."""
    import flash_attn.cute

    return _attention(flash_attn.cute, q, k, v, documents)
