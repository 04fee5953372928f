"""CUDA graphs of a micro-batch's forward and backward pass: captured once, then launched with other contents.

A replay runs kernels and no Python. Nothing waits there for gathered weights, and no gradient is counted, so a step's first and
last micro-batch always run eagerly: the first one waits for the weights, in the last one buckets leave as they fill. The
gradients of the replays between add up in the engine's buffers, which must stay where they are from step to step.

A layout of micro-batches (their shapes, and all in them that is no tensor) runs eagerly in the step that brings it first:
that compiles, tunes, allocates and connects what a capture must not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.ledger import Ledger
from parallel.pipeline.schedules import Action

Output = Tensor | None


class Graph(Protocol):
    """Work that is noted once and launched again and again, with the memory that it was noted with."""

    def capture(self, work: Callable[[], Output]) -> Output:
        """Run the Python of `work`, and none of its kernels. Returns what it returned: memory that `replay` fills."""

    def replay(self) -> None:
        """Launch the kernels."""


class CudaGraphs:
    """Makes CUDA graphs of one memory pool: none of them needs what is left of another's, but for a backward pass's."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self) -> Graph:
        return _CudaGraph(self._pool)


class _CudaGraph:
    """A CUDA graph. Its capture waits for the device; a replay does not."""

    def __init__(self, pool: tuple[int, int]) -> None:
        self._pool, self._graph = pool, torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], Output]) -> Output:
        with torch.cuda.graph(self._graph, pool=self._pool):
            return work()

    def replay(self) -> None:
        self._graph.replay()


@dataclass(frozen=True)
class _Captured:
    """One captured action: its output, and what its collectives send in each replay."""

    graph: Graph
    output: Output
    sent_bytes: Counter
    calls: Counter


@dataclass
class _Pass:
    """The graphs of one layout, by the kind of their action, and the tensors that they read."""

    micro_batch: Any
    captured: dict[str, _Captured] = field(default_factory=dict)


class MicroBatchGraphs:
    """Replays the F and B of a step's inner micro-batches, of one chunk on one pipeline rank.

    Micro-batches are tensors, or dataclasses of them and of values that compare equal where the same graph serves. Bytes of
    replays count in the `ledger` as those of other passes do.
    """

    def __init__(self, ledger: Ledger, make_graph: Callable[[], Graph]) -> None:
        self._ledger, self._make_graph = ledger, make_graph
        self._known: set[Hashable] = set()  # layouts that have run in an earlier step
        self._passes: dict[Hashable, _Pass] = {}
        self._replayed: dict[int, Hashable] = {}  # the layouts of this step's micro-batches that are replayed

    def begin_step(self, actions: Sequence[Action], micro_batches: Sequence[Any]) -> int:
        """Settle which micro-batches are replayed. Returns how many backward passes run Python: eager ones and captures."""
        assert [action.kind for action in actions] == ["F", "B"] * len(micro_batches), "F and B must take turns"
        layouts = [tuple(_layout(micro_batch)) for micro_batch in micro_batches]
        inner = range(1, len(layouts) - 1)
        self._replayed = {number: layouts[number] for number in inner if layouts[number] in self._known}
        self._known.update(layouts)
        captures = set(self._replayed.values()) - self._passes.keys()
        return len(layouts) - len(self._replayed) + len(captures)

    def replays(self, action: Action) -> bool:
        """Whether the action is launched from a graph in this step."""
        return action.micro_batch in self._replayed

    def run(self, action: Action, micro_batch: Any, compute: Callable[[Any], Output]) -> Output:
        """What `compute` makes of the micro-batch, by a replay; the first one of a layout is captured before."""
        layout = self._replayed[action.micro_batch]
        if layout not in self._passes:
            self._passes[layout] = _Pass(_copied(micro_batch))
        place = self._passes[layout]
        if action.kind == "F":
            for target, source in zip(_leaves(place.micro_batch), _leaves(micro_batch), strict=True):
                if isinstance(target, Tensor):
                    target.copy_(source)
        if action.kind in place.captured:
            captured = place.captured[action.kind]
            self._ledger.sent_bytes.update(captured.sent_bytes)
            self._ledger.calls.update(captured.calls)
        else:
            captured = place.captured[action.kind] = self._capture(lambda: compute(place.micro_batch))
        captured.graph.replay()
        return None if captured.output is None else captured.output.clone()

    def _capture(self, work: Callable[[], Output]) -> _Captured:
        """A graph of `work`; the bytes that Python records meanwhile are those of its first replay."""
        ledger, graph = self._ledger, self._make_graph()
        sent_bytes, calls = Counter(ledger.sent_bytes), Counter(ledger.calls)
        output = graph.capture(work)
        return _Captured(graph, output, ledger.sent_bytes - sent_bytes, ledger.calls - calls)


def _leaves(value: Any) -> Iterator[Any]:
    """What dataclasses hold, those inside them included, in order."""
    if not is_dataclass(value):
        yield value
        return
    for item in fields(value):
        yield from _leaves(getattr(value, item.name))


def _layout(micro_batch: Any) -> Iterator[Hashable]:
    """All that a graph fixes of a micro-batch: shapes and dtypes, and what is no tensor."""
    for leaf in _leaves(micro_batch):
        yield (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _copied(value: Any) -> Any:
    """The same, with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if is_dataclass(value):
        return replace(value, **{item.name: _copied(getattr(value, item.name)) for item in fields(value)})
    return value
