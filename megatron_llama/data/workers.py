"""Tasks shared out to processes, each of which builds its own worker once; nothing but tasks and results passes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from parallel.errors import DataError, UserError

PROGRESS_SECONDS = 0.2

Progress = Callable[[int, int], None]
Worker = Callable[[Any, Progress], Any]


def run_tasks(
    tasks: Sequence[tuple[str, Any]], start: Callable[[], Worker], workers: int, progress: Progress
) -> Iterator[tuple[str, Any]]:
    """Yields (key, result) of each task (key, work) as it is done: `start()((key, work), progress)`.

    With one worker all happens here; otherwise in `workers` processes, which get the largest work first, and whose
    progress arrives a few times a second. They end with this process, however it ends, and when the iterator is closed.

    Raises what a worker raised, and DataError where one was killed.
    """
    if workers <= 1:
        worker = start()
        for task in tasks:
            yield task[0], worker(task, progress)
        return
    with _Pool(start, workers) as pool:
        yield from pool.run(sorted(tasks, key=_size, reverse=True), progress)


def _size(task: tuple[str, Any]) -> int:
    return sum(piece.end - piece.start for piece in task[1])


class _Pool:
    def __init__(self, start: Callable[[], Worker], workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = []
        self._connections: list[Connection] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, start), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def run(self, tasks: Sequence[tuple[str, Any]], progress: Progress) -> Iterator[tuple[str, Any]]:
        waiting = iter(tasks)
        busy = {connection for connection in self._connections if _send_next(connection, waiting)}
        while busy:
            for connection in wait(list(busy)):
                try:
                    kind, *content = connection.recv()
                except (EOFError, ConnectionError) as error:
                    message = "a worker process ended unexpectedly, perhaps killed for lack of memory: use fewer --workers"
                    raise DataError(message) from error
                if kind == "progress":
                    progress(*content)
                elif kind == "error":
                    raise content[0]
                else:
                    if not _send_next(connection, waiting):
                        busy.discard(connection)
                    yield tuple(content)


def _send_next(connection: Connection, waiting: Iterator[tuple[str, Any]]) -> bool:
    task = next(waiting, None)
    connection.send(task)
    return task is not None


def _work(connection: Connection, start: Callable[[], Worker]) -> None:
    """What a process does: tasks until it gets None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, but its parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    report = _Reporter(connection)
    try:
        worker = start()
        for task in iter(connection.recv, None):
            result = worker(task, report)
            report.flush()
            connection.send(("result", task[0], result))
    except (EOFError, BrokenPipeError):  # the parent is gone
        return
    except (UserError, OSError) as error:
        connection.send(("error", error))
    except BaseException:
        connection.send(("error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))


class _Reporter:
    """Gathers progress, so that a message is sent a few times a second only."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sent = time.monotonic()
        self._read_bytes = self._tokens = 0

    def __call__(self, read_bytes: int, tokens: int) -> None:
        self._read_bytes += read_bytes
        self._tokens += tokens
        if time.monotonic() - self._sent > PROGRESS_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._connection.send(("progress", self._read_bytes, self._tokens))
        self._read_bytes, self._tokens, self._sent = 0, 0, time.monotonic()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
