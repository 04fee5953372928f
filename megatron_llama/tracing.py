"""Traces of a run's first steps: which rank did what when (`log.trace_steps`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_llama.config import LogConfig
from parallel.pipeline.executor import Executor
from parallel.pipeline.trace import Trace


class StepTracer:
    """Writes RUN/traces/step_N.json for `log.trace_steps` steps of this process, from its second on: the first one warms up.

    Writing waits for the device and for all ranks; metrics.jsonl counts it as part of the traced step's time.
    """

    def __init__(self, config: LogConfig, executor: Executor) -> None:
        self.executor, self.directory = executor, Path(config.directory) / "traces"
        self.wanted, self.done = config.trace_steps, 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`; all ranks together."""
        is_traced = 1 <= self.done <= self.wanted
        self.done += 1
        if not is_traced:
            yield
            return
        executor = self.executor
        executor.trace = Trace(executor.groups, executor.placement, executor.device)
        yield
        executor.trace.write(self.directory / f"step_{number}.json")
        executor.trace = None
