"""Where a run starts: at its newest good checkpoint, at one that was named, at another run's weights, or from nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_llama.config import RunConfig, checkpoint_directory
from megatron_llama.program import LOGGER
from megatron_llama.runtime import Runtime
from megatron_llama.state import Position, fresh_position, load_state, start_from_weights, voter
from megatron_llama.watching.watch import Watch
from parallel.checkpoint.manifest import DamagedError
from parallel.checkpoint.readers import GroupReaders, Readers
from parallel.checkpoint.recovery import confirm_damage, newest_good_step, quarantine
from parallel.checkpoint.retention import mark_verified
from parallel.checkpoint.steps import STEP_NAME, committed_steps, resolve_checkpoint, step_directory
from parallel.errors import ConfigError
from parallel.zero.engine import Engine


def resume(runtime: Runtime, engine: Engine, watch: Watch) -> Position:
    """Fill model, optimizer and `watch` as the configuration asks for, and return where the run is. All ranks call it together.

    Raises CheckpointError and ConfigError, on all ranks alike.
    """
    config = runtime.config
    with _reading_together(runtime) as readers:
        position = _start(config, runtime, engine, watch, readers)
        readers.together(lambda: _refuse_later_steps(checkpoint_directory(config), position))
        return position


def go_back(runtime: Runtime, engine: Engine, watch: Watch) -> Position | None:
    """Load the run's newest good checkpoint during the run; None where there is none. All ranks call it together.

    Raises CheckpointError on all ranks alike.
    """
    with _reading_together(runtime) as readers:
        return _recover(checkpoint_directory(runtime.config), runtime, engine, watch, readers)


@contextmanager
def _reading_together(runtime: Runtime) -> Iterator[Readers]:
    readers = GroupReaders(heartbeat=runtime.groups.ledger.heartbeat) if dist.is_initialized() else Readers()
    try:
        yield readers
    finally:
        readers.close()


def _start(config: RunConfig, runtime: Runtime, engine: Engine, watch: Watch, readers: Readers) -> Position:
    load, weights_from = config.checkpoint.load, config.checkpoint.weights_from
    if load not in ("auto", "none"):
        directory = readers.together(lambda: resolve_checkpoint(Path(load)))
        return load_state(directory, runtime, engine, readers, watch)
    if load == "auto":
        position = _recover(checkpoint_directory(config), runtime, engine, watch, readers)
        if position is not None:
            return position
    if weights_from:
        directory = readers.together(lambda: resolve_checkpoint(Path(weights_from), groups=("weights",)))
        start_from_weights(directory, runtime, engine, readers)
        logging.getLogger(LOGGER).info(f"weights from {directory}, with a new optimizer")
    return fresh_position(config)


def _recover(root: Path, runtime: Runtime, engine: Engine, watch: Watch, readers: Readers) -> Position | None:
    """Load the newest good step under `root`, and put damaged newer ones aside; None where there is no step at all.

    Every block is verified as it is read, and together the ranks read all of them: so verifying first would only read
    everything twice. Damage that is found so late costs a load.
    """
    while True:
        directory = _newest(root, runtime, readers)
        if directory is None:
            return None
        try:
            position = load_state(directory, runtime, engine, readers, watch)
        except DamagedError as error:
            found = error
        else:
            if readers.rank == 0:
                mark_verified(directory)
            return position
        readers.together(lambda directory=directory, found=found: _set_aside(directory, found, readers.rank))


def _newest(root: Path, runtime: Runtime, readers: Readers) -> Path | None:
    """The newest step that looks good to rank 0, which puts aside those that do not."""
    step = -1

    def look() -> None:
        nonlocal step
        directory, damaged = newest_good_step(root)
        for path, error in damaged:
            _report(path, error)
        step = -1 if directory is None else int(STEP_NAME.fullmatch(directory.name)[1])

    readers.together(lambda: look() if readers.rank == 0 else None)
    step = voter(runtime).broadcast_int(step)
    return None if step < 0 else step_directory(root, step)


def _set_aside(directory: Path, error: DamagedError, rank: int) -> None:
    if rank == 0:
        confirm_damage(directory, error)
        _report(directory, error)


def _report(directory: Path, error: DamagedError) -> None:
    """Put a damaged step aside, and say so."""
    aside = quarantine(directory, error)
    logging.getLogger(LOGGER).warning(f"DAMAGED CHECKPOINT, now {aside}: {error}. Going on from an older one")


def _refuse_later_steps(root: Path, position: Position) -> None:
    later = [step for step in committed_steps(root) if step > position.step]
    if later:
        raise ConfigError(
            f"this run starts at step {position.step}, and {root} already holds step {later[-1]}, which it would have to "
            "overwrite: set --checkpoint.load auto to go on from there, or another --log.directory"
        )
