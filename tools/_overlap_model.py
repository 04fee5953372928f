"""What dependencies allow to hide: a step as a list of computations and messages, played against a link of given bandwidth.

A rank computes in order; its messages go over the link in the order in which they start, behind whatever it computes, until it
waits for one. Both ranks do the same at the same time, so one of them stands for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Compute:
    seconds: float


@dataclass(frozen=True)
class Send:
    """A message of which this rank sends (and receives) so many bytes."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Wait:
    name: str


Event = Compute | Send | Wait


def play(events: Sequence[Event], bytes_per_second: float) -> float:
    """Seconds until the last event is over."""
    now = link_free = 0.0
    arrival: dict[str, float] = {}
    for event in events:
        if isinstance(event, Compute):
            now += event.seconds
        elif isinstance(event, Send):
            link_free = arrival[event.name] = max(now, link_free) + event.bytes / bytes_per_second
        else:
            now = max(now, arrival[event.name])
    return now


# ---- data parallelism: ZeRO stage 1 ---------------------------------------------------------------------------------------


def zero_steps(steps: int, layers: Sequence[tuple[float, float]], rest_seconds: float, overlap: bool) -> Iterator[Event]:
    """`layers`: seconds of a forward pass and bytes sent to gather (or to reduce) the weights, in order of use.

    A backward pass takes twice as long as a forward pass; `rest_seconds` are the update's, the norm's, the loss's.
    """
    count = len(layers)
    for step in range(steps):
        for i, (seconds, _) in enumerate(layers):
            if overlap and step > 0:
                yield Wait(f"gather {step - 1} {i}")
            yield Compute(seconds)
        for i, (seconds, size) in reversed(list(enumerate(layers))):
            yield Compute(2 * seconds)
            if overlap:
                yield Send(f"reduce {step} {i}", size)
        if not overlap:
            yield from (Send(f"reduce {step} {i}", layers[i][1]) for i in range(count))
        yield from (Wait(f"reduce {step} {i}") for i in range(count))
        yield Compute(rest_seconds)
        yield from (Send(f"gather {step} {i}", layers[i][1]) for i in range(count))
        if not overlap:
            yield from (Wait(f"gather {step} {i}") for i in range(count))


def zero_step_seconds(
    layers: Sequence[tuple[float, float]], rest_seconds: float, overlap: bool, bytes_per_second: float
) -> float:
    """Of a step among others: its gathers are behind the next one."""
    first, both = (list(zero_steps(steps, layers, rest_seconds, overlap)) for steps in (2, 3))
    return play(both, bytes_per_second) - play(first, bytes_per_second)


# ---- tensor parallelism with sequence parallelism, two ranks ---------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """`seconds` of each of its three products, `bytes` of each of its messages, `pieces` of a message in mode "chunks"."""

    name: str
    column: bool
    seconds: float
    bytes: float
    pieces: int


def tensor_step(linears: Sequence[Linear], embedding_bytes: float, rest_seconds: float, mode: str) -> Iterator[Event]:
    """The linears of a model in their order. The embedding's sum and gather have nothing to hide behind."""
    yield from _alone("embedding", embedding_bytes)
    for linear in linears:
        yield from (_gathered if linear.column else _summed)(linear, "forward", mode)
        if not linear.column:
            yield from (Wait(name) for name in _messages(linear, "forward", mode))
    yield Compute(rest_seconds)
    for linear in reversed(linears):
        yield from (_column_backward if linear.column else _row_backward)(linear, mode)
    yield from _alone("embedding's gradient", embedding_bytes)


def _alone(name: str, size: float) -> Iterator[Event]:
    yield Send(name, size)
    yield Wait(name)


def _messages(linear: Linear, phase: str, mode: str) -> list[str]:
    return [f"{linear.name} {phase} {i}" for i in range(linear.pieces if mode == "chunks" else 1)]


def _gathered(linear: Linear, phase: str, mode: str) -> Iterator[Event]:
    names = _messages(linear, phase, mode)
    own = linear.seconds / 2 if mode == "chunks" else 0.0
    yield from (Send(name, linear.bytes / len(names)) for name in names)
    yield Compute(own)
    for name in names:
        yield Wait(name)
        yield Compute((linear.seconds - own) / len(names))


def _summed(linear: Linear, phase: str, mode: str) -> Iterator[Event]:
    names = _messages(linear, phase, mode)
    own = linear.seconds / 2 if mode == "chunks" else 0.0
    for name in names:
        yield Compute((linear.seconds - own) / len(names))
        yield Send(name, linear.bytes / len(names))
    yield Compute(own)


def _column_backward(linear: Linear, mode: str) -> Iterator[Event]:
    gather = f"{linear.name} gather"
    sums = [Wait(name) for name in _messages(linear, "dgrad", mode)]
    yield Send(gather, linear.bytes)
    if mode == "none":
        yield Wait(gather)
    yield from _summed(linear, "dgrad", mode)
    if mode == "none":
        yield from sums
    yield Wait(gather)
    yield Compute(linear.seconds)
    yield from sums


def _row_backward(linear: Linear, mode: str) -> Iterator[Event]:
    yield from _gathered(linear, "dgrad", mode)
    yield Compute(linear.seconds)
