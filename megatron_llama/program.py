"""The frame of every program: who am I, errors in one line, and a log file per rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from parallel import launch as launching
from parallel.collectives import all_reduce
from parallel.errors import UserError
from parallel.groups import Axis
from parallel.launch import Launch

USER_ERROR = 2  # exit code of a run that its user can mend
STOPPED = 75  # exit code of a run that was asked to stop and has saved its state: start it again
LOGGER = "megatron_llama"

Result = TypeVar("Result")


def run_program(main: Callable[[Launch], int]) -> int:
    """Call `main` and return its exit code. A UserError becomes one line from the lowest rank that raised it."""
    launch = Launch()
    try:
        launch = launching.detect()
        return main(launch)
    except SpokenError:
        return USER_ERROR
    except UserError as error:
        if launch.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    finally:
        launching.stop()


class SpokenError(UserError):
    """A UserError that the rank in charge has printed."""


def agree(work: Callable[[], Result], world: Axis, device: torch.device) -> Result:
    """Do `work` on every rank. Where any rank finds a UserError, the lowest such rank prints it and all give up.

    Without it, a file that only one node lacks would leave the others waiting.
    """
    result, error = None, None
    try:
        result = work()
    except UserError as found:
        error = found
    failed = torch.zeros(world.size, dtype=torch.int64, device=device)
    failed[world.rank] = error is not None
    ranks = all_reduce(failed, world).nonzero().flatten().tolist()
    if not ranks:
        assert result is not None
        return result
    if world.rank == ranks[0]:
        where = f" (rank {world.rank})" if world.rank else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    raise SpokenError(str(error))


def open_log(run_directory: Path, rank: int) -> logging.Logger:
    """The logger of this rank: its own file `logs/rank-NNNNN.log`, and standard output on rank 0."""
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    (run_directory / "logs").mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(run_directory / "logs" / f"rank-{rank:05d}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.handlers = [file]
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(console)
    return logger
