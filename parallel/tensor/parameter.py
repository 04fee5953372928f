"""Parameters that know their place, and initial values that are a function of (seed, name, position)."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from parallel.shards import Box, Shard


class GradientSink(Protocol):
    """Where an optimizer engine collects a parameter's gradient: `main_grad`, and `ready()` once per use in a backward.

    `main_grad` is fp32, or bf16 on demand. Ask for it at each use: between passes it may not exist.
    """

    @property
    def main_grad(self) -> Tensor: ...

    def ready(self) -> None: ...


class ShardedParameter(nn.Parameter):
    """A parameter with its place (`shard`) in named global tensors, and, once an engine owns it, its gradient `sink`.

    With a sink, linears accumulate the weight gradient into `sink.main_grad` themselves and call `sink.ready()`; without
    one, gradients arrive in `.grad` as everywhere in torch.
    """

    shard: Shard
    sink: GradientSink | None

    def __new__(cls, shard: Shard, dtype: torch.dtype, device: torch.device) -> ShardedParameter:
        parameter = super().__new__(cls, torch.zeros(shard.shape, dtype=dtype, device=device))
        parameter.shard = shard
        parameter.sink = None
        return parameter


_ALIGNED = 512  # elements are made in aligned blocks of the global tensor, so that an element's bits don't depend on the box


def _normal_run(key: int, start: int, stop: int) -> np.ndarray:
    """Standard normal values (fp32) of the global elements [start, stop), by Box-Muller on Philox4x64 counters.

    Element i uses the i-th 64-bit word of the stream: its upper and lower 32 bits are the two uniform numbers.
    """
    first = start // _ALIGNED * _ALIGNED
    last = -(-stop // _ALIGNED) * _ALIGNED
    words = np.random.Philox(key=key, counter=first // 4).random_raw(last - first)  # 4 words per counter
    radius_uniform = ((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    angle_uniform = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32
    values = np.sqrt(-2.0 * np.log(radius_uniform)) * np.cos(2.0 * math.pi * angle_uniform)
    return values.astype(np.float32)[start - first : stop - first]


def normal_box(seed: int, name: str, global_shape: tuple[int, ...], box: Box) -> Tensor:
    """The standard normal initial values (fp32, CPU) of `box` of the global tensor `name`: the same bits whatever the box.

    Source: Salmon et al. 2011 (Philox), Box and Muller 1958.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    row_size = math.prod(global_shape[1:])
    if box.shape[1:] == tuple(global_shape[1:]):  # whole rows: one run
        start = box.offset[0] * row_size
        return torch.from_numpy(_normal_run(key, start, start + box.numel)).reshape(box.shape)
    assert len(global_shape) == 2, f"{name}: boxes of partial rows are made for matrices only"
    rows = range(box.offset[0], box.end[0])
    runs = [_normal_run(key, r * row_size + box.offset[1], r * row_size + box.end[1]) for r in rows]
    return torch.from_numpy(np.stack(runs))


@torch.no_grad()
def initialize_normal(parameter: ShardedParameter, seed: int, std: float | dict[str, float]) -> None:
    """Fill every segment with N(0, std^2) values; padding stays zero. `std` may differ by logical name."""
    for segment in parameter.shard.segments:
        scale = std[segment.name] if isinstance(std, dict) else std
        values = normal_box(seed, segment.name, segment.global_shape, segment.box) * scale
        parameter[segment.local.slices()].copy_(values)
