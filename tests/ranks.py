"""Runs a function on several gloo ranks, forked from this process, which has imported torch already.

Four ranks start in 0.1-0.4 s; a rank that dies or hangs harms nobody. Past the deadline every rank's stack is printed and the
test fails.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # (an optimizer's first step imports it: 2-3 s once here instead of in every rank)
import torch.distributed as dist

torch.set_num_threads(1)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, deadline_seconds: float = 90.0, joined: bool = True
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on each rank and return the results in rank order.

    `joined`: the ranks are in a process group already (otherwise that is left to the function).
    Raises AssertionError with the first failing rank's traceback, or with all stacks past the deadline.
    """
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        sys.stderr.flush()
        joined = joined and world_size > 1
        pids = [_fork(rank, world_size, function, args, Path(folder), deadline_seconds, joined) for rank in range(world_size)]
        failure = _wait(pids, Path(folder), deadline_seconds)
        assert failure is None, failure
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _fork(
    rank: int, world_size: int, function: Callable, args: tuple, folder: Path, deadline_seconds: float, joined: bool
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    gc.freeze()  # what was there before belongs to the parent: collecting would look at all of it, and copy its pages
    try:
        log = open(folder / f"log-{rank}", "w")  # open until the process ends
        os.dup2(log.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
        if joined:
            timeout = timedelta(seconds=deadline_seconds)
            dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timeout)
        result = function(rank, world_size, *args)
        if joined:
            dist.barrier()
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:  # a forked child must never return into pytest
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(pids: list[int], folder: Path, deadline_seconds: float) -> str | None:
    """Reap the ranks; returns what went wrong, or None."""
    codes: dict[int, int] = {}
    end = time.monotonic() + deadline_seconds
    failed_at = None
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
        overdue = time.monotonic() > end
        if overdue or (failed_at is not None and time.monotonic() > failed_at + 2.0):
            _end(pids, codes)
            break
        time.sleep(0.002)
    bad = [rank for rank in range(len(pids)) if codes.get(rank, -1)]
    if not bad:
        return None
    texts = []
    for rank in bad:
        error, log = folder / f"error-{rank}", folder / f"log-{rank}"
        text = error.read_text() if error.exists() else log.read_text() if log.exists() else ""
        texts.append(f"--- rank {rank}, exit code {codes.get(rank)}:\n{text}")
    return f"ranks {bad} of {len(pids)} failed (deadline {deadline_seconds} s)\n" + "\n".join(texts)


def _end(pids: list[int], codes: dict[int, int]) -> None:
    """Ask the remaining ranks for their stacks, then end them."""
    remaining = [(rank, pid) for rank, pid in enumerate(pids) if rank not in codes]
    for _, pid in remaining:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    for rank, pid in remaining:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[rank] = -signal.SIGKILL
