"""Which steps of a run are traced, and where the files go."""

import json

import torch
from torch import nn

from megatron_llama.config import LogConfig
from megatron_llama.tracing import StepTracer
from parallel.groups import build_groups
from parallel.pipeline.executor import Executor
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import forward_only
from parallel.topology import Topology
from tests.megatron_llama.programs import succeed
from tests.parallel.building import CPU


class Stage(nn.Module):
    def forward(self, x, micro_batch):
        return micro_batch


def names_of_traces(directory, trace_steps):
    """Run steps 7 to 10 of a run that was resumed."""
    placement = Placement(1)
    executor = Executor([Stage()], placement, build_groups(Topology(), 0), (1,), torch.float32, CPU)
    tracer = StepTracer(LogConfig(directory=str(directory), trace_steps=trace_steps), executor)
    for number in range(7, 11):
        with tracer.step(number):
            executor.run(forward_only(placement, 2)[0], [torch.ones(1)] * 2)
        assert executor.trace is None
    return sorted(path.name for path in directory.rglob("*"))


def test_steps_are_traced_from_the_second_of_the_process_on(tmp_path):
    assert names_of_traces(tmp_path, 2) == ["step_8.json", "step_9.json", "traces"]
    events = json.loads((tmp_path / "traces" / "step_9.json").read_text())["traceEvents"]
    assert [event["name"] for event in events] == ["thread_name", "F0", "F1"]  # of this step alone


def test_nothing_is_traced_unless_asked_for(tmp_path):
    assert names_of_traces(tmp_path, 0) == []


def test_a_run_writes_what_it_is_asked_to(workplace):
    """Every rank's forward and backward passes, and its waits for the other's messages."""
    flags = ["--parallel.pp", 2, "--train.exit_step", 3, "--log.directory", "run", "--log.trace_steps", 1]
    succeed("train", "--config", "config.toml", *flags, ranks=2)
    (path,) = (workplace / "run" / "traces").iterdir()
    assert path.name == "step_2.json"
    spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    names = {rank: [span["name"] for span in spans if span["tid"] == rank] for rank in range(2)}
    assert names[0][:5] == ["F0", "F1", "wait0", "B0", "F2"]
    assert names[1][:6] == ["wait0", "F0", "B0", "wait1", "F1", "B1"]
