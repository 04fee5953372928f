"""A process group whose other ranks do not exist: one process is any rank of a world of any size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

BACKEND = "dry_run"


class _Message(dist.Work):
    """A message that is through at once. As with NCCL, its tensors stay until it is waited for."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._tensors = ()
        return True

    def is_completed(self) -> bool:
        return True


class _FakeGroup(dist.ProcessGroup):
    """Calls of torch.distributed end here. Nothing is sent, and tensors stay as they are."""

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> _Message:
        return _Message(*tensors)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> _Message:
        return _Message(*tensors)

    def all_gather_single(self, out: Tensor, tensor: Tensor, options: Any = None) -> _Message:
        return _Message(out, tensor)

    def reduce_scatter_single(self, out: Tensor, tensor: Tensor, options: Any = None) -> _Message:
        return _Message(out, tensor)

    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single  # as torch 2.11 calls them

    def alltoall_base(self, out: Tensor, tensor: Tensor, *sizes_and_options: Any) -> _Message:
        return _Message(out, tensor)

    def send(self, tensors: list[Tensor], target: int, tag: int) -> _Message:
        return _Message(*tensors)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> _Message:
        return _Message(*tensors)


def _make_group(store: dist.Store, rank: int, size: int, timeout: timedelta) -> _FakeGroup:
    return _FakeGroup(rank, size)


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Inside, this process is `rank` of `world_size`. It must be in no other process group."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _make_group, devices=["cpu", "meta"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
