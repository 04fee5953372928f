"""A process group without other ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_llama.dry_run.allocations import AllocationLedger
from megatron_llama.dry_run.fake_world import fake_world
from parallel.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from parallel.groups import Axis, build_groups
from parallel.topology import Topology
from parallel.waiting import Handle


def start_gather(tensor: torch.Tensor, axis: Axis) -> Handle:
    return start_all_gather(tensor, axis)[1]


def start_scatter(tensor: torch.Tensor, axis: Axis) -> Handle:
    return start_reduce_scatter(tensor, axis)[1]


@pytest.mark.parametrize("start, kept_bytes", [(start_all_reduce, 32), (start_gather, 96), (start_scatter, 48)])
def test_a_message_keeps_its_tensors_until_it_is_waited_for(start, kept_bytes):
    with fake_world(1, 4), AllocationLedger("meta") as ledger:
        groups = build_groups(Topology(dp=2, tp=2), 1)
        handle = start(torch.zeros(8, device="meta"), groups.tp)
        assert ledger.live.total() == kept_bytes
        handle.wait()
        assert ledger.live.total() == 0


def test_it_is_any_rank_of_a_large_world_and_leaves_nothing():
    for rank in (0, 4095):
        with fake_world(rank, 4096):
            assert (dist.get_rank(), dist.get_world_size()) == (rank, 4096)
        assert not dist.is_initialized()
