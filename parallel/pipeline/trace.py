"""A trace of what every rank did when: actions and waits for messages, on one clock, as Chrome trace JSON.

Open it in Perfetto (ui.perfetto.dev) or chrome://tracing: one row per rank. On a GPU the times are those of the device: events
are recorded during the step and read when it is over, so tracing adds no synchronisation to a step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import all_gather, all_reduce, start_receive, start_send
from parallel.groups import Axis, ProcessGroups
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import Action
from parallel.pipeline.timeline import KINDS

# Names of Chrome's palette; "wait" is grey.
COLOURS = {"F": "thread_state_running", "B": "rail_response", "I": "rail_animation", "W": "yellow", "wait": "grey"}
PINGS = 5  # of which the shortest counts

Mark = float | torch.cuda.Event


class Trace:
    """Times of this rank's actions. Making one waits for the device; `span` is called while a step runs; `write` ends it."""

    def __init__(self, groups: ProcessGroups, placement: Placement, device: torch.device) -> None:
        self.groups, self.placement, self.device = groups, placement, device
        self._spans: list[tuple[str, Action, Mark, Mark]] = []
        self._synchronize()
        self._origin_seconds, self._origin = time.perf_counter(), self._mark()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mark(self) -> Mark:
        """Now, in the work of the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: Mark) -> float:
        """The mark on this host's clock (`time.perf_counter`)."""
        if isinstance(mark, float):
            return mark
        assert isinstance(self._origin, torch.cuda.Event)
        return self._origin_seconds + self._origin.elapsed_time(mark) / 1000.0  # milliseconds

    @contextmanager
    def span(self, kind: str, action: Action) -> Iterator[None]:
        """Time what happens inside: an action (`kind` F, B, I, W), or the wait for the message that it needs ("wait")."""
        start = self._mark()
        yield
        self._spans.append((kind, action, start, self._mark()))

    def write(self, path: Path) -> None:
        """Bring all ranks' spans together and write them, on rank 0. All ranks call it together; it waits for the device."""
        self._synchronize()
        world = self.groups.world
        offset, accuracy = clock_offset(world, self.device)
        rows = [
            [KINDS.index(kind), action.micro_batch, action.chunk, self._seconds(start) - offset, self._seconds(end) - offset]
            for kind, action, start, end in self._spans
        ]
        gathered = _gather_rows(torch.tensor(rows, dtype=torch.float64, device=self.device).view(-1, 5), world)
        accuracy = all_reduce(torch.tensor([accuracy], dtype=torch.float64, device=self.device), world, dist.ReduceOp.MAX)
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._chrome(gathered, accuracy.item())))

    def _chrome(self, rows_of_ranks: list[list[list[float]]], accuracy_seconds: float) -> dict[str, Any]:
        """The document: times in microseconds since the first span began."""
        origin = min((row[3] for rows in rows_of_ranks for row in rows), default=0.0)
        events: list[dict[str, Any]] = []
        for rank, rows in enumerate(rows_of_ranks):
            place = self.groups.topology.coordinates(rank)
            name = f"rank {rank}: pp {place.pp} dp {place.dp} cp {place.cp} tp {place.tp}"
            events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": name}})
            for number, micro_batch, chunk, start, end in rows:
                kind, action = KINDS[int(number)], Action("", int(micro_batch), int(chunk))
                events.append(
                    {
                        "ph": "X",
                        "name": f"{kind}{action}",
                        "cat": kind,
                        "cname": COLOURS[kind],
                        "pid": 0,
                        "tid": rank,
                        "ts": (start - origin) * 1e6,
                        "dur": (end - start) * 1e6,
                        "args": {
                            "micro_batch": action.micro_batch,
                            "chunk": action.chunk,
                            "stage": self.placement.stage(place.pp, action.chunk),
                            "pp_rank": place.pp,
                        },
                    }
                )
        return {"traceEvents": events, "otherData": {"clock_accuracy_seconds": accuracy_seconds}}


def clock_offset(world: Axis, device: torch.device) -> tuple[float, float]:
    """Seconds by which this host's clock is ahead of rank 0's, and how far off that may be. All ranks call it together.

    Rank 0 sends its time to and fro with one rank after the other; the answer of the shortest of some round trips is taken to
    lie in its middle, so it is off by at most half of that trip. Source: Cristian 1989 (Probabilistic clock synchronization).
    """
    clock = torch.zeros(1, dtype=torch.float64, device=device)
    offsets = torch.zeros(world.size, 2, dtype=torch.float64, device=device)
    for peer in range(1, world.size):
        if world.rank == 0:
            offsets[peer] = _ask(clock, world, peer)
        elif world.rank == peer:
            for _ in range(PINGS):
                start_receive(clock, world, 0, tag=0).wait()
                clock.item()  # on a GPU it has arrived only now
                start_send(clock.fill_(time.perf_counter()), world, 0, tag=0).wait()
    offset, accuracy = all_reduce(offsets, world)[world.rank].tolist()
    return offset, accuracy


def _ask(clock: Tensor, world: Axis, peer: int) -> Tensor:  # [2]: offset and accuracy in seconds
    """Of several round trips to `peer`, what the shortest one says."""
    answers = []
    for _ in range(PINGS):
        sent = time.perf_counter()
        start_send(clock, world, peer, tag=0).wait()
        start_receive(clock, world, peer, tag=0).wait()
        theirs, back = clock.item(), time.perf_counter()
        answers.append((back - sent, theirs - (sent + back) / 2))
    trip, offset = min(answers)
    return torch.tensor([offset, trip / 2], dtype=torch.float64)


def _gather_rows(rows: Tensor, world: Axis) -> list[list[list[float]]]:  # [n, columns], n differing by rank
    """Every rank's rows, as lists."""
    counts = torch.zeros(world.size, dtype=torch.int64, device=rows.device)
    counts[world.rank] = len(rows)
    all_reduce(counts, world)
    padded = rows.new_zeros(int(counts.max()), rows.shape[1])
    padded[: len(rows)] = rows
    everything = all_gather(padded, world).view(world.size, *padded.shape)
    return [part[:count].tolist() for part, count in zip(everything, counts.tolist(), strict=True)]
