"""Axes: the process groups of this rank, built once and handed to whoever needs one.

A layer takes the one axis it needs; nothing reads a global. An axis of size 1 has no process group, and every collective on
it returns at once: one process needs no `torch.distributed` and no special branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from parallel.ledger import Ledger
from parallel.topology import Coordinates, Topology
from parallel.waiting import ClockedHandle, Handle


@dataclass(frozen=True)
class Axis:
    """This rank's group along one axis: its index `rank` among `size` members, their global `ranks`."""

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    ledger: Ledger = field(compare=False, repr=False)

    @classmethod
    def single(cls, name: str, rank: int = 0, ledger: Ledger | None = None) -> Axis:
        """An axis of one member, on which every collective is a no-op."""
        return cls(name, 0, 1, (rank,), None, ledger or Ledger())

    def record(self, kind: str, sent_bytes: int) -> None:
        """Note a collective of this axis in the ledger."""
        self.ledger.record(kind, self.name, self.ranks, sent_bytes)

    def clocked(self, handle: Handle) -> ClockedHandle:
        """The handle of a collective of this axis, whose wait the ledger's clock measures."""
        return ClockedHandle(handle, self.ledger.clock)


@dataclass(frozen=True)
class ProcessGroups:
    """All axes of one rank.

    `data` combines dp and cp: the ranks that hold the same parameters and see different tokens. The optimizer is sharded over
    `shard`, which is `data` itself or a run of consecutive ranks of it (a node, say); `copies` are the ranks that hold the same
    shard then, one of each run.

    `pp_forward` and `pp_backward` are the pipeline axis twice, so that activations and gradients never wait for one another on
    a communicator. Where a placement sends activations both ways between two ranks, `pp_forward_down` (to a lower rank) and
    `pp_backward_up` (to a higher one) are communicators too; otherwise they are the first two again. `replicas` are further
    axes by name (kv heads below tp, tied embeddings).
    """

    topology: Topology
    place: Coordinates
    world: Axis
    pp_forward: Axis
    pp_backward: Axis
    pp_forward_down: Axis
    pp_backward_up: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    data: Axis
    shard: Axis
    copies: Axis
    replicas: Mapping[str, Axis]
    ledger: Ledger

    def axis(self, name: str) -> Axis:
        """The axis of that name among tp and the replica axes (what a `Replica` refers to)."""
        return self.tp if name == "tp" else self.replicas[name]

    def lane(self, kind: str, source: int, target: int) -> Axis:
        """The pipeline axis for messages of `kind` (F: activations, B: gradients) from pp rank `source` to `target`."""
        if kind == "F":
            return self.pp_forward if source < target else self.pp_forward_down
        return self.pp_backward if source > target else self.pp_backward_up

    def set_timeout(self, timeout: timedelta) -> None:
        """Bound every collective and message of these axes by `timeout` from now on. Only this rank's waiting is concerned."""
        axes = [value for value in vars(self).values() if isinstance(value, Axis)]
        for axis in [*axes, *self.replicas.values()]:
            if axis.group is not None:
                _set_pg_timeout(timeout, axis.group)
        self.ledger.clock.longest = timeout


def build_groups(
    topology: Topology,
    rank: int,
    replica_groups: Mapping[str, list[tuple[int, ...]]] | None = None,
    timeout: timedelta = timedelta(minutes=10),
    both_ways: bool = False,
    shard_group_size: int = 0,
    connected: bool = True,
) -> ProcessGroups:
    """Create every process group of the grid; all ranks call it together, with the same arguments but `rank`.

    `replica_groups` maps the name of a further axis to all its groups; a rank in none of them gets an axis of size 1.
    `timeout` bounds each collective (`new_group` does not inherit the default group's). `both_ways`: activations go both ways
    between some two pp ranks (`parallel.pipeline.p2p.both_ways`). `shard_group_size`: how many dp ranks share one copy of the
    optimizer; 0 is all of them. Not `connected`, the axes have no process groups: for one process that plans for all ranks.
    """
    ledger = Ledger()

    def build(name: str, groups: list[tuple[int, ...]]) -> Axis:
        mine = Axis.single(name, rank, ledger)
        for ranks in groups:
            if len(ranks) == 1:
                continue
            # every rank takes part in every creation
            group = dist.new_group(list(ranks), timeout=timeout) if connected else None
            if rank in ranks:
                mine = Axis(name, ranks.index(rank), len(ranks), ranks, group, ledger)
        return mine

    pipeline, data_groups = topology.groups("pp"), topology.groups("dp", "cp")
    data, copies = build("data", data_groups), Axis.single("copies", rank, ledger)
    shard, size = data, shard_group_size * topology.cp
    if 0 < size < data.size:
        shard = build("shard", [ranks[i : i + size] for ranks in data_groups for i in range(0, len(ranks), size)])
        copies = build("copies", [ranks[i::size] for ranks in data_groups for i in range(size)])
    forward, backward = build("pp", pipeline), build("pp", pipeline)
    return ProcessGroups(
        topology=topology,
        place=topology.coordinates(rank),
        world=build("world", [tuple(range(topology.world_size))]),
        pp_forward=forward,
        pp_backward=backward,
        pp_forward_down=build("pp", pipeline) if both_ways else forward,
        pp_backward_up=build("pp", pipeline) if both_ways else backward,
        dp=build("dp", topology.groups("dp")),
        cp=build("cp", topology.groups("cp")),
        tp=build("tp", topology.groups("tp")),
        data=data,
        shard=shard,
        copies=copies,
        replicas=MappingProxyType({name: build(name, groups) for name, groups in (replica_groups or {}).items()}),
        ledger=ledger,
    )
