"""The ranks of one node as child processes: started by fork, looked at, ended.

A fork has everything imported, so that a rank begins its work within milliseconds. The parent must not have touched a GPU, and
never does.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path

from megatron_llama.program import run_program
from parallel import launch as launching
from parallel.heartbeat import STACK_SIGNAL, Beat, Event, beat_path, read, read_events, stacks_path
from parallel.launch import Launch

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)  # a supervisor has handlers for them, which ranks must not inherit
STACK_SECONDS = 0.5  # that a rank has to write its stacks
SET_PARENT_DEATH_SIGNAL = 1  # of prctl


class RankProcesses:
    """The processes of the ranks `launches`, each running `main`; their heartbeats are in the directory `heartbeats`.

    `devices`: what they see of the GPUs, where that is not what this process sees (`parallel.launch.visible_devices`).
    """

    def __init__(
        self, main: Callable[[Launch], int], launches: Sequence[Launch], heartbeats: Path, devices: str | None = None
    ) -> None:
        self.heartbeats = heartbeats
        context = multiprocessing.get_context("fork")
        self._processes = {
            launch.rank: context.Process(
                target=_be_rank, args=(main, launch, heartbeats, devices, os.getpid()), name=f"rank {launch.rank}"
            )
            for launch in launches
        }
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()  # a rank's collector would look at all that is here, and copy its pages
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until a rank has its own handlers
        try:
            for process in self._processes.values():
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)

    @property
    def alive(self) -> list[int]:
        return [rank for rank, process in self._processes.items() if process.exitcode is None]

    @property
    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended; -9 is death by signal 9."""
        return {rank: process.exitcode for rank, process in self._processes.items() if process.exitcode is not None}

    def wait(self, seconds: float) -> None:
        """Return when a rank ends that is alive now, and after that time anyway; at once where none is."""
        alive = [self._processes[rank].sentinel for rank in self.alive]
        if alive:
            connection.wait(alive, seconds)

    def beats(self) -> dict[int, Beat | None]:
        """The latest beat of each rank, of dead ones too; None where it has not begun."""
        return {rank: read(self.heartbeats, rank) for rank in self._processes}

    def events(self) -> dict[int, list[Event]]:
        """The flight recorder of each rank, of dead ones too."""
        return {rank: read_events(self.heartbeats, rank) for rank in self._processes}

    def signal(self, number: int) -> None:
        """Send a signal to the ranks that are alive."""
        for rank in self.alive:
            os.kill(self._processes[rank].pid, number)  # (not reaped yet, so the id is still that process's)

    def stacks(self) -> dict[int, str]:
        """The stacks of all threads of each rank that is alive; empty for a rank that does not answer."""
        beats = self.beats()
        beating = [rank for rank in self.alive if beats[rank] is not None]  # the others have no handler yet
        for rank in beating:
            os.kill(self._processes[rank].pid, STACK_SIGNAL)
        end = time.monotonic() + STACK_SECONDS
        paths = {rank: stacks_path(beat_path(self.heartbeats, rank)) for rank in beating}
        sizes: dict[int, int] = {}
        while time.monotonic() < end:
            time.sleep(0.05)
            before, sizes = sizes, {rank: path.stat().st_size for rank, path in paths.items()}
            if all(sizes.values()) and sizes == before:
                break
        return {rank: _own_part(path.read_text(errors="replace")) for rank, path in paths.items()}

    def end(self, grace_seconds: float) -> None:
        """End all ranks: TERM, then KILL for those that are still there after the time of grace."""
        self.signal(signal.SIGTERM)
        end = time.monotonic() + grace_seconds
        while self.alive and time.monotonic() < end:
            self.wait(end - time.monotonic())
        self.signal(signal.SIGKILL)
        for process in self._processes.values():
            process.join()


def _own_part(stacks: str) -> str:
    """Stacks without the frames in which the rank was forked, which are the supervisor's."""
    threads = stacks.split("\n\n")
    return "\n\n".join(re.sub(rf"( in {_be_rank.__name__}\n).*", r"\1", thread, flags=re.DOTALL) for thread in threads)


def _be_rank(main: Callable[[Launch], int], launch: Launch, heartbeats: Path, devices: str | None, parent: int) -> None:
    """What a rank's process does, from its fork to its end."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before that
        os._exit(1)
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    launching.become(launch, heartbeats, devices)
    sys.exit(run_program(main))
