"""The frame of every program: who am I, errors in one line, and a log file per rank."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from parallel import launch as launching
from parallel.checkpoint.save import FailedElsewhere
from parallel.collectives import all_reduce
from parallel.errors import (
    CheckpointError,
    ConfigError,
    CorruptedStateError,
    DataError,
    LaunchError,
    LostContactError,
    UserError,
)
from parallel.groups import Axis
from parallel.host_copy import host_readable
from parallel.launch import Launch

# exit codes, those of sysexits.h; 0 is done, others than these a defect or a signal
USER_ERROR = 78  # its user has to mend something: starting it again would not help
STOPPED = 75  # asked to stop, and its state is saved: start it again
LOST = 69  # ranks did not come, or went: start it again
CORRUPTED = 71  # this rank's state is not that of its copies: start it again, and mind its hardware
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
LOGGER = "megatron_llama"
LOCAL_RANK_FLAG = "--local_rank="

Result = TypeVar("Result")


def run_program(main: Callable[[Launch], int]) -> int:
    """Call `main` and return its exit code. A UserError becomes one line, whichever rank raises it."""
    code = None
    try:
        code = _exit_code(main)
    finally:
        launching.stop(lost=code == LOST)
    if code == USER_ERROR:
        launching.advise_against_restart()
    return code


def _exit_code(main: Callable[[Launch], int]) -> int:
    launch = Launch()
    try:
        launch = launching.detect()
        return main(launch)
    except (SpokenError, FailedElsewhere):
        return USER_ERROR
    except UserError as error:
        if _speaks(launch, error):
            say(error, launch.rank)
        return _code_of(error, launch)
    except KeyboardInterrupt:
        return INTERRUPTED


def _code_of(error: UserError, launch: Launch) -> int:
    """Of ranks that end because another's state is corrupt, only that one says so: it is the one that a report is to name."""
    if isinstance(error, CorruptedStateError):
        return CORRUPTED if launch.rank in error.ranks else LOST
    return LOST if isinstance(error, LostContactError) else USER_ERROR


def command_line(launch: Launch) -> list[str]:
    """The arguments, without the `--local_rank=N` that DeepSpeed's launcher adds. Raises LaunchError where N is not ours."""
    argv = sys.argv[1:]
    added = [word for word in argv if word.startswith(LOCAL_RANK_FLAG)]
    if any(word != f"{LOCAL_RANK_FLAG}{launch.local_rank}" for word in added):
        raise LaunchError(
            f"{added[0]} contradicts the environment of {launch.launcher}, which says {launch.local_rank}: leave the flag away"
        )
    return [word for word in argv if word not in added]


def asks_for_help(argv: list[str]) -> bool:
    """Whether the arguments ask for help, which rank 0 alone prints."""
    return "--help" in argv or "-h" in argv


def _speaks(launch: Launch, error: UserError) -> bool:
    """Whether this rank prints an error that the ranks have not agreed on.

    What is wrong with the settings or with a node, every rank of the node finds alike: its first one says it. Once the
    ranks work together, a bad file may be seen by one rank alone.
    """
    if isinstance(error, CorruptedStateError):  # which the ranks have agreed on
        return launch.rank == 0
    found_by_one = isinstance(error, DataError | CheckpointError | LostContactError)
    return launch.local_rank == 0 or (dist.is_initialized() and found_by_one)


def say(error: UserError | None, rank: int) -> None:
    """Print an error, as every program does."""
    where = f" (rank {rank})" if rank else ""
    print(f"error{where}: {error}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Flags of a program that opens a checkpoint: mistakes are ConfigErrors, `--section.field value` is handed on."""

    def __init__(self, program: str, description: str) -> None:
        description += " Further --section.field flags override the checkpoint's configuration."
        super().__init__(prog=f"python -m megatron_llama.{program}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the flags)")

    def split(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The program's own arguments, and the flags of the configuration. Raises ConfigError."""
        arguments, overrides = self.parse_known_args(argv)
        remaining = iter(overrides)
        for word in remaining:
            flag, equals, _ = word.partition("=")
            if not flag.startswith("--"):
                self.error(f"unexpected argument {word!r}: put a value with spaces in quotes")
            if "." not in flag:
                known = [name for name in self._option_string_actions if name.startswith("--")]
                closest = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)[0]
                self.error(f"unknown flag {flag}; the closest known one is {closest}")
            if not equals:
                next(remaining, None)
        return arguments, overrides


class SpokenError(UserError):
    """A UserError that the rank in charge has printed."""


def agree(work: Callable[[], Result], world: Axis, device: torch.device) -> Result:
    """Do `work` on every rank. Where any rank finds a UserError, the lowest such rank prints it and all give up.

    Without it, a file that only one node lacks would leave the others waiting.
    """
    results, error = [], None
    try:
        results.append(work())
    except UserError as found:
        error = found
    failed = torch.zeros(world.size, dtype=torch.int64, device=host_readable(device))
    failed[world.rank] = error is not None
    ranks = all_reduce(failed, world).nonzero().flatten().tolist()
    if not ranks:
        return results[0]
    if world.rank == ranks[0]:
        say(error, world.rank)
    raise SpokenError(str(error))


def open_log(run_directory: Path, rank: int) -> logging.Logger:
    """The logger of this rank: its own file `logs/rank-NNNNN.log`, and standard output on rank 0. Raises OSError."""
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
