"""The training loop: batches, steps, metrics, evaluation, checkpoints, and a clean stop."""

from __future__ import annotations

import logging
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llama.config import RunConfig, tokens_per_step, total_steps
from megatron_llama.data.loader import Loader, Prefetcher
from megatron_llama.evaluate import Evaluator
from megatron_llama.flops import dense_peak_flops, flops_per_token, model_flops_utilization
from megatron_llama.lr_schedule import learning_rate
from megatron_llama.metrics import MetricsWriter, StepRecord
from megatron_llama.program import LOGGER
from megatron_llama.progress import Progress
from megatron_llama.state import Position
from megatron_llama.step import TrainStep
from parallel.zero.native import NativeZero, StepInfo

SAVED_BY_STOP = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Set by SIGTERM or SIGUSR1; the ranks agree on it through the step's sums, so one rank's signal stops all."""

    def __init__(self) -> None:
        self.wished = False

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in SAVED_BY_STOP}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.wished = True


class Moment:
    """A point in the device's work: an event on a GPU, the time on a CPU, which does its work when it is told."""

    def __init__(self, device: torch.device) -> None:
        self._event, self._seconds = None, time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Return when the device has got there."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds of the device's work from `earlier` to here; both must have been waited for."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000.0  # milliseconds
        return self._seconds - earlier._seconds


class Verdict:
    """The numbers of one step on their way to the host: [loss, ranks that wish to stop, gradient norm, skipped]."""

    def __init__(self, step: int, rate: float, info: StepInfo) -> None:
        self.step, self.rate = step, rate
        values = torch.cat([info.sums, torch.stack([info.norm, info.skipped.double()])])
        self._values: Tensor = values
        if values.is_cuda:
            self._values = torch.empty(4, dtype=torch.float64, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
        self.finished = Moment(values.device)

    def read(self) -> list[float]:
        """Wait for this step (not for later ones) and return its numbers."""
        self.finished.wait()
        return self._values.tolist()


@dataclass
class Interval:
    """What has gathered since the last progress line."""

    steps: int = 0
    seconds: float = 0.0
    skipped: int = 0


class Trainer:
    """Runs a training from `position` to its end, to `train.exit_step`, or until it is asked to stop.

    `save(position)` and `evaluate()` are called on all ranks together. The verdict of a step is read while the next one
    runs, so that the host never waits for the step that it has just launched.
    """

    def __init__(
        self,
        config: RunConfig,
        step: TrainStep,
        engine: NativeZero,
        loader: Loader,
        position: Position,
        save: Callable[[Position], object],
        evaluator: Evaluator | None,
        metrics: MetricsWriter | None,
    ) -> None:
        self.config, self.step, self.engine, self.loader = config, step, engine, loader
        self.position, self.save, self.evaluator, self.metrics = position, save, evaluator, metrics
        self.last_step = total_steps(config)
        self.end_step = min(self.last_step, config.train.exit_step or self.last_step)
        self.tokens_per_step = tokens_per_step(config)
        device, world = step.runtime.device, step.runtime.groups.topology.world_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.peak = dense_peak_flops(name, config.train.dtype)
        self.flops_per_token = flops_per_token(config.model, config.train.sequence_length)
        self.world_size = world
        self.progress = Progress(self.last_step, self.tokens_per_step, self.flops_per_token, world, self.peak)
        self.log = logging.getLogger(LOGGER)
        self.interval = Interval()
        self.saved_step = position.step

    def run(self) -> bool:
        """Train. Returns whether the run reached its end (False: it was asked to stop, and has saved)."""
        batch_size = self.config.train.global_batch_size
        end_sample = self.position.samples + (self.end_step - self.position.step) * batch_size
        pending: Verdict | None = None
        stopped = False
        with StopRequest() as stop, Prefetcher(self.loader, self.position.samples, end_sample) as batches:
            self._since = Moment(self.step.runtime.device)  # where the step under way began
            ahead = self._prepare_next(batches)
            while ahead is not None and not stopped:
                batch, ahead = ahead, self._prepare_next(batches)
                rate = learning_rate(self.position.step, self.config.optimizer, self.last_step)
                info = self.step.run(batch, rate, stop.wished)
                step = self.position.step + 1
                self.position = Position(
                    step, self.position.samples + batch_size, self.position.tokens + self.tokens_per_step
                )
                if pending is not None:
                    stopped = self._report(pending)
                pending = Verdict(step, rate, info)
                if self._pauses_after(step) or ahead is None:
                    stopped = self._report(pending) or stopped
                    pending = None
                    self._pause(step, last=ahead is None)
            if pending is not None:
                self._report(pending)
        if stopped and self.position.step < self.end_step:
            self.log.info(f"asked to stop after step {self.position.step}")
            if self.saved_step != self.position.step:
                self._save()
            return False
        return True

    def _prepare_next(self, batches: Prefetcher):
        micro_batches = next(batches, None)
        return None if micro_batches is None else self.step.prepare(micro_batches)

    def _report(self, verdict: Verdict) -> bool:
        """Record a finished step; returns whether the ranks have agreed to stop."""
        loss, wishes, norm, skipped = verdict.read()
        seconds, self._since = verdict.finished.seconds_since(self._since), verdict.finished
        speed = self.tokens_per_step / seconds
        self.interval.steps += 1
        self.interval.seconds += seconds
        self.interval.skipped += int(skipped)
        if self.metrics is not None:
            mfu = model_flops_utilization(speed, self.flops_per_token, self.world_size, self.peak)
            tokens = self.position.tokens - (self.position.step - verdict.step) * self.tokens_per_step
            record = StepRecord(verdict.step, loss, norm, verdict.rate, tokens, seconds, speed, mfu)
            self.metrics.write_step(record, **({"skipped": True} if skipped else {}))
            if verdict.step % self.config.log.every == 0 or verdict.step == self.end_step:
                done = self.interval
                self.progress.report(
                    verdict.step, loss, verdict.rate, norm, done.steps, done.seconds, self._memory_bytes(), done.skipped
                )
        if verdict.step % self.config.log.every == 0:
            self.interval = Interval()
        return wishes > 0

    def _memory_bytes(self) -> int:
        """The most memory this rank has held: on the GPU, or resident in main memory."""
        device = self.step.runtime.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB

    def _pauses_after(self, step: int) -> bool:
        train, checkpoint = self.config.train, self.config.checkpoint
        evaluates = self.evaluator is not None and train.evaluate_every and step % train.evaluate_every == 0
        return bool(evaluates or (checkpoint.save_every and step % checkpoint.save_every == 0))

    def _pause(self, step: int, last: bool) -> None:
        """Evaluate and save where it is due; their time does not count as a step's."""
        train, checkpoint = self.config.train, self.config.checkpoint
        if self.evaluator is not None and (last or (train.evaluate_every and step % train.evaluate_every == 0)):
            self.engine.finish()
            loss = self.evaluator.loss()
            if self.metrics is not None:
                self.metrics.write_evaluation(step, loss)
                self.log.info(f"step {step}: held-out loss {loss:.4f} over {self.evaluator.tokens:,} tokens")
        if last or (checkpoint.save_every and step % checkpoint.save_every == 0):
            self._save()
        self._since = Moment(self.step.runtime.device)

    def _save(self) -> None:
        if self.metrics is not None:
            self.metrics.flush()
        self.save(self.position)
        self.saved_step = self.position.step
