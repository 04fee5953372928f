"""The main program: pretrain a LLaMA.

    python -m megatron_llama.train --config FILE.toml [--section.field value ...]      (or under torchrun -m)

Read it first: every object of a run is built here, in order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

import megatron_llama
from megatron_llama.code_version import code_version
from megatron_llama.config import (
    RunConfig,
    load_config,
    masks_documents,
    micro_batches_per_step,
    to_toml,
    total_steps,
    validate,
)
from megatron_llama.config.rules_memory import float8_advice
from megatron_llama.data.held_out import HeldOutSource, open_held_out
from megatron_llama.data.mixture import table_lines
from megatron_llama.data.training_data import TrainingData
from megatron_llama.evaluate import Evaluator
from megatron_llama.flops import parameter_count
from megatron_llama.forecast import Forecast, make_forecast
from megatron_llama.metrics import MetricsWriter
from megatron_llama.pipeline_plan import memory_settings, settle_schedule
from megatron_llama.program import STOPPED, agree, asks_for_help, command_line, open_log, run_program
from megatron_llama.resume import resume
from megatron_llama.run_data import make_loader, open_run_data
from megatron_llama.run_lock import lock_run
from megatron_llama.runtime import Runtime, build_runtime
from megatron_llama.saving import Saver
from megatron_llama.state import TOKENIZER_FILE, Position
from megatron_llama.step import TrainStep, make_engine
from megatron_llama.tokenizer import Tokenizer
from megatron_llama.trainer import Trainer
from megatron_llama.watching.watch import Watch
from parallel import launch as launching
from parallel.collectives import contact_kept
from parallel.errors import ConfigError
from parallel.heartbeat import WAITS
from parallel.launch import Launch
from parallel.zero.engine import Engine

Result = TypeVar("Result")


def main(launch: Launch, argv: list[str]) -> int:
    """Train as the arguments ask for. Returns 0 (done, or nothing left to do) or 75 (stopped with its state saved).

    Other exit codes: 78 (something is to be mended first), 69 (another rank has died or does not answer), 71 (this
    rank's state was found to be corrupt: a restart mends it).
    """
    if launch.rank and asks_for_help(argv):
        return 0
    if "--dry-run" in argv:
        from megatron_llama.dry_run.run import dry_run  # whose parts of torch take 0.3 s of a start

        return dry_run(launch, argv)
    config = load_config(argv)
    if "--print-config" in argv:
        if launch.rank == 0:
            print(to_toml(config), end="")
        return 0
    validate(config, launch.world_size)
    settled = settle_schedule(config, launch.world_size)
    device = launching.choose_device(launch, config.train.device)
    timeout = timedelta(seconds=config.train.start_timeout)
    heartbeat = launching.open_heartbeat(launch)
    heartbeat.act(f"{WAITS}all ranks")
    launching.start(launch, device, timeout)
    runtime = build_runtime(settled, launch.rank, launch.world_size, device, timeout)
    runtime.groups.ledger.heartbeat = heartbeat
    world, data = runtime.groups.world, runtime.groups.data
    forecast = agree(lambda: make_forecast(settled, launch, device) if launch.rank == 0 else None, world, device)
    train_data, held_out, tokenizer, data_position = agree(lambda: _open_data(config), world, device)
    lock = agree(lambda: _in_run_directory(config, lambda _: ExitStack() if launch.rank else lock_run(config)), world, device)
    log = agree(lambda: _in_run_directory(config, lambda directory: open_log(directory, launch.rank)), world, device)

    heartbeat.enter("load")
    engine = make_engine(runtime)
    watch = Watch(config.watch, device)
    position = agree(lambda: resume(runtime, engine, watch), world, device)
    if position != data_position:  # the newest checkpoint was found damaged, and an older one was taken
        train_data, held_out, tokenizer, _ = agree(lambda: _open_data(config), world, device)
    if position.step >= total_steps(config):  # a job that was submitted once more
        log.info(f"step {position.step} of {total_steps(config)}: this run is complete; raise --train.steps to go on")
        return 0
    step = TrainStep(runtime, engine, micro_batches_per_step(config, launch.world_size), watch)
    log.info(describe(launch, runtime, engine, step, train_data, position, forecast))

    def record(directory: Path) -> MetricsWriter | None:
        if launch.rank:
            return None
        (directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
        if tokenizer is not None:
            (directory / TOKENIZER_FILE).write_bytes(tokenizer)
        metrics = MetricsWriter(directory, position.step)
        if forecast is not None:
            metrics.write_event(position.step, "prediction", hardware=forecast.profile, predicted=forecast.record())
        return metrics

    metrics = agree(lambda: _in_run_directory(config, record), world, device)
    loader = make_loader(config, train_data, data.rank, data.size)
    evaluator = None
    if held_out:
        micro_batch_size, mask = config.train.micro_batch_size, masks_documents(config.data)
        evaluator = agree(lambda: Evaluator(runtime, held_out, micro_batch_size, mask), world, device)

    saver = Saver(runtime, engine, train_data.state, tokenizer, position.step, watch)
    with contact_kept(world):
        finished = Trainer(config, step, engine, loader, position, saver, evaluator, metrics, forecast).run()
    heartbeat.enter("end")
    if metrics is not None:
        metrics.close()
    lock.close()
    return 0 if finished else STOPPED


def _open_data(config: RunConfig) -> tuple[TrainingData, list[HeldOutSource], bytes | None, Position]:
    """Training data, held-out data, the tokenizer's bytes, and where the training data goes on.

    Raises DataError, ConfigError and CheckpointError.
    """
    data, model, length = config.data, config.model, config.train.sequence_length
    train, position = open_run_data(config)
    held_out = []
    if data.valid:
        entries = [(s.prefix, s.weight) for s in data.valid]
        held_out = open_held_out(entries, length, model.vocab_size, config.train.evaluate_tokens, "data.valid")
    if not data.tokenizer:
        return train, held_out, None, position
    tokenizer = Tokenizer(data.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"data.tokenizer {data.tokenizer} has {tokenizer.vocab_size} pieces, more than model.vocab_size = "
            f"{model.vocab_size}: set --model.vocab_size {tokenizer.vocab_size}"
        )
    return train, held_out, Path(data.tokenizer).read_bytes(), position


def _in_run_directory(config: RunConfig, work: Callable[[Path], Result]) -> Result:
    """Do what writes to the run directory. Raises ConfigError where it cannot be written."""
    try:
        return work(Path(config.log.directory))
    except OSError as error:
        raise ConfigError(
            f"log.directory = {config.log.directory} cannot be written: {error.filename}: {error.strerror}; "
            "set --log.directory to a folder that can be made"
        ) from error


def describe(
    launch: Launch,
    runtime: Runtime,
    engine: Engine,
    step: TrainStep,
    data: TrainingData,
    position: Position,
    forecast: Forecast | None,
) -> str:
    """What is about to run, for the log; with the forecast where there is one."""
    config, groups, report = runtime.config, runtime.groups, step.report
    model, train, parallel = config.model, config.train, config.parallel
    split = ", sequence parallel" if runtime.chunks[0].context.sequence_parallel else ""
    stages = "; ".join(
        f"stage {s} (pp rank {runtime.placement.rank(s)}): layers {layers.start}-{layers.stop - 1}"
        for s, layers in enumerate(runtime.layers)
    )
    version = code_version() if launch.rank == 0 else megatron_llama.__version__  # (git is not asked 2048 times)
    chunks = f" with {parallel.chunks} chunks" if parallel.chunks > 1 else ""
    peaks = ", ".join(map(str, report.peak_activations))
    micro_batches = train.global_batch_size // (train.micro_batch_size * groups.data.size)
    tokens = train.global_batch_size * train.sequence_length
    return "\n".join(
        [
            f"Megatron-LLaMA {version}, torch {torch.__version__}, {launch.world_size} x "
            f"{runtime.device.type} ({launch.launcher})",
            f"model     {model.preset or 'custom'}: {parameter_count(model):,} parameters, {model.num_layers} layers, "
            f"hidden {model.hidden_size}, {model.num_heads} heads, {model.num_kv_heads} kv heads, {train.dtype}",
            f"grid      {groups.topology}{split}",
            f"layers    {stages}",
            f"schedule  {parallel.schedule}{chunks}, {micro_batches} micro-batches of {train.micro_batch_size}; bubble "
            f"{report.bubble:.1%} by FLOPs; activations in flight per rank: {peaks}, at most "
            f"{max(report.peak_memory):,.3f} GiB; {memory_settings(parallel)}",
            f"optimizer {config.optimizer.name}, {config.zero.engine} ZeRO stage {config.zero.stage} over {groups.data.size} "
            f"data ranks, {len(engine.buckets)} buckets; weights, gradients and optimizer state of this rank: "
            f"{engine.state_bytes / 2**20:,.1f} MiB",
            f"kernels   {runtime.kernels}",
            *(f"advice    {line}" for line in float8_advice(config)),
            f"data      {len(data.rows)} sources, {data.blend.num_windows:,} samples of {train.sequence_length} tokens, order "
            f"{config.data.order}; at the end of the run:",
            *(f"          {line}" for line in [*table_lines(data.rows), *data.notes]),
            f"steps     {total_steps(config):,} of {train.global_batch_size} sequences = {tokens:,} tokens; "
            f"starting at step {position.step}",
            *(forecast.lines() if forecast is not None else []),
        ]
    )


if __name__ == "__main__":
    sys.exit(run_program(lambda launch: main(launch, command_line(launch))))
