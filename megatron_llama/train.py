"""The main program: pretrain a LLaMA.

    python -m megatron_llama.train --config FILE.toml [--section.field value ...]      (or under torchrun -m)

Read it first: every object of a run is built here, in order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

import megatron_llama
from megatron_llama.config import (
    RunConfig,
    checkpoint_directory,
    load_config,
    micro_batches_per_step,
    to_toml,
    total_steps,
    validate,
)
from megatron_llama.data.blend import Blend, build_blend
from megatron_llama.data.loader import Loader
from megatron_llama.data.mixture import table_lines
from megatron_llama.data.training_data import TrainingData, open_training_data
from megatron_llama.evaluate import Evaluator
from megatron_llama.flops import parameter_count
from megatron_llama.metrics import MetricsWriter
from megatron_llama.program import STOPPED, agree, asks_for_help, open_log, run_program
from megatron_llama.runtime import Runtime, build_runtime
from megatron_llama.state import (
    TOKENIZER_FILE,
    Position,
    find_checkpoint,
    fresh_position,
    load_state,
    save_state,
    stored_position,
)
from megatron_llama.step import TrainStep, optimizer_settings
from megatron_llama.tokenizer import Tokenizer
from megatron_llama.trainer import Trainer
from parallel import launch as launching
from parallel.checkpoint.steps import committed_steps
from parallel.errors import ConfigError
from parallel.launch import Launch
from parallel.zero.native import NativeZero

TIMEOUT = timedelta(minutes=10)

Result = TypeVar("Result")


def main(launch: Launch, argv: list[str]) -> int:
    """Train as the arguments ask for. Returns 0 (done, or nothing left to do) or 75 (stopped with its state saved)."""
    if launch.rank and asks_for_help(argv):
        return 0
    config = load_config(argv)
    if "--print-config" in argv:
        if launch.rank == 0:
            print(to_toml(config), end="")
        return 0
    validate(config, launch.world_size)
    device = launching.choose_device(launch, config.train.device)
    launching.start(launch, device, TIMEOUT)
    runtime = build_runtime(config, launch.rank, launch.world_size, device, TIMEOUT)
    world, data = runtime.groups.world, runtime.groups.data
    train_data, valid_data, tokenizer = agree(lambda: _open_data(config), world, device)
    log = agree(lambda: _in_run_directory(config, lambda directory: open_log(directory, launch.rank)), world, device)

    engine = NativeZero(runtime.chunks, runtime.groups, optimizer_settings(config))
    position = agree(lambda: _resume(config, runtime, engine), world, device)
    if position.step >= total_steps(config):  # a job that was submitted once more
        log.info(f"step {position.step} of {total_steps(config)}: this run is complete; raise --train.steps to go on")
        return 0
    step = TrainStep(runtime, engine, micro_batches_per_step(config, launch.world_size))
    log.info(describe(launch, runtime, engine, step, train_data, position))

    def record(directory: Path) -> MetricsWriter | None:
        if launch.rank:
            return None
        (directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
        if tokenizer is not None:
            (directory / TOKENIZER_FILE).write_bytes(tokenizer)
        return MetricsWriter(directory, position.step)

    metrics = agree(lambda: _in_run_directory(config, record), world, device)
    train = config.train
    batch = train.micro_batch_size, train.global_batch_size
    mask = config.data.document_mask
    loader = Loader(train_data.blend, train.sequence_length, *batch, data.rank, data.size, mask)
    evaluator = None
    if valid_data is not None:
        make_evaluator = partial(Evaluator, runtime, valid_data, train.evaluate_tokens, train.micro_batch_size, mask)
        evaluator = agree(make_evaluator, world, device)

    def save(position: Position) -> None:
        directory = save_state(runtime, engine, position, train_data.state(position.samples), tokenizer)
        log.info(f"step {position.step}: saved {directory}")

    finished = Trainer(config, step, engine, loader, position, save, evaluator, metrics).run()
    if metrics is not None:
        metrics.close()
    return 0 if finished else STOPPED


def _open_data(config: RunConfig) -> tuple[TrainingData, Blend | None, bytes | None]:
    """Training data, held-out data, and the tokenizer's bytes. Raises DataError, ConfigError and CheckpointError."""
    data, model, length = config.data, config.model, config.train.sequence_length
    start, stored = stored_position(config)
    end_sample = start.samples + max(0, total_steps(config) - start.step) * config.train.global_batch_size
    train = open_training_data(data, length, model.vocab_size, end_sample, start.samples, stored)
    valid = None
    if data.valid:
        entries = [(s.prefix, s.weight) for s in data.valid]
        valid = build_blend(entries, length, data.seed, model.vocab_size, shuffle=False)
    if not data.tokenizer:
        return train, valid, None
    tokenizer = Tokenizer(data.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"data.tokenizer {data.tokenizer} has {tokenizer.vocab_size} pieces, more than model.vocab_size = "
            f"{model.vocab_size}: set --model.vocab_size {tokenizer.vocab_size}"
        )
    return train, valid, Path(data.tokenizer).read_bytes()


def _in_run_directory(config: RunConfig, work: Callable[[Path], Result]) -> Result:
    """Do what writes to the run directory. Raises ConfigError where it cannot be written."""
    try:
        return work(Path(config.log.directory))
    except OSError as error:
        raise ConfigError(
            f"log.directory = {config.log.directory} cannot be written: {error.filename}: {error.strerror}; "
            "set --log.directory to a folder that can be made"
        ) from error


def _resume(config: RunConfig, runtime: Runtime, engine: NativeZero) -> Position:
    """Where to start from: the checkpoint that was asked for or found, else the beginning."""
    directory = find_checkpoint(config)
    position = fresh_position(config) if directory is None else load_state(directory, runtime, engine)
    root = checkpoint_directory(config)
    later = [step for step in committed_steps(root) if step > position.step]
    if later:
        raise ConfigError(
            f"this run starts at step {position.step}, and {root} already holds step {later[-1]}, which it would have to "
            "overwrite: set --checkpoint.load auto to go on from there, or another --log.directory"
        )
    return position


def describe(
    launch: Launch, runtime: Runtime, engine: NativeZero, step: TrainStep, data: TrainingData, position: Position
) -> str:
    """What is about to run, for the log."""
    config, groups, report = runtime.config, runtime.groups, step.report
    model, train, parallel = config.model, config.train, config.parallel
    split = ", sequence parallel" if runtime.chunks[0].context.sequence_parallel else ""
    stages = "; ".join(
        f"stage {s} (pp rank {runtime.placement.rank(s)}): layers {layers.start}-{layers.stop - 1}"
        for s, layers in enumerate(runtime.layers)
    )
    buckets = engine.buckets
    state_bytes = sum(b.weights.numel() * b.weights.element_size() + 4 * b.main_grad.numel() for b in buckets)
    state_bytes += sum(4 * b.master.numel() * (3 if b.weights.dtype != torch.float32 else 2) for b in buckets)
    peaks = ", ".join(map(str, report.peak_activations))
    micro_batches = train.global_batch_size // (train.micro_batch_size * groups.data.size)
    tokens = train.global_batch_size * train.sequence_length
    return "\n".join(
        [
            f"Megatron-LLaMA {megatron_llama.__version__}, torch {torch.__version__}, {launch.world_size} x "
            f"{runtime.device.type} ({launch.launcher})",
            f"model     {model.preset or 'custom'}: {parameter_count(model):,} parameters, {model.num_layers} layers, "
            f"hidden {model.hidden_size}, {model.num_heads} heads, {model.num_kv_heads} kv heads, {train.dtype}",
            f"grid      {groups.topology}{split}",
            f"layers    {stages}",
            f"schedule  {parallel.schedule}, {micro_batches} micro-batches of {train.micro_batch_size}; bubble "
            f"{report.bubble:.1%} where a backward costs two forwards; activations in flight per stage: {peaks}; "
            f"recompute {parallel.recompute}",
            f"optimizer {config.optimizer.name}, ZeRO stage {parallel.zero_stage} over {groups.data.size} data ranks, "
            f"{len(buckets)} buckets; weights, gradients and optimizer state of this rank: {state_bytes / 2**20:,.1f} MiB",
            f"kernels   {runtime.kernels}",
            f"data      {len(data.rows)} sources, {data.blend.num_windows:,} windows of {train.sequence_length} tokens, order "
            f"{config.data.order}; at the end of the run:",
            *(f"          {line}" for line in [*table_lines(data.rows), *data.notes]),
            f"steps     {total_steps(config):,} of {train.global_batch_size} sequences = {tokens:,} tokens; "
            f"starting at step {position.step}",
        ]
    )


if __name__ == "__main__":
    sys.exit(run_program(lambda launch: main(launch, sys.argv[1:])))
