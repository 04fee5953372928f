"""A small disk of a run's own: a tmpfs that only its supervisor and its ranks see, and which goes when they go. Needs root."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

NEW_MOUNTS = 0x20000  # CLONE_NEWNS
SIZE_BYTES = 4 << 20
DISK, FILLER = Path("disk"), Path("disk/filler")  # in the working directory


def mount() -> None:
    """This process, and those that it forks, have a disk in the working directory. Raises OSError, CalledProcessError."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "no mounts of its own")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    DISK.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", DISK], check=True)


def can_mount() -> bool:
    """Whether this machine lets us."""
    process = multiprocessing.get_context("fork").Process(target=_try)
    process.start()
    process.join()
    return process.exitcode == 0


def _try() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    sys.exit(ctypes.CDLL(None).unshare(NEW_MOUNTS) or subprocess.run(["mount", "--make-rprivate", "/"]).returncode)


def fill() -> None:
    with open(FILLER, "wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def empty() -> None:
    FILLER.unlink()
