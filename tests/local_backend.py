"""Ranks as threads of one process, whose messages are copies on streams: the program's communication on one device.

What a rank sends and reduces goes through `LocalBackend`, which takes the place of torch.distributed where `parallel` calls it.
It orders things as NCCL does: a message waits on a stream of its own for the work that made its tensors, and `wait` makes the
reader's current stream wait for it, never the host. `delay_cycles` lets the messages (`"messages"`) or what they read
(`"producers"`) come late; whoever forgets to wait then reads what is not there yet. On a CPU there are no streams and the same
calls just happen in order.

Autograd has one thread per GPU: a backward pass must not wait there for another rank, so on GPUs tensor parallelism is left
out.
"""

from __future__ import annotations

import threading
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import collectives, groups

PATIENCE_SECONDS = 60.0


class Work:
    """The handle of a message: known to the host once all its ranks have come, done on the device at `event`."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend, self.met, self.event = backend, threading.Event(), None

    def wait(self, timeout: object = None) -> None:
        for _ in range(int(PATIENCE_SECONDS / 0.05)):
            if self.met.wait(0.05) or self.backend.failed.is_set():
                break
        assert self.met.is_set(), "the other ranks of a message never came"
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)

    def is_completed(self) -> bool:
        return self.met.is_set() and (self.event is None or self.event.query())


@dataclass
class Arrival:
    """A rank's part of a message: what it reads, what it writes, and the point in its stream at which it may."""

    member: Member
    source: Tensor | None
    target: Tensor | None
    work: Work
    ready: torch.cuda.Event | None
    tag: int = 0


@dataclass
class Meeting:
    """Where the ranks of one communicator come together: collectives in their order, messages of two ranks in theirs."""

    ranks: tuple[int, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    arrived: dict[int, list[Arrival]] = field(default_factory=lambda: defaultdict(list))
    sends: dict[tuple[int, int], deque[Arrival]] = field(default_factory=lambda: defaultdict(deque))
    receives: dict[tuple[int, int], deque[Arrival]] = field(default_factory=lambda: defaultdict(deque))
    stream: torch.cuda.Stream | None = None


@dataclass(frozen=True)
class Member:
    """One rank's handle of a communicator: what `Axis.group` is."""

    meeting: Meeting
    rank: int


class LocalBackend:
    """The calls of torch.distributed that `parallel` makes, between threads."""

    ReduceOp, Work = dist.ReduceOp, dist.Work

    def __init__(self, delay_cycles: int = 0, delayed: str = "messages") -> None:
        self.delay_cycles, self.delayed = delay_cycles, delayed
        self.failed = threading.Event()
        self._place, self._lock = threading.local(), threading.Lock()
        self._meetings: dict[tuple[tuple[int, ...], int], Meeting] = {}

    def enter(self, rank: int) -> None:
        """This thread is that rank."""
        self._place.rank, self._place.made = rank, defaultdict(int)

    def new_group(self, ranks: list[int], **ignored: object) -> Member | None:
        key = tuple(ranks)
        number = self._place.made[key]
        self._place.made[key] += 1
        if self._place.rank not in key:
            return None
        with self._lock:
            meeting = self._meetings.setdefault((key, number), Meeting(key))
        return Member(meeting, self._place.rank)

    def get_backend(self, group: Member) -> str:
        return "local"

    # ---- collectives ----------------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp, group: Member, async_op: bool) -> Work:
        def reduce(arrivals: list[Arrival]) -> None:
            values = torch.stack([arrival.source for arrival in arrivals])
            total = values.amax(0) if op == dist.ReduceOp.MAX else values.sum(0)
            for arrival in arrivals:
                arrival.target.copy_(total)

        return self._meet(group, tensor, tensor, reduce)

    def broadcast(self, tensor: Tensor, src: int, group: Member, async_op: bool) -> Work:
        def spread(arrivals: list[Arrival]) -> None:
            (source,) = (arrival.source for arrival in arrivals if arrival.member.rank == src)
            for arrival in arrivals:
                arrival.target.copy_(source)

        return self._meet(group, tensor, tensor, spread)

    def all_gather_into(self, out: Tensor, tensor: Tensor, group: Member, async_op: bool) -> Work:
        def gather(arrivals: list[Arrival]) -> None:
            whole = torch.cat([arrival.source.reshape(-1) for arrival in arrivals])
            for arrival in arrivals:
                arrival.target.copy_(whole.view_as(arrival.target))

        return self._meet(group, tensor, out, gather)

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, group: Member, async_op: bool) -> Work:
        def scatter(arrivals: list[Arrival]) -> None:
            parts = torch.stack([arrival.source for arrival in arrivals]).sum(0).chunk(len(arrivals))
            for arrival, part in zip(arrivals, parts, strict=True):
                arrival.target.copy_(part.view_as(arrival.target))

        return self._meet(group, tensor, out, scatter)

    def all_to_all_single(self, output: Tensor, input: Tensor, group: Member, async_op: bool) -> Work:
        def exchange(arrivals: list[Arrival]) -> None:
            parts = [arrival.source.chunk(len(arrivals)) for arrival in arrivals]
            received = [torch.cat([part[place] for part in parts]) for place in range(len(arrivals))]
            for arrival, whole in zip(arrivals, received, strict=True):
                arrival.target.copy_(whole.view_as(arrival.target))

        return self._meet(group, input, output, exchange)

    def _meet(self, member: Member, source: Tensor, target: Tensor, act: Callable[[list[Arrival]], None]) -> Work:
        """Note this rank's part of its next collective; the last rank to come starts it."""
        meeting, arrival = member.meeting, self._arrival(member, source, target)
        with meeting.lock:
            number = meeting.counts[member.rank]
            meeting.counts[member.rank] += 1
            present = meeting.arrived[number]
            present.append(arrival)
            if len(present) == len(meeting.ranks):
                del meeting.arrived[number]
                present.sort(key=lambda a: meeting.ranks.index(a.member.rank))
                self._transfer(meeting, present, act)
        return arrival.work

    # ---- messages of two ranks --------------------------------------------------------------------------------------------

    def isend(self, tensor: Tensor, dst: int, group: Member, tag: int) -> Work:
        arrival = self._arrival(group, tensor, None, tag)
        self._pair(group.meeting, (group.rank, dst), group.meeting.sends, arrival)
        return arrival.work

    def irecv(self, tensor: Tensor, src: int, group: Member, tag: int) -> Work:
        arrival = self._arrival(group, None, tensor, tag)
        self._pair(group.meeting, (src, group.rank), group.meeting.receives, arrival)
        return arrival.work

    @staticmethod
    def P2POp(op: Callable[..., Work], tensor: Tensor, peer: int, group: Member) -> Callable[[], Work]:
        return lambda: op(tensor, peer, group, tag=0)

    @staticmethod
    def batch_isend_irecv(messages: list[Callable[[], Work]]) -> list[Work]:
        return [start() for start in messages]

    def _pair(self, meeting: Meeting, way: tuple[int, int], side: dict, arrival: Arrival) -> None:
        """The n-th send of one rank to another is for its n-th receive from it, whatever the tags, as with NCCL."""
        with meeting.lock:
            side[way].append(arrival)
            if meeting.sends[way] and meeting.receives[way]:
                send, receive = meeting.sends[way].popleft(), meeting.receives[way].popleft()
                assert send.tag == receive.tag, f"message {send.tag} of ranks {way} meets the receive of {receive.tag}"
                self._transfer(meeting, [send, receive], lambda ends: ends[1].target.copy_(ends[0].source))

    # ---- streams ----------------------------------------------------------------------------------------------------------

    def _arrival(self, member: Member, source: Tensor | None, target: Tensor | None, tag: int = 0) -> Arrival:
        device = (source if source is not None else target).device
        ready = None
        if device.type == "cuda":
            if self.delay_cycles and self.delayed == "producers":
                torch.cuda._sleep(self.delay_cycles)
            ready = torch.cuda.Event()
            ready.record()
        return Arrival(member, source, target, Work(self), ready, tag)

    def _transfer(self, meeting: Meeting, arrivals: list[Arrival], act: Callable[[list[Arrival]], None]) -> None:
        """Do what the message does, on the communicator's stream, after all its ranks' tensors are ready."""
        on_device = arrivals[0].ready is not None
        if on_device and meeting.stream is None:
            meeting.stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(meeting.stream):  # (None changes nothing)
            if on_device:
                for arrival in arrivals:
                    meeting.stream.wait_event(arrival.ready)
                if self.delay_cycles and self.delayed == "messages":
                    torch.cuda._sleep(self.delay_cycles)
            act(arrivals)
            for arrival in arrivals:
                if on_device:
                    arrival.work.event = torch.cuda.Event()
                    arrival.work.event.record(meeting.stream)
                arrival.work.met.set()


@contextmanager
def installed(backend: LocalBackend) -> Iterator[None]:
    """`parallel` speaks to the backend instead of torch.distributed."""
    kept = collectives.dist, groups.dist, collectives._all_gather_into, collectives._reduce_scatter_into
    collectives.dist = groups.dist = backend
    collectives._all_gather_into, collectives._reduce_scatter_into = backend.all_gather_into, backend.reduce_scatter_into
    try:
        yield
    finally:
        collectives.dist, groups.dist, collectives._all_gather_into, collectives._reduce_scatter_into = kept


def run_threads(backend: LocalBackend, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(rank, world_size, *args)` in a thread per rank and return the results in rank order.

    Raises AssertionError with the traceback of every rank that failed.
    """
    results: list[Any] = [None] * world_size
    failures: list[str] = []

    def run(rank: int) -> None:
        backend.enter(rank)
        try:
            with torch.cuda.stream(torch.cuda.Stream() if torch.cuda.is_available() else None):
                results[rank] = function(rank, world_size, *args)
        except BaseException:  # reported below, by the thread that waits
            failures.append(f"--- rank {rank}:\n{traceback.format_exc()}")
            backend.failed.set()

    with installed(backend):
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, "\n".join(failures)
    return results
