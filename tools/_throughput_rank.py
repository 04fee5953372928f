"""One rank of profile_throughput.py: real training steps of a configuration, and where their time goes."""

from __future__ import annotations

import json
import resource
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from _phases import DATA, PHASES, RUN, STANDING, UPDATE, Idle, Recorder, idle_ranks

from megatron_llama.config import DataSource, RunConfig, micro_batches_per_step, validate
from megatron_llama.data.indexed import IndexedDatasetWriter, best_dtype
from megatron_llama.data.loader import Prefetcher
from megatron_llama.lr_schedule import learning_rate
from megatron_llama.pipeline_plan import settle_schedule
from megatron_llama.program import agree
from megatron_llama.run_data import make_loader, open_run_data
from megatron_llama.runtime import Runtime, build_runtime
from megatron_llama.state import Position
from megatron_llama.step import Batch, TrainStep, make_engine
from megatron_llama.verdict import Verdict
from parallel import launch as launching
from parallel.collectives import contact_kept, gather_objects
from parallel.errors import DataError
from parallel.launch import Launch
from parallel.topology import Topology

TOKENS = 200_000  # of a synthetic dataset, at least
SAMPLES = 16  # likewise
CPU_COMPLAINT = "DefaultCPUAllocator"  # in what torch says where main memory is not to be had
PLACEHOLDER = "synthetic"  # the dataset of a configuration that names none


@dataclass(frozen=True)
class Wish:
    """What is to be measured: `steps` steps after `warmup` others. `trace`: a file for the last one's Chrome trace. `profile`:
    a folder for what torch's profiler sees of one more."""

    config: RunConfig
    steps: int
    warmup: int
    trace: Path | None = None
    profile: Path | None = None


@dataclass(frozen=True)
class RankMeasured:
    """What a rank has measured: `phases` are means over the steps, in seconds, by the names of `PHASES`; `cpu_seconds` is what
    a step takes of the CPU, over all threads."""

    rank: int
    host: str
    step_seconds: list[float]
    phases: dict[str, float]
    cpu_seconds: float
    peak_bytes: int

    @property
    def busy_seconds(self) -> float:
        """Of a step: its own work."""
        return sum(seconds for name, seconds in self.phases.items() if name not in STANDING)


@dataclass(frozen=True)
class Measured:
    """What all ranks have measured of a configuration, whose schedule is settled. `losses`, `norms`: of all steps, the first
    ones too, whose seconds are `warmup_seconds`."""

    config: RunConfig
    topology: Topology
    device: str
    launcher: str
    ranks: list[RankMeasured]
    losses: list[float]
    norms: list[float]
    warmup_seconds: list[float]


def prepared(config: RunConfig, steps: int, world_size: int) -> RunConfig:
    """The configuration of so many steps without evaluation, checkpoints or a tokenizer, as `validate` accepts it.

    Raises ConfigError.
    """
    data = replace(config.data, valid=(), tokenizer="")
    if not data.train:
        data = replace(data, train=(DataSource(PLACEHOLDER),), first_sample=0)
    config = replace(
        config,
        data=data,
        optimizer=replace(config.optimizer, warmup_steps=0),
        train=replace(config.train, steps=steps, tokens=0, exit_step=0, evaluate_every=0),
        checkpoint=replace(config.checkpoint, load="none", weights_from=""),
    )
    validate(config, world_size)
    return settle_schedule(config, world_size)


def measure(launch: Launch, wish: Wish) -> Measured | None:
    """Train on every rank. Returns what was measured on rank 0, None on the others. Raises UserError."""
    config = prepared(wish.config, wish.warmup + wish.steps + 2, launch.world_size)  # the next batch is always being read
    device = launching.choose_device(launch, config.train.device)
    timeout = timedelta(seconds=config.train.start_timeout)
    launching.start(launch, device, timeout)
    with tempfile.TemporaryDirectory() as folder, memory_said():
        runtime = build_runtime(config, launch.rank, launch.world_size, device, timeout)
        with contact_kept(runtime.groups.world):
            return _measure(launch, wish, runtime, Path(folder))


class MemoryExhaustedError(DataError):
    """Memory has run out, which one rank alone may find, as it may find bad data."""


@contextmanager
def memory_said() -> Iterator[None]:
    """Inside this context, memory that runs out is a MemoryExhaustedError."""
    try:
        yield
    except RuntimeError as error:  # OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and CPU_COMPLAINT not in str(error):
            raise
        advice = "smaller micro-batches, more recomputation or more shards: tools/plan.py says what fits"
        raise MemoryExhaustedError(f"out of memory: {str(error).splitlines()[0]}; {advice}") from error


def _measure(launch: Launch, wish: Wish, runtime: Runtime, folder: Path) -> Measured | None:
    groups, device = runtime.groups, runtime.device
    config = agree(lambda: _with_data(runtime.config, folder), groups.world, device)
    data, position = agree(lambda: open_run_data(config), groups.world, device)
    loader = make_loader(config, data, groups.data.rank, groups.data.size)
    engine = make_engine(runtime)
    step = TrainStep(runtime, engine, micro_batches_per_step(config, launch.world_size))
    with Prefetcher(loader, position.samples, position.samples + config.train.steps * loader.global_batch_size) as batches:
        training = Training(runtime.config, step, batches)
        training.take(wish.warmup)
        warmup_seconds, _ = training.recorder.read()
        training.recorder.restart()
        cpu = time.process_time()
        training.take(wish.steps)
        cpu_seconds = (time.process_time() - cpu) / wish.steps
        seconds, phases = training.recorder.read()
        idle = _idle(training.recorder, wish.trace, folder, runtime)
        if wish.profile is not None:
            _profile(training, wish.profile)
    engine.finish()
    means = {name: fmean(one[name] for one in phases) for name in set().union(*phases)}
    mine = RankMeasured(
        rank=launch.rank,
        host=socket.gethostname(),
        step_seconds=seconds,
        phases=told_apart(means, phases[-1]["update_collectives"], idle[launch.rank]),
        cpu_seconds=cpu_seconds,
        peak_bytes=_peak_bytes(device),
    )
    ranks = gather_objects(mine, groups.world)
    if launch.rank:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    config = runtime.config
    return Measured(config, groups.topology, name, launch.launcher, ranks, training.losses, training.norms, warmup_seconds)


def _with_data(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration, with random tokens in `folder` where it names no dataset."""
    if config.data.train != (DataSource(PLACEHOLDER),):
        return config
    prefix, vocabulary = folder / PLACEHOLDER, config.model.vocab_size
    count = max(TOKENS, SAMPLES * (config.train.sequence_length + 1))
    with IndexedDatasetWriter(prefix, best_dtype(vocabulary)) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, vocabulary, count))
    return replace(config, data=replace(config.data, train=(DataSource(str(prefix)),)))


class Training:
    """Takes steps as the trainer does: the next batch is prepared before a step, a step's numbers are read during the next."""

    def __init__(self, config: RunConfig, step: TrainStep, batches: Prefetcher) -> None:
        self.config, self.step, self.batches = config, step, batches
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.position = Position()
        runtime = step.runtime
        self.recorder = Recorder(runtime.groups, runtime.placement, runtime.device)
        self.recorder.surround(step.executor, "run", RUN)
        self.recorder.surround(step.engine, "step", UPDATE)
        step.executor.trace, runtime.groups.ledger.clock = self.recorder, self.recorder.clock
        self._ahead = self._next()

    def _next(self) -> Batch:
        return self.step.prepare(next(self.batches))

    def take(self, steps: int) -> None:
        """Make so many steps, and read the numbers of all."""
        pending: Verdict | None = None
        for _ in range(steps):
            self.recorder.begin_step()
            batch = self._ahead
            with self.recorder.region(DATA):
                self._ahead = self._next()
            rate = learning_rate(self.position.step, self.config.optimizer, self.config.train.steps)
            info = self.step.run(batch, rate)
            self._read(pending)
            pending = Verdict(self.position, rate, info, batch.counts[1], self.step.watch.criteria)
            self.position = self.position.after(self.config)
        self.recorder.begin_step()
        self._read(pending)

    def _read(self, verdict: Verdict | None) -> None:
        if verdict is not None:
            numbers = verdict.read()
            self.losses.append(numbers.loss)
            self.norms.append(numbers.grad_norm)


def _profile(training: Training, folder: Path) -> None:
    """One more step, under torch's profiler on rank 0: a trace of its kernels, and seconds by their kind."""
    runtime = training.step.runtime
    if runtime.groups.world.rank:
        training.take(1)
        return
    from _profiling import Profiled  # needs matplotlib

    class OneStep:
        def run(self, number: int) -> tuple[float, float]:
            training.take(1)
            return training.losses[-1], training.norms[-1]

    folder.mkdir(parents=True, exist_ok=True)
    Profiled(OneStep(), folder / "rank-00000", runtime.device.type).run(Profiled.NUMBER)


def _idle(recorder: Recorder, trace: Path | None, folder: Path, runtime: Runtime) -> dict[int, Idle]:
    """Bubbles of the last step, by its trace, which rank 0 makes of all ranks' actions; all ranks together."""
    recorder.keep_last_step()
    path = trace or folder / "trace.json"
    recorder.write(path)
    found = None
    if runtime.groups.world.rank == 0:
        found = idle_ranks(json.loads(path.read_text()), runtime.groups.topology)
    return gather_objects(found, runtime.groups.world)[0]


def told_apart(means: dict[str, float], last_update: float, idle: Idle) -> dict[str, float]:
    """Phases of a step, the waits divided into bubble and the rest as they were in the last step.

    A rank whose actions end before those of its pipeline waits for the others in the update's first collective.
    """
    phases = {name: means.get(name, 0.0) for name in PHASES}
    received, update = means.get("received", 0.0), means.get("update_collectives", 0.0)
    unmade = received * idle.unmade / idle.received if idle.received else 0.0
    tail = update * min(1.0, idle.tail / last_update) if last_update else 0.0
    phases["bubble"] = unmade + tail
    phases["messages"] += received - unmade
    phases["collectives"] += update - tail
    return phases


def _peak_bytes(device: torch.device) -> int:
    """The most that was allocated on the GPU, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB

