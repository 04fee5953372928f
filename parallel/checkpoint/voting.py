"""How ranks that save or load together agree: on whether all of them succeeded, and on a number."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from parallel.heartbeat import Heartbeat


class Voter(Protocol):
    """The ranks that work together. All call the same methods in the same order."""

    rank: int
    size: int

    def all_ok(self, ok: bool) -> bool:
        """Whether every rank passed True; returns after every rank has called it."""

    def broadcast_int(self, value: int) -> int:
        """Rank 0's value (below 2^62) on every rank."""


class SingleProcess:
    """A voter for one process."""

    rank = 0
    size = 1

    def all_ok(self, ok: bool) -> bool:
        return ok

    def broadcast_int(self, value: int) -> int:
        return value


class GroupVoter:
    """A voter over a `torch.distributed` group (the default group where None): gloo on CPU tensors, NCCL on device tensors.

    `heartbeat` shows who has voted, and so for whom the others wait.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, heartbeat: Heartbeat | None = None):
        self.group = group if group is not None else dist.group.WORLD
        self.heartbeat = heartbeat or Heartbeat()
        self.ranks = tuple(dist.get_process_group_ranks(self.group))
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        on_device = dist.get_backend(self.group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")

    def all_ok(self, ok: bool) -> bool:
        """As of every voter; one all-reduce."""
        self.heartbeat.call("vote", "world", self.ranks)
        verdict = torch.tensor([int(ok)], dtype=torch.int64, device=self.device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN, group=self.group)
        return bool(verdict.item())

    def broadcast_int(self, value: int) -> int:
        """As of every voter; one broadcast."""
        self.heartbeat.call("broadcast", "world", self.ranks)
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        return int(box.item())
