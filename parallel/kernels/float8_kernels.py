"""Linears in float8: each operand is divided by a scale made from its own largest values just before its product.

| recipe     | fprop x W^T             | dgrad dy W                                | wgrad dy^T x         |
|------------|-------------------------|-------------------------------------------|----------------------|
| tensorwise | x and W e4m3            | dy e5m2, W e4m3                           | dy e5m2, x e4m3      |
| rowwise    | x and W e4m3, by row    | dy e4m3, by row; W e4m3, as a whole       | as without float8    |

The scales of `rowwise` are powers of two. Sums are fp32; outputs have the dtype of x or dy, weight gradients are added in fp32.
A tensor rank scales its own shard. These are the recipes `tensorwise` and `rowwise_with_gw_hp` of torchao 0.18. Source:
Micikevicius et al. 2022 (FP8 formats for deep learning).

Legend: t tokens, i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.kernels.table import Kernels

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST_MAXIMUM = 1e-12  # what a tensor of zeros is taken to hold


@dataclass(frozen=True)
class Float8:
    """About `values` * `scale`: values [m, k] in float8, scale fp32 [] or [m, 1]."""

    values: Tensor
    scale: Tensor

    def t(self) -> Float8:
        """Transposed [k, m], the rows contiguous again. One scale for all."""
        return Float8(self.values.t().contiguous(), self.scale)


def quantize(x: Tensor, dtype: torch.dtype, by_row: bool = False, power_of_two: bool = False) -> Float8:  # [m, k]
    """x in float8, its largest value (of each row) at the largest number of the format, or up to half of it."""
    largest = x.abs().amax(-1, keepdim=True) if by_row else x.abs().amax()
    limit = torch.finfo(dtype).max
    factor = (limit / largest.double().clamp(min=SMALLEST_MAXIMUM)).float()  # fp64: compiled or not, the same bits
    if power_of_two:
        factor = factor.log2().floor().exp2()
    values = (x.float() * factor).clamp(-limit, limit).to(dtype)
    return Float8(values, factor.reciprocal())


def product(a: Float8, b: Float8, dtype: torch.dtype, fast: bool = False) -> Tensor:  # [m, k], [n, k] -> [m, n]
    """a b^T. `fast`: with fewer bits in the sums on GPUs that offer it, which outputs can bear and gradients cannot."""
    a_scale, b_scale = a.scale, b.scale
    if a_scale.ndim and not b_scale.ndim:  # the kernel wants scales by row for both
        b_scale = b_scale.repeat(len(b.values), 1)
    return torch._scaled_mm(a.values, b.values.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=dtype, use_fast_accum=fast)


@dataclass(frozen=True)
class Products:
    """The products of a linear, scaled by row or as a whole."""

    by_row: bool
    quantize: Callable[..., Float8] = quantize

    def fprop(self, x: Tensor, weight: Tensor) -> Tensor:  # [..., i], [o, i] -> [..., o]
        rows, weights = (self.quantize(one, E4M3, self.by_row, self.by_row) for one in (x.flatten(0, -2), weight))
        y = product(rows, weights, x.dtype, fast=True)
        return y.view(*x.shape[:-1], -1)

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:  # [..., o], [o, i] -> [..., i]
        rows = self.quantize(dy.flatten(0, -2), E4M3 if self.by_row else E5M2, self.by_row, self.by_row)
        dx = product(rows, self.quantize(weight, E4M3, power_of_two=self.by_row).t(), dy.dtype)
        return dx.view(*dy.shape[:-1], -1)

    def wgrad(self, main_grad: Tensor, x: Tensor, dy: Tensor) -> None:  # [o, i] fp32, [t, i], [t, o]
        main_grad.add_(product(self.quantize(dy, E5M2).t(), self.quantize(x, E4M3).t(), torch.float32))


def float8_kernels(kernels: Kernels, recipe: str, compiled: bool = False) -> Kernels:
    """The same kernels with the products of linears in float8: `recipe` is none, tensorwise or rowwise.

    `compiled`: quantise in few passes over memory, by torch.compile.
    """
    if recipe == "none":
        return kernels
    products = Products(recipe == "rowwise", torch.compile(quantize, dynamic=False) if compiled else quantize)
    names = {**kernels.names, "linear": f"float8 {recipe}"}
    wgrad = kernels.wgrad if products.by_row else products.wgrad
    return replace(kernels, fprop=products.fprop, dgrad=products.dgrad, wgrad=wgrad, names=names)


def float8_missing(device: torch.device) -> str | None:
    """Why a device has no float8 products, or None."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU of compute capability 8.9 (Ada, Hopper) or later, and the run is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"it needs compute capability 8.9 (Ada, Hopper) or later, and this GPU has {capability[0]}.{capability[1]}"
    return None
