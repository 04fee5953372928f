"""The trace of real ranks: every action once, on one clock, in a file that Chrome and Perfetto read."""

import json
import time

import pytest
import torch
from torch import nn

from parallel.groups import Axis, build_groups
from parallel.pipeline import trace as trace_module
from parallel.pipeline.executor import Executor
from parallel.pipeline.layout import Placement
from parallel.pipeline.p2p import both_ways
from parallel.pipeline.trace import KINDS, Trace, clock_offset
from parallel.tensor.deferred import WeightGradientQueue
from parallel.topology import Topology
from tests.parallel.building import CPU, grid
from tests.parallel.pipeline.lists import all_forward_all_backward, split_backward
from tests.ranks import run_ranks

SECONDS, COUNT = 0.01, 3


class SlowStage(nn.Module):
    """A forward pass that takes its time."""

    def __init__(self):
        super().__init__()
        self.weight_gradients, self.scale = WeightGradientQueue(), nn.Parameter(torch.ones(2))

    def forward(self, x, micro_batch):
        time.sleep(SECONDS)
        return self.scale * (micro_batch if x is None else x)


class LossStage(SlowStage):
    def forward(self, x, micro_batch):
        return super().forward(x, micro_batch).sum()


class Listener:
    def expect_passes(self, count):
        pass


def trace_a_step(rank, world_size, placement, path):
    groups = build_groups(Topology(pp=placement.pp, dp=2), rank, both_ways=both_ways(placement))
    last = placement.num_stages - 1
    stages = [placement.stage(groups.place.pp, chunk) for chunk in range(placement.chunks)]
    chunks = [LossStage() if stage == last else SlowStage() for stage in stages]
    executor = Executor(chunks, placement, groups, (2,), torch.float32, CPU)
    executor.trace = Trace(groups, placement, CPU)
    schedule = split_backward(all_forward_all_backward(placement, COUNT), 1)
    executor.run(schedule[groups.place.pp], [torch.ones(2)] * COUNT, Listener())
    executor.trace.write(path)
    return [str(action) for action in schedule[groups.place.pp]]


@pytest.mark.parametrize("placement", [Placement(2), Placement(2, 2, "v")], ids=str)
def test_every_rank_has_a_row_with_its_actions_in_order_on_one_clock(placement, tmp_path):
    path = tmp_path / "traces" / "step_2.json"
    lists = run_ranks(4, trace_a_step, placement, path)
    document = json.loads(path.read_text())
    events = document["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == [f"rank {rank}: pp {rank // 2} dp {rank % 2} cp 0 tp 0" for rank in range(4)]
    spans = [event for event in events if event["ph"] == "X"]
    assert {span["cat"] for span in spans} == {"F", "I", "W", "wait"} < set(KINDS)
    accuracy = document["otherData"]["clock_accuracy_seconds"] * 1e6
    assert 0 < accuracy < 1e6
    ends = {}
    for rank, actions in enumerate(lists):
        mine = [span for span in spans if span["tid"] == rank]
        computed = [span for span in mine if span["cat"] != "wait"]
        assert [span["name"] for span in computed] == actions
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in zip(mine, mine[1:], strict=False)), "they overlap"
        for span in computed:
            stage = placement.stage(rank // 2, span["args"]["chunk"])
            assert (span["args"]["pp_rank"], span["args"]["stage"]) == (rank // 2, stage)
            assert span["cat"] != "F" or span["dur"] >= SECONDS * 1e6
            ends[rank % 2, span["cat"], span["args"]["micro_batch"], stage] = (span["ts"], span["ts"] + span["dur"])
    assert min(span["ts"] for span in spans) == 0
    for (dp, kind, micro_batch, stage), (start, _) in ends.items():
        before = (dp, kind, micro_batch, stage - 1) if kind == "F" else (dp, kind, micro_batch, stage + 1)
        if kind in "FI" and before in ends:
            assert start >= ends[before][1] - 2 * accuracy, "an action began before its input was made"


class Shifted:
    """A clock that is ahead by some seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def perf_counter(self):
        return time.perf_counter() + self.seconds


def measure_offset(rank, world_size):
    trace_module.time = Shifted(100.0 * rank)
    return clock_offset(grid(rank, dp=world_size).world, CPU)


def test_the_offset_of_a_clock_is_found_to_the_accuracy_that_is_said():
    for rank, (offset, accuracy) in enumerate(run_ranks(3, measure_offset)):
        assert abs(offset - 100.0 * rank) <= accuracy + 1e-6 and accuracy < 1.0


def test_one_process_needs_no_other_clock():
    assert clock_offset(Axis.single("world"), CPU) == (0.0, 0.0)
