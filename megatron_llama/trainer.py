"""The training loop: batches, steps, metrics, evaluation, checkpoints, and a clean stop."""

from __future__ import annotations

import logging
import resource
import signal
import time
from datetime import timedelta

import torch

from megatron_llama.comparison import Comparison
from megatron_llama.config import RunConfig, tokens_per_step, total_steps
from megatron_llama.data.loader import Loader, Prefetcher
from megatron_llama.evaluate import Evaluator
from megatron_llama.flops import dense_peak_flops, model_flops, model_flops_utilization
from megatron_llama.forecast import Forecast
from megatron_llama.lr_schedule import learning_rate
from megatron_llama.metrics import MetricsWriter, StepRecord
from megatron_llama.program import LOGGER
from megatron_llama.progress import Progress
from megatron_llama.saving import Saver
from megatron_llama.state import Position
from megatron_llama.step import Batch, TrainStep
from megatron_llama.tracing import StepTracer
from megatron_llama.verdict import HostSums, Moment, StepNumbers, Verdict
from megatron_llama.watching.integrity import check_replicas
from megatron_llama.watching.remedies import Remedies
from megatron_llama.watching.stragglers import Stragglers
from parallel.zero.engine import Engine

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


class Trainer:
    """Runs a training from `position` to its end, to `train.exit_step`, or until it is asked to stop.

    Ranks save and evaluate together. The verdict of a step is read while the next one runs, so that the host never waits for
    the step that it has just launched.
    """

    def __init__(
        self,
        config: RunConfig,
        step: TrainStep,
        engine: Engine,
        loader: Loader,
        position: Position,
        saver: Saver,
        evaluator: Evaluator | None,
        metrics: MetricsWriter | None,
        forecast: Forecast | None,
    ) -> None:
        self.config, self.step, self.engine, self.loader = config, step, engine, loader
        self.position, self.saver, self.evaluator, self.metrics = position, saver, evaluator, metrics
        self.heartbeat = step.runtime.groups.ledger.heartbeat
        self.tracer = StepTracer(config.log, step.executor)
        self.first_step, self.last_step = position.step + 1, total_steps(config)
        self.end_step = min(self.last_step, config.train.exit_step or self.last_step)
        self.tokens_per_step = tokens_per_step(config)
        device, world = step.runtime.device, step.runtime.groups.topology.world_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.peak = dense_peak_flops(name, config.train.dtype)
        self.world_size = world
        self.remedies = Remedies(step, loader, saver, metrics)
        every, factor = config.watch.straggler_every, config.watch.straggler_factor
        self.stragglers = Stragglers(step.runtime.groups, device, every, factor, metrics)
        self.comparison = Comparison(config, step.runtime.groups, device, engine, forecast, metrics)
        self.progress = Progress(self.last_step, world, self.peak)
        self.log = logging.getLogger(LOGGER)

    def run(self) -> bool:
        """Train. Returns whether the run reached its end (False: it was asked to stop, and has saved)."""
        stopped = False
        with StopRequest() as stop:
            while self.position.step < self.end_step and not stopped:
                stopped = self._train_on(stop)
        if stopped and self.position.step < self.end_step:
            self.log.info(f"asked to stop after step {self.position.step}")
            self._save(last=True)
            return False
        return True

    def _train_on(self, stop: StopRequest) -> bool:
        """Train up to the end of the run, a stop, or a step that has set the run back. Returns whether to stop."""
        end_sample = self.position.samples + (self.end_step - self.position.step) * self.config.train.global_batch_size
        pending: Verdict | None = None
        stopped = False
        with Prefetcher(self.loader, self.position.samples, end_sample) as batches:
            ahead, _ = self._prepare_next(batches)
            self._since = Moment(self.step.runtime.device)  # where the step under way began
            while ahead is not None and not stopped:
                before, step, batch = self.position, self.position.step + 1, ahead
                rate = learning_rate(before.step, self.config.optimizer, self.last_step)
                with self.stragglers.step(step):
                    self.heartbeat.enter("step" if step > self.first_step else "first step", step)
                    ahead, waited = self._prepare_next(batches)
                    sums = HostSums(stop.wished, waited, *self.saver.progress())
                    with self.tracer.step(step):
                        info = self.step.run(batch, rate, sums, step)
                self.position = before.after(self.config)
                if pending is not None:
                    stopped = self._report(pending)
                    if self.position.step < step:
                        return stopped  # the step that was launched since is void
                pending = Verdict(before, rate, info, batch.counts[1], self.step.watch.criteria)
                if self._pauses_after(step) or ahead is None:
                    stopped = self._report(pending) or stopped
                    pending = None
                    if self.position.step < step:
                        return stopped
                    self._pause(step, last=ahead is None)
            if pending is not None:
                self._report(pending)
        return stopped

    def _prepare_next(self, batches: Prefetcher) -> tuple[Batch | None, float]:
        """The next batch, if there is one, and the seconds that the loop waited until it was read."""
        started = time.perf_counter()
        micro_batches = next(batches, None)
        waited = time.perf_counter() - started
        return None if micro_batches is None else self.step.prepare(micro_batches), waited

    def _report(self, verdict: Verdict) -> bool:
        """Record a finished step; returns whether the ranks have agreed to stop.

        Where its numbers are wrong, `position` may be behind later steps afterwards, which are void then.
        """
        numbers = verdict.read()
        if verdict.step == self.first_step:  # kernels are compiled, connections made: from now on nobody is late for long
            self.step.runtime.groups.set_timeout(timedelta(seconds=self.config.train.step_timeout))
        self.saver.hear(numbers.sums.saving)
        self.stragglers.hear(verdict.step)
        outcome = self.remedies.mend(verdict, numbers, self.position)
        self.position = outcome.position
        if outcome.numbers is None:
            self.first_step = self.position.step + 1
            self._since = Moment(self.step.runtime.device)
        else:
            self.step.watch.hear(verdict.step, outcome.numbers.loss, outcome.numbers.grad_norm)
            finished = outcome.verdict.finished
            seconds, self._since = finished.seconds_since(self._since), finished
            if self.metrics is not None:
                self._record(self.metrics, verdict, outcome.numbers, seconds)
            if not self.comparison.done:
                counts = outcome.verdict is verdict and not self._pauses_after(verdict.step - 1)
                waited = outcome.numbers.sums.data_wait_seconds / self.world_size
                self.comparison.hear(verdict.step, seconds, waited, counts)
        return numbers.sums.stop_wishes > 0

    def _record(self, metrics: MetricsWriter, verdict: Verdict, numbers: StepNumbers, seconds: float) -> None:
        """Write a step to the metrics; print a line where one is due."""
        flops = model_flops(self.config.model, self.tokens_per_step, int(numbers.squared_lengths))
        speed = self.tokens_per_step / seconds
        record = StepRecord(
            step=verdict.step,
            loss=numbers.loss,
            grad_norm=numbers.grad_norm,
            learning_rate=verdict.rate,
            tokens=verdict.before.tokens + self.tokens_per_step,
            step_seconds=seconds,
            tokens_per_second=speed,
            data_wait_seconds=numbers.sums.data_wait_seconds / self.world_size,
            mfu=model_flops_utilization(speed, flops / self.tokens_per_step, self.world_size, self.peak),
            loss_scale=numbers.loss_scale,
        )
        metrics.write_step(record, **({"skipped": True} if numbers.skipped else {}))
        self.progress.add(self.tokens_per_step, flops, seconds, record.data_wait_seconds, bool(numbers.skipped))
        if verdict.step % self.config.log.every == 0 or verdict.step == self.end_step:
            self.progress.report(verdict.step, numbers.loss, verdict.rate, numbers.grad_norm, self._memory_bytes())

    def _memory_bytes(self) -> int:
        """The most memory this rank has held: on the GPU, or resident in main memory."""
        device = self.step.runtime.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB

    def _pauses_after(self, step: int) -> bool:
        train, checkpoint = self.config.train, self.config.checkpoint
        evaluates = self.evaluator is not None and train.evaluate_every and step % train.evaluate_every == 0
        return bool(evaluates or (checkpoint.save_every and step % checkpoint.save_every == 0) or self._audits_after(step))

    def _audits_after(self, step: int) -> bool:
        return bool(self.config.watch.audit_every and step % self.config.watch.audit_every == 0)

    def _pause(self, step: int, last: bool) -> None:
        """Evaluate, save and audit where it is due; their time does not count as a step's."""
        train, checkpoint = self.config.train, self.config.checkpoint
        if self.evaluator is not None and (last or (train.evaluate_every and step % train.evaluate_every == 0)):
            self.heartbeat.enter("evaluate", step)
            self.engine.finish()
            evaluation = self.evaluator.evaluate()
            if self.metrics is not None:
                self.metrics.write_evaluation(step, **evaluation.record())
                head = f"step {step}: held-out loss {evaluation.total.loss:.4f} over {evaluation.total.tokens:,} tokens"
                self.log.info("\n    ".join([head, *evaluation.table_lines()]))
        if last or (checkpoint.save_every and step % checkpoint.save_every == 0):
            self._save(last)
        elif self._audits_after(step):
            self._audit()
        self._since = Moment(self.step.runtime.device)

    def _audit(self) -> None:
        self.heartbeat.enter("audit", self.position.step)
        check_replicas(self.step.runtime, self.engine, self.position.step, self.metrics)

    def _save(self, last: bool) -> None:
        """Save, or begin to, unless the state turns out to be corrupt; `last`: return when it is safe."""
        self._audit()
        self.heartbeat.enter("save", self.position.step)
        started = time.perf_counter()
        if self.metrics is not None:
            self.metrics.flush()
        if last:
            self.saver.finish(self.position)
        elif not self.saver.save(self.position):
            return
        self.step.state_copied = self.saver.state_copied
        if self.metrics is not None:
            self.metrics.write_checkpoint(self.position.step, time.perf_counter() - started)
