"""Training by replayed micro-batches: the bits of eager training, and a step that counts on no Python in a replay.

CUDA graphs need a GPU; here something that behaves like them on a CPU takes their place. The tests marked `gpu` have not run.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from megatron_llama import step as training_step
from megatron_llama.config import ZeroConfig
from megatron_llama.runtime import Runtime
from parallel import graphs
from parallel.errors import ConfigError
from parallel.graphs import MicroBatchGraphs
from parallel.pipeline.schedules import Action
from parallel.zero.buckets import Bucket
from parallel.zero.native import NativeZero
from parallel.zero.traffic import Gathers
from tests.parity.comparison import inexact
from tests.parity.test_parity import GQA, SHALLOW, SMALL_BATCH, layout
from tests.parity.training import MODEL, Case, Session, micro_batches, train
from tests.ranks import run_ranks

STEPS = 4  # an eager one, one with a capture, and two of replays


class Device:
    """What the emulated graphs of one rank share."""

    def __init__(self, runtime: Runtime) -> None:
        self.ledger = runtime.groups.ledger
        self.parameters = [parameter for chunk in runtime.chunks for parameter in chunk.parameters()]
        self.forward: EmulatedGraph | None = None  # the latest captured
        self.captures = self.replays = 0

    def buffers(self) -> list[Tensor]:
        """The engine's sums of gradients."""
        return [parameter.sink.main_grad for parameter in self.parameters]

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Inside, neither the engine nor the ledger hears of what is done."""
        heard = Counter(self.ledger.sent_bytes), Counter(self.ledger.calls)
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(Bucket, "gradient_ready", lambda bucket: None))
            stack.enter_context(mock.patch.object(Gathers, "wait_for", lambda gathers, bucket: None))
            yield
        self.ledger.sent_bytes, self.ledger.calls = heard


class EmulatedGraph:
    """A capture runs Python, and what it added to gradients is taken back; a replay does the work, and nobody hears of it."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def capture(self, work: Callable[[], Tensor | None]) -> Tensor | None:
        device, kept = self.device, [buffer.clone() for buffer in self.device.buffers()]
        device.captures += 1
        self.work, self.output = work, work()
        for buffer, before in zip(device.buffers(), kept, strict=True):
            buffer.copy_(before)
        if self.output is None:
            device.forward.launch()  # the backward pass has used up what it will need once more
        else:
            self.output.fill_(torch.nan)
            device.forward = self
        return self.output

    def launch(self) -> None:
        with self.device.unheard():
            made = self.work()
        if made is not None:
            self.output.copy_(made)

    def replay(self) -> None:
        self.device.replays += 1
        self.launch()


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """Runs with `train.cuda_graphs` get emulated ones; the devices of this process's runs."""
    made = []

    def make_graphs(runtime: Runtime) -> MicroBatchGraphs:
        made.append(Device(runtime))
        return MicroBatchGraphs(runtime.groups.ledger, lambda device=made[-1]: EmulatedGraph(device))

    monkeypatch.setattr(training_step, "make_graphs", make_graphs)
    return made


def graphed(case: Case) -> Case:
    return replace(case, train=replace(case.train, cuda_graphs=True))


BF16 = replace(SMALL_BATCH, dtype="bf16", global_batch_size=8)
FP16 = replace(BF16, dtype="fp16")
CASES = [
    Case("dp2-ragged-documents", layout(dp=2), GQA, replace(BF16, dtype="fp32"), ragged=True, documents=True),
    Case("tp2-sp-full", layout(tp=2, sequence_parallel=True, recompute="full"), GQA, replace(SMALL_BATCH, dtype="bf16")),
    Case("dp2-bf16-sums", layout(dp=2), SHALLOW, BF16, zero=ZeroConfig(gradient_dtype="bf16", overlap=False)),
    Case("tied-fp16", layout(recompute="linear_outputs"), replace(SHALLOW, tie_embeddings=True), FP16),
    Case("dp2-stage-0", layout(dp=2), SHALLOW, BF16, zero=ZeroConfig(stage=0)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_replays_change_no_bit_and_no_count_of_bytes(case: Case, devices: list[Device]) -> None:
    eager = run_ranks(case.world_size, train, case, STEPS)
    replayed = run_ranks(case.world_size, train, graphed(case), STEPS)
    assert inexact(replayed, eager) == []
    assert [outcome.sent_bytes for outcome in replayed] == [outcome.sent_bytes for outcome in eager]
    assert [outcome.norms for outcome in replayed] == [outcome.norms for outcome in eager]


def test_the_engine_is_told_of_the_passes_that_run_python(devices: list[Device], monkeypatch: pytest.MonkeyPatch) -> None:
    told, tell = [], NativeZero.expect_passes
    monkeypatch.setattr(NativeZero, "expect_passes", lambda engine, count: told.append(count) or tell(engine, count))
    train(0, 1, graphed(Case("documents", layout(), SHALLOW, BF16, documents=True)), STEPS)
    assert told == [8, 3, 2, 2]
    assert devices[0].captures == 2, "the length of the longest document differs from one micro-batch to the next"
    assert devices[0].replays == 3 * 2 * 6


def test_a_run_that_finds_no_gpu_says_so() -> None:
    with pytest.raises(ConfigError, match=r"this run is on cpu \(train.device = auto\): set --train.cuda_graphs false"):
        Session(0, 1, graphed(Case("cpu", layout(), SHALLOW, SMALL_BATCH)))


@pytest.mark.parametrize("recompute", ["none", "selective", "linear_outputs", "full"])
def test_nothing_of_a_pass_outlives_it(recompute: str) -> None:
    """A leaf's node of an earlier pass would pull its own stream into a capture. What garbage collection would find counts."""
    session = Session(0, 1, Case("leaves", layout(recompute=recompute), GQA, BF16))
    executor, marked = session.step_runner.executor, []
    parameters = [parameter for chunk in session.runtime.chunks for parameter in chunk.parameters()]
    compute = executor._compute

    def mark_leaves(action: Action, *inputs: object) -> Tensor | None:
        made = compute(action, *inputs)
        if action.kind == "F":
            marked.append([get_gradient_edge(parameter).node.metadata.setdefault("pass", action) for parameter in parameters])
        return made

    executor._compute = mark_leaves
    gc.disable()
    try:
        session.step(0)
    finally:
        gc.enable()
    assert [set(actions) for actions in marked] == [{action} for action in session.step_runner.actions[::2]]


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_A_GPU = [
    Case("plain", layout(), MODEL, BF16),
    Case("documents", layout(recompute="selective"), GQA, BF16, documents=True),
    Case("full", layout(recompute="full"), GQA, BF16),
    Case("linear-outputs-fp16", layout(recompute="linear_outputs"), GQA, FP16),
]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("case", ON_A_GPU, ids=lambda case: case.name)
def test_cuda_graphs_change_no_bit_and_never_make_the_host_wait(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not run yet: there was no GPU at hand."""
    replays, replay = [], graphs._CudaGraph.replay
    monkeypatch.setattr(graphs._CudaGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    results = []
    for one in (case, graphed(case)):
        session = Session(0, 1, one, device="cuda")
        for step in range(STEPS):
            session.step(step)
        batch = session.step_runner.prepare(micro_batches(one, STEPS, 0, 1))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            session.step_runner.run(batch, 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        masters = [box.tensor.clone() for box in session.engine.weight_boxes(write=False)]
        results.append((session.outcome.losses, masters))
    (eager_losses, eager), (losses, replayed) = results
    assert losses == eager_losses
    assert all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))
    assert len(replays) == STEPS * 2 * 6 and len(set(map(id, replays))) == 2
