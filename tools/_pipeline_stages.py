"""What benchmark_pipeline.py runs: stages that sleep instead of computing, on our executor and on torch's pipelining.

A message carries when it was made; who takes it sleeps until a fixed link delay after that. So processes that share few cores
and have no network behave as devices of their own with one, and any framework can run the same stages.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed.pipelining.schedules as torch_schedules
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from parallel.groups import ProcessGroups
from parallel.pipeline.executor import Executor
from parallel.pipeline.layout import Placement
from parallel.pipeline.p2p import Mailbox
from parallel.pipeline.schedules import Action
from parallel.tensor.deferred import WeightGradient, WeightGradientQueue

CPU = torch.device("cpu")
SPIN_SECONDS = 2e-4  # how late the system may wake a sleeper
SHAPE = (1, 2)  # of every tensor: [when it was made in seconds, micro-batch]
TORCH_SCHEDULES = {  # name -> class, placement
    "Interleaved1F1B": (torch_schedules.ScheduleInterleaved1F1B, "loop"),
    "InterleavedZeroBubble": (torch_schedules.ScheduleInterleavedZeroBubble, "loop"),
    "ZBVZeroBubble": (torch_schedules.ScheduleZBVZeroBubble, "v"),
    "DualPipeV": (torch_schedules.ScheduleDualPipeV, "v"),
}


def now() -> float:
    """Seconds on a clock that all processes of a machine share."""
    return time.monotonic()


def sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - now() - SPIN_SECONDS))
    while now() < moment:
        pass


class Work(NamedTuple):
    """A stage was busy: `kind` F, I or W (whole backward: W, then I). `arrival`: of the message that it needed, or 0."""

    kind: str
    micro_batch: int
    chunk: int
    start: float
    end: float
    arrival: float


class Log:
    """What one rank's stages do in one step. `peak`: the most activations, of chunks, that were alive at once."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.live: WeakSet[Activation] = WeakSet()
        self.peak = 0
        self._start: float | None = None  # of the work that comes next
        self._arrival = 0.0

    def keep(self, activation: Activation) -> None:
        self.live.add(activation)
        self.peak = max(self.peak, len(self.live))

    def begin(self) -> None:
        """What is done from now on belongs to the next work."""
        self._start = now()

    def wait(self, arrival: float) -> None:
        """The next work needs a message that the link brings at `arrival`."""
        self._arrival = arrival
        if now() < arrival:
            sleep_until(arrival)
            self._start = arrival

    def work(self, kind: str, activation: Activation) -> Tensor:
        """Sleep. Returns the message that is made."""
        start = self._start
        if start is None:  # an I that nothing begins goes on after the W of the same backward pass
            start = self.works[-1].end if kind == "I" else now()
        message = torch.tensor([[0.0, activation.micro_batch]], dtype=torch.float64)
        sleep_until(start + activation.stage.sleep_seconds)
        end = message.numpy()[0, 0] = now()
        self.works.append(Work(kind, activation.micro_batch, activation.stage.chunk, start, end, self._arrival))
        self._start, self._arrival = None, 0.0
        return message


@dataclass(eq=False)
class Activation:
    """Stands for what a forward pass keeps: alive as long as anything that its backward passes need."""

    stage: SleepingStage
    micro_batch: int

    def work(self, kind: str) -> Tensor:
        return self.stage.log.work(kind, self)


class SleepingStage(nn.Module):
    """Sleeps `sleep_seconds` for each of F, I and W. Its gradients mean nothing, but what makes them, and when, is real."""

    def __init__(self, stage: int, placement: Placement, sleep_seconds: float, link_seconds: float, log: Log) -> None:
        super().__init__()
        self.chunk, self.sleep_seconds, self.link_seconds, self.log = placement.chunk(stage), sleep_seconds, link_seconds, log
        self.is_first, self.is_last = stage == 0, stage == placement.num_stages - 1
        rank = placement.rank(stage)
        self.x_travels = not self.is_first and placement.rank(stage - 1) != rank
        self.dy_travels = not self.is_last and placement.rank(stage + 1) != rank
        self.weight = nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))
        self.weight_gradients = WeightGradientQueue()

    def forward(self, x: Tensor | None, micro_batch: Tensor | None = None) -> Tensor:
        """Our executor gives the first stage its micro-batch as such, torch's as x."""
        self.log.begin()
        if self.is_first:
            x = (micro_batch if x is None else x).detach().requires_grad_()
        ((made, number),) = x.tolist()
        if self.x_travels:
            self.log.wait(made + self.link_seconds)
        activation = Activation(self, int(number))
        self.log.keep(activation)
        # Enter is made before Weigh, so autograd runs it after Weigh: a whole backward pass ends with the message dx
        y = Leave.apply(Enter.apply(x, activation) * Weigh.apply(self.weight, activation), activation)
        return y.sum() if self.is_last else y


class Enter(torch.autograd.Function):
    """Forward: nothing. Backward: I, which makes dx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.activation.work("I"), None


class Weigh(torch.autograd.Function):
    """Forward: nothing. Backward: W, now or later."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        queue = ctx.activation.stage.weight_gradients
        if queue.collecting:
            queue.put(LateWork(ctx.activation))
            return None, None
        ctx.activation.work("W")
        return dy, None


class LateWork(WeightGradient):
    """W in the executor's queue."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def compute(self) -> None:
        self.activation.work("W")


class Leave(torch.autograd.Function):
    """Forward: F, which makes y. Backward: wait for dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        return activation.work("F")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        stage = ctx.activation.stage
        stage.log.begin()
        if stage.dy_travels:
            stage.log.wait(dy[0, 0].item() + stage.link_seconds)
        return dy, None


class Contestant:
    """One rank's part of a pipeline."""

    def __init__(self, placement: Placement, rank: int, micro_batches: int, sleep_seconds: float, link_seconds: float) -> None:
        self.placement, self.link_seconds, self.log = placement, link_seconds, Log()
        numbers = [placement.stage(rank, chunk) for chunk in range(placement.chunks)]
        self.stages = {n: SleepingStage(n, placement, sleep_seconds, link_seconds, self.log) for n in numbers}
        self.micro_batches = torch.tensor([[0.0, m] for m in range(micro_batches)], dtype=torch.float64)

    def step(self) -> None:
        raise NotImplementedError

    def measured_step(self) -> tuple[list[Work], int]:
        """What the rank's stages did, and the peak of its activations."""
        self.log.works, self.log.peak = [], 0
        self.step()
        assert not self.log.live, "activations outlive the step"
        return self.log.works, self.log.peak


class Listener:
    """In place of an engine."""

    def expect_passes(self, count: int) -> None:
        pass


class Ours(Contestant):
    executor_class = Executor

    def __init__(self, groups: ProcessGroups, actions: list[Action], placement: Placement, *sizes: Any) -> None:
        super().__init__(placement, groups.place.pp, *sizes)
        self.actions = actions
        self.executor = self.executor_class(list(self.stages.values()), placement, groups, SHAPE, torch.float64, CPU)

    def step(self) -> None:
        self.executor.run(self.actions, self.micro_batches.split(1), Listener())


class BlockingExecutor(Executor):
    """Goes on only when what it sent has arrived: what the real one must not do."""

    def _act(self, action: Action, micro_batch: Any, mailbox: Mailbox, outputs: list[Tensor], train: bool) -> None:
        super()._act(action, micro_batch, mailbox, outputs, train)
        for lane in mailbox.sending.values():
            while lane:
                lane.popleft().work.wait()
                sleep_until(now() + self.chunks[action.chunk].link_seconds)


class Blocking(Ours):
    executor_class = BlockingExecutor


class Torch(Contestant):
    """torch.distributed.pipelining on the same stages. Its first stage makes nothing in I and all of it in W."""

    def __init__(self, name: str, rank: int, placement: Placement, micro_batches: int, *sizes: Any) -> None:
        super().__init__(placement, rank, micro_batches, *sizes)
        x, loss = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in (SHAPE, ()))
        stages = [
            PipelineStage(stage, n, placement.num_stages, CPU, input_args=x, output_args=loss if stage.is_last else x)
            for n, stage in self.stages.items()
        ]
        make, _ = TORCH_SCHEDULES[name]
        self.schedule = make(stages, micro_batches, loss_fn=lambda output, target: output, scale_grads=False)

    def step(self) -> None:
        inputs = [self.micro_batches] if 0 in self.stages else []
        self.schedule.step(*inputs, target=self.micro_batches, return_outputs=False)
