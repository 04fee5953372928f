"""Ranks of a program on this machine: started by fork, rank 0's result brought back, a failure's reason said."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from megatron_llama.supervision.rank_processes import RankProcesses
from megatron_llama.supervision.supervisors import free_port
from parallel.errors import LostContactError, UserError
from parallel.launch import Launch
from parallel.launchers import MeetingPoint

GRACE_SECONDS = 2.0  # for ranks that have lost another one
LOOK_SECONDS = 0.1
FAILED = 1
STDERR = 2

Result = TypeVar("Result")


class RanksFailedError(UserError):
    """Why a rank could not do its work."""


def run_local_ranks(work: Callable[[Launch], Result], count: int, threads: int | None = None) -> Result:
    """Call `work` on `count` forked ranks and return what it returns on rank 0. This process must not have used a GPU.

    `threads`: of each rank, for its products; by default the cores divided by the ranks. Raises RanksFailedError with the
    reason of the first rank that had one.
    """
    point = MeetingPoint("127.0.0.1", free_port(), serves=False)
    launches = [Launch(rank, rank, count, count, "local", point) for rank in range(count)]
    threads = threads or max(1, (os.cpu_count() or 1) // count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = RankProcesses(lambda launch: _rank_main(work, launch, threads, folder), launches, folder)
        while ranks.alive and not any(ranks.codes.values()):
            ranks.wait(LOOK_SECONDS)
        codes = ranks.codes
        ranks.end(GRACE_SECONDS)
        if any(ranks.codes.values()):
            raise RanksFailedError(_reason(codes, folder))
        return pickle.loads((folder / "result").read_bytes())


def _rank_main(work: Callable[[Launch], Result], launch: Launch, threads: int, folder: Path) -> int:
    """What a rank does. Its result or error is left in a file, and so is what it says: several ranks would say the same."""
    torch.set_num_threads(threads)
    os.dup2(os.open(folder / f"stderr-{launch.rank}", os.O_WRONLY | os.O_CREAT), STDERR)
    kind = "error"
    try:
        result = work(launch)
        if launch.rank == 0:
            (folder / "result").write_bytes(pickle.dumps(result))
        return 0
    except LostContactError as error:
        kind, reason = "lost", str(error)
    except UserError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{''.join(traceback.format_exception_only(error)).strip()}\n{traceback.format_exc()}"
    (folder / f"{kind}-{launch.rank}").write_text(reason)
    return FAILED


def _reason(codes: dict[int, int], folder: Path) -> str:
    """A rank that was killed, or what the first one says that did not just lose another."""
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    if killed:
        rank = min(killed)
        return f"rank {rank} was killed by signal {killed[rank]}: was there enough memory?"
    said = [sorted(folder.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime_ns) for kind in ("error", "lost")]
    first = [*said[0], *said[1]][0]
    return f"{first.read_text()} (rank {first.name.partition('-')[2]})"


def starts_ranks(launch: Launch) -> bool:
    """Whether this process is on its own, so that it has to start the ranks: no launcher has started it as one of them."""
    return launch.world_size == 1 and launch.launcher.startswith("one process")


def default_ranks() -> int:
    """One for each GPU that this process sees, or one."""
    return torch.cuda.device_count() or 1

