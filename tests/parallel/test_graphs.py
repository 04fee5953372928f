"""Which micro-batches are replayed, from which graphs and with which contents: graphs that note what they are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from parallel.graphs import MicroBatchGraphs
from parallel.ledger import Ledger
from parallel.pipeline.schedules import Action


class Graph:
    """Runs its work in the capture, as Python does, and again in each replay, of which the ledger hears nothing."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.replays = ledger, 0

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        self.work = work
        self.output = torch.full_like(work(), torch.nan)  # nothing has been computed yet
        return self.output

    def replay(self) -> None:
        self.replays += 1
        heard = Counter(self.ledger.sent_bytes), Counter(self.ledger.calls)
        self.output.copy_(self.work())
        self.ledger.sent_bytes, self.ledger.calls = heard


@dataclass(frozen=True)
class Inside:
    ends: Tensor
    bound: int


@dataclass(frozen=True)
class Inputs:
    values: Tensor
    mask: Tensor | None = None
    inside: Inside | None = None


class Rank:
    """Runs steps of micro-batches, whose passes make twice the values and send 100 bytes; keeps what it was told."""

    def __init__(self) -> None:
        self.made: list[Graph] = []
        self.ledger, self.computed = Ledger(), []
        self.graphs = MicroBatchGraphs(self.ledger, self._new_graph)

    def _new_graph(self) -> Graph:
        self.made.append(Graph(self.ledger))
        return self.made[-1]

    def compute(self, inputs: Inputs) -> Tensor:
        self.computed.append(inputs)
        self.ledger.record("all_reduce", "tp", (0, 1), 100)
        return inputs.values * 2

    def step(self, micro_batches: list[Inputs]) -> tuple[int, list[Tensor], list[int]]:
        """The number of passes that run Python, the outputs, and which micro-batches were replayed."""
        actions = [Action(kind, m, 0) for m in range(len(micro_batches)) for kind in "FB"]
        passes, outputs, replayed = self.graphs.begin_step(actions, micro_batches), [], []
        for action in actions:
            inputs = micro_batches[action.micro_batch]
            if self.graphs.replays(action):
                made = self.graphs.run(action, inputs, self.compute)
                replayed.append(action.micro_batch)
            else:
                made = self.compute(inputs)
            if action.kind == "F":
                outputs.append(made)
        return passes, outputs, replayed[::2]


def values(*numbers: float) -> list[Inputs]:
    return [Inputs(torch.tensor([float(number)])) for number in numbers]


def test_the_first_step_and_every_first_and_last_micro_batch_run_eagerly():
    rank = Rank()
    runs = [rank.step(values(*range(k, k + 4))) for k in (0, 10, 20)]
    assert [replayed for _, _, replayed in runs] == [[], [1, 2], [1, 2]]
    assert [passes for passes, _, _ in runs] == [4, 3, 2]  # the second step captures one more
    assert [[y.item() for y in outputs] for _, outputs, _ in runs] == [[2.0 * (k + m) for m in range(4)] for k in (0, 10, 20)]
    assert [graph.replays for graph in rank.made] == [4, 4]  # one graph for F and one for B


@pytest.mark.parametrize("count", [1, 2])
def test_short_steps_have_nothing_to_replay(count):
    rank = Rank()
    assert [rank.step(values(*range(count)))[::2] for _ in range(3)] == [(count, [])] * 3


def test_each_layout_has_graphs_of_its_own_and_runs_eagerly_in_the_step_that_brings_it():
    def wide(number: float) -> Inputs:
        return Inputs(torch.full((2,), number))

    def inside(ends: int, bound: int) -> Inputs:
        return Inputs(torch.ones(1), inside=Inside(torch.full((1,), ends), bound))

    rank, (plain,) = Rank(), values(1.0)
    rank.step([plain] * 3)
    passes, outputs, replayed = rank.step([plain, wide(3.0), plain, plain])
    assert replayed == [2] and passes == 4 and outputs[1].tolist() == [6.0, 6.0]
    passes, outputs, replayed = rank.step([plain, wide(4.0), wide(5.0), plain, plain])
    assert replayed == [1, 2, 3] and passes == 3 and [y[0].item() for y in outputs[1:3]] == [8.0, 10.0]
    rank.step([plain, inside(1, 5), plain])
    assert rank.step([plain, inside(2, 5), plain])[2] == [1]
    assert rank.computed[-1] is plain and rank.computed[-3].inside.ends.item() == 2  # contents inside contents
    assert rank.step([plain, inside(2, 6), plain])[2] == []  # a host's number is part of the layout
    masked = replace(plain, mask=torch.ones(1))
    assert rank.step([plain, masked, plain])[2] == []
    assert len(rank.made) == 6


def test_outputs_outlive_the_next_replay_and_contents_their_copy():
    rank = Rank()
    batches = values(0, 1, 2, 3)
    rank.step(batches)
    _, outputs, _ = rank.step(batches)
    batches[1].values.fill_(9.0)
    assert [y.item() for y in outputs] == [0.0, 2.0, 4.0, 6.0]
    assert all(seen is not batches[1] for seen in rank.computed[-6:])


def test_bytes_of_replays_are_counted_like_those_of_eager_passes():
    rank, counted = Rank(), []
    for _ in range(3):
        rank.ledger.clear()
        rank.step(values(1, 2, 3, 4))
        counted.append((rank.ledger.sent_bytes["all_reduce", "tp"], rank.ledger.calls["all_reduce", "tp"]))
    assert counted == [(800, 8)] * 3


def test_actions_that_do_not_take_turns_are_refused():
    actions = [Action(kind, m, 0) for kind in "FB" for m in range(3)]
    with pytest.raises(AssertionError, match="take turns"):
        MicroBatchGraphs(Ledger(), pytest.fail).begin_step(actions, values(1, 2, 3))
