"""The ranks that read a checkpoint together: what one finds wrong all of them raise, and those of a node share the work.

`Readers` is a program of one process; `GroupReaders` are the ranks of a `torch.distributed` group.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint.manifest import DamagedError
from parallel.errors import CheckpointError, UserError
from parallel.heartbeat import Heartbeat

Result = TypeVar("Result")
MAX_REPORT_BYTES = 4096  # of what one rank tells the others


class Readers:
    """One process, alone on its node. All ranks call the same methods in the same order."""

    rank = 0
    node_rank = 0
    node_size = 1

    def together(self, work: Callable[[], Result]) -> Result:
        """Do `work` on every rank, and return what it returns here.

        Raises CheckpointError on every rank where any rank raises: that of the lowest such rank, which is named. A
        DamagedError is one everywhere. Other exceptions, which are defects, are raised as they are by who has them.
        """
        return work()

    def node_sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of the node's int64 CPU tensors, which are of one length."""
        return values

    def node_agrees(self, work: Callable[[], object]) -> bool:
        """Do `work` on the ranks of the node, and return whether all succeeded. Raises what it raises, when all are done."""
        error = None
        try:
            work()
        except Exception as found:
            error = found
        failures = self.node_sum(torch.tensor([error is not None], dtype=torch.int64))
        if error is not None:
            raise error
        return not failures.any()

    def node_memory(self, size: int) -> Tensor | None:
        """`size` bytes that all ranks of the node share, or None (on all of them) where there can be none."""
        return None

    def close(self) -> None:
        """Give back what reading together needed. All ranks call it together."""


class GroupReaders(Readers):
    """The ranks of `group` (the default one where None); those with the same host name are a node.

    Making one is a collective call. Nodes talk over gloo, so nothing is kept on a device. `heartbeat` shows who has come to
    which call, and so for whom the others wait.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, heartbeat: Heartbeat | None = None):
        self._heartbeat = heartbeat or Heartbeat()
        self._world = group if group is not None else dist.group.WORLD
        self.rank = dist.get_rank(self._world)
        on_device = dist.get_backend(self._world) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")
        hosts = torch.zeros(dist.get_world_size(self._world), dtype=torch.int64, device=self._device)
        digest = hashlib.sha256(socket.gethostname().encode()).digest()
        hosts[self.rank] = int.from_bytes(digest[:7], "little")
        dist.all_reduce(hosts, group=self._world)
        nodes: dict[int, list[int]] = {}
        for member, host in enumerate(hosts.tolist()):
            nodes.setdefault(host, []).append(dist.get_global_rank(self._world, member))
        for ranks in nodes.values():  # every rank takes part in every creation
            node = dist.new_group(ranks, backend="gloo") if len(ranks) > 1 else None
            if dist.get_rank() in ranks:
                self._node, self.node_rank, self.node_size = node, ranks.index(dist.get_rank()), len(ranks)

    def together(self, work: Callable[[], Result]) -> Result:
        """As of one process, and where a rank fails, what it has found is told to the others."""
        results, error = [], None
        try:
            results.append(work())
        except Exception as found:  # a defect of ours, too: the others must not wait for this rank
            error = found
        self._heartbeat.call("agreement", "world", tuple(dist.get_process_group_ranks(self._world)))
        failed = torch.zeros(dist.get_world_size(self._world), dtype=torch.int64, device=self._device)
        failed[self.rank] = error is not None
        dist.all_reduce(failed, group=self._world)
        ranks = failed.nonzero().flatten().tolist()
        if not ranks:
            return results[0]
        report = self._broadcast(_report(error), ranks[0])
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        raise _error_of(report, ranks, len(failed)) from error

    def _broadcast(self, data: bytes, source: int) -> bytes:
        """The bytes of rank `source`, at most MAX_REPORT_BYTES, on every rank."""
        buffer = torch.zeros(8 + MAX_REPORT_BYTES, dtype=torch.uint8)
        if self.rank == source:
            framed = len(data).to_bytes(8, "little") + data
            buffer[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        buffer = buffer.to(self._device)
        dist.broadcast(buffer, dist.get_global_rank(self._world, source), group=self._world)
        received = buffer.cpu().numpy().tobytes()
        return received[8 : 8 + int.from_bytes(received[:8], "little")]

    def node_sum(self, values: Tensor) -> Tensor:
        if self._node is not None:
            self._heartbeat.call("all_reduce", "node", tuple(dist.get_process_group_ranks(self._node)))
            values = values.clone()
            dist.all_reduce(values, group=self._node)
        return values

    def node_memory(self, size: int) -> Tensor | None:
        """An anonymous file, which no limit of /dev/shm concerns and which goes with its last user."""
        if self._node is None:
            return None
        descriptor, name = -1, f"megatron-llama-{os.getpid()}"
        mapped, place = None, torch.zeros(2, dtype=torch.int64)
        try:
            if self.node_rank == 0:
                descriptor = os.memfd_create(name)
                os.posix_fallocate(descriptor, 0, size)  # now or never: a page that is missing later would be a SIGBUS
                place = torch.tensor([os.getpid(), descriptor])
        except (OSError, AttributeError):  # no memory, not Linux
            place.zero_()
        process, number = self.node_sum(place).tolist()
        try:
            if process:
                mapped = _map(f"/proc/{process}/fd/{number}", f"megatron-llama-{process}", size)
        except OSError:  # another container's process, perhaps
            mapped = None
        everywhere = int(self.node_sum(torch.tensor([int(mapped is not None)])).item()) == self.node_size
        if descriptor >= 0:
            os.close(descriptor)
        return torch.frombuffer(mapped, dtype=torch.uint8) if everywhere else None

    def close(self) -> None:
        if self._node is not None:
            dist.destroy_process_group(self._node)
            self._node = None


def _map(path: str, name: str, size: int) -> mmap.mmap:
    """Map another process's anonymous file. Raises OSError unless it is the one meant."""
    if os.readlink(path) != f"/memfd:{name} (deleted)":
        raise OSError(f"{path} is not {name}")
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, size)
    except ValueError as error:  # shorter than it should be
        raise OSError(str(error)) from error
    finally:
        os.close(descriptor)


def _report(error: Exception | None) -> bytes:
    """What is wrong, as JSON of at most MAX_REPORT_BYTES; where it is not a user's error its type is named."""
    if error is None:
        return b""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    place = (error.file, error.block) if isinstance(error, DamagedError) else None
    return json.dumps({"text": text[:600], "damaged": place}).encode()


def _error_of(report: bytes, ranks: list[int], world_size: int) -> CheckpointError:
    """The error that rank ranks[0] has reported; `ranks`: all that have one."""
    fields = json.loads(report)
    more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    text = fields["text"] + (f" (found by rank {ranks[0]}{more})" if len(ranks) < world_size else "")
    return CheckpointError(text) if fields["damaged"] is None else DamagedError(text, *fields["damaged"])
