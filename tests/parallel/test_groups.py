"""Axes of real ranks: who is in which group, and that the groups work."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import all_reduce, contact_kept, reduce_scatter, start_receive, start_send
from parallel.errors import LostContactError
from parallel.groups import Axis, build_groups
from parallel.topology import Topology
from tests.parallel.building import grid
from tests.ranks import run_ranks

PIPELINE = ("pp_forward", "pp_backward", "pp_forward_down", "pp_backward_up")
AXIS_NAMES = ("world", *PIPELINE, "dp", "cp", "tp", "data", "shard", "copies")


def describe_axes(rank, world_size, sizes, replica_groups, shard_group_size=0):
    groups = grid(rank, replica_groups, shard_group_size, **sizes)
    axes = {name: getattr(groups, name) for name in AXIS_NAMES} | dict(groups.replicas)
    sums = {name: all_reduce(torch.tensor([2.0**rank]), axis).item() for name, axis in axes.items()}
    return {name: (axis.rank, axis.size, axis.ranks, axis.group is None, sums[name]) for name, axis in axes.items()}


@pytest.mark.parametrize("sizes", [{"tp": 2, "dp": 2}, {"pp": 2, "cp": 2}, {"tp": 4}, {"dp": 2, "cp": 2}], ids=str)
def test_each_axis_joins_the_ranks_that_the_topology_says(sizes):
    topology = Topology(**sizes)
    names = {name: name for name in ("dp", "cp", "tp")} | {name: "pp" for name in PIPELINE}
    expected = {name: topology.groups(axis) for name, axis in names.items()}
    expected |= {"world": [tuple(range(4))], "data": topology.groups("dp", "cp"), "shard": topology.groups("dp", "cp")}
    expected["copies"] = [(rank,) for rank in range(4)]
    for rank, axes in enumerate(run_ranks(4, describe_axes, sizes, {})):
        for name, groups in expected.items():
            (mine,) = (group for group in groups if rank in group)
            total = sum(2.0**member for member in mine)  # the sum names its members
            assert axes[name] == (mine.index(rank), len(mine), mine, len(mine) == 1, total), name


def test_a_replica_axis_joins_its_groups_and_is_single_for_the_others():
    ranks = run_ranks(4, describe_axes, {"tp": 4}, {"kv": Topology(tp=4).subgroups("tp", 2), "ends": [(0, 3)]})
    assert [axes["kv"][:3] for axes in ranks] == [(0, 2, (0, 1)), (1, 2, (0, 1)), (0, 2, (2, 3)), (1, 2, (2, 3))]
    assert [axes["ends"][:3] for axes in ranks] == [(0, 2, (0, 3)), (0, 1, (1,)), (0, 1, (2,)), (1, 2, (0, 3))]
    assert [axes["ends"][4] for axes in ranks] == [9.0, 2.0, 4.0, 9.0]


@pytest.mark.parametrize(
    ("sizes", "shard_group_size", "shards", "copies"),
    [
        ({"dp": 4}, 2, [(0, 1), (2, 3)], [(0, 2), (1, 3)]),
        ({"dp": 4}, 1, [(0,), (1,), (2,), (3,)], [(0, 1, 2, 3)]),
        ({"dp": 4}, 4, [(0, 1, 2, 3)], [(0,), (1,), (2,), (3,)]),
        ({"dp": 4, "tp": 2}, 2, [(0, 2), (1, 3), (4, 6), (5, 7)], [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ({"dp": 2, "cp": 2}, 1, [(0, 1), (2, 3)], [(0, 2), (1, 3)]),  # all context ranks of a dp rank share its copy
    ],
)
def test_shard_groups_are_runs_of_data_ranks_and_copies_join_the_same_shard(sizes, shard_group_size, shards, copies):
    world_size = Topology(**sizes).world_size
    for rank, axes in enumerate(run_ranks(world_size, describe_axes, sizes, {}, shard_group_size)):
        for name, groups in (("shard", shards), ("copies", copies)):
            (mine,) = (group for group in groups if rank in group)
            assert axes[name] == (mine.index(rank), len(mine), mine, len(mine) == 1, sum(2.0**member for member in mine)), name


def look_up_axes(rank, world_size):
    groups = grid(rank, {"kv": [(0, 1)]}, tp=2)
    one_ledger = all(getattr(groups, name).ledger is groups.ledger for name in AXIS_NAMES)
    return groups.axis("tp") is groups.tp, groups.axis("kv") is groups.replicas["kv"], one_ledger


def test_axis_by_name_and_one_ledger():
    assert run_ranks(2, look_up_axes) == [(True, True, True)] * 2


def name_lanes(rank, world_size, both_ways):
    """Which lanes between two ranks share a communicator: the same letter stands for the same one."""
    groups = build_groups(Topology(pp=2), rank, both_ways=both_ways)
    lanes = [groups.lane(kind, source, 1 - source).group for kind in "FB" for source in (0, 1)]
    return "".join("abcd"[lanes.index(lane)] for lane in lanes)


def test_lanes_have_communicators_of_their_own_where_they_are_needed():
    """Activations up and gradients down always; where a placement goes both ways, each way of each kind."""
    assert run_ranks(2, name_lanes, False) == ["aacc"] * 2
    assert run_ranks(2, name_lanes, True) == ["abcd"] * 2


def test_one_process_needs_no_torch_distributed():
    groups = build_groups(Topology(), 0, {"kv": [(0,)]})
    assert not dist.is_initialized()
    assert all(getattr(groups, name).size == 1 and getattr(groups, name).group is None for name in AXIS_NAMES)
    assert groups.axis("kv").size == 1


def test_a_single_axis():
    axis = Axis.single("tp", rank=5)
    assert (axis.rank, axis.size, axis.ranks, axis.group) == (0, 1, (5,), None)


WAITS = {
    "all-reduce": lambda axis: all_reduce(torch.zeros(1), axis),
    "reduce-scatter": lambda axis: reduce_scatter(torch.zeros(2), axis),  # messages, over gloo
    "send": lambda axis: start_send(torch.zeros(1), axis, 1, tag=0).wait(),
    "receive": lambda axis: start_receive(torch.zeros(1), axis, 1, tag=0).wait(),
}


def wait_for_a_rank_that_is_late(rank, world_size, wait):
    groups = grid(rank, tp=world_size)
    groups.set_timeout(timedelta(seconds=1))
    if rank == 0:
        with pytest.raises(LostContactError, match="[Tt]imed out waiting"), contact_kept(groups.world):
            WAITS[wait](groups.tp)
    dist.barrier()  # of all ranks, which is not among the axes


@pytest.mark.parametrize("wait", WAITS)
def test_how_long_ranks_wait_for_each_other_may_change(wait):
    run_ranks(2, wait_for_a_rank_that_is_late, wait, deadline_seconds=20)
