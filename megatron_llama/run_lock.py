"""One training per run directory: its rank 0 holds a lock there, which the kernel releases at the end of that process.

Two trainings in one directory would destroy each other's records and checkpoints.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from megatron_llama.config import RunConfig, checkpoint_directory
from parallel.errors import ConfigError

LOCK_FILE = "running.lock"
PATIENCE_SECONDS = 5.0  # with a process of this host, which may be about to die
FAR_PATIENCE_SECONDS = 150.0  # with one of another host: a file server keeps the locks of a dead one for a minute or two
LOOK_SECONDS = 0.1
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def lock_run(config: RunConfig) -> ExitStack:
    """Hold the run directory, and that of the checkpoints if it is elsewhere, until the result is closed or this process ends.

    Raises ConfigError where another process holds one of them and goes on doing so, OSError where one cannot be written.
    """
    run, checkpoints = Path(config.log.directory), checkpoint_directory(config)
    with ExitStack() as stack:
        for directory in [run] if checkpoints.is_relative_to(run) else [run, checkpoints]:
            stack.enter_context(_lock(directory))
        return stack.pop_all()


def _lock(directory: Path) -> IO[str]:
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / LOCK_FILE, "a+", encoding="utf-8")
    began = time.monotonic()
    patience = None
    while not _try_to_lock(file):
        file.seek(0)
        holder = file.read().strip()
        if patience is None:
            is_near = holder.startswith(f"{socket.gethostname()} ")
            patience = PATIENCE_SECONDS if is_near else FAR_PATIENCE_SECONDS
            print(f"waiting for {directory}, which is locked by {holder}", file=sys.stderr, flush=True)
        if time.monotonic() - began > patience:
            file.close()
            raise ConfigError(
                f"{directory} belongs to another training, by {holder}: stop that one first, or give this one a directory of "
                "its own with --log.directory"
            )
        time.sleep(LOOK_SECONDS)
    file.truncate(0)
    file.write(f"{socket.gethostname()} process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


def _try_to_lock(file: IO[str]) -> bool:
    """Whether the file is locked now; also where its file system knows no locks, which is said."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        reason = f"{file.name} cannot be locked ({error.strerror})"
        print(f"warning: {reason}: see to it that no other training uses this directory", file=sys.stderr, flush=True)
    return True
