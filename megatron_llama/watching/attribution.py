"""Whose numbers were not finite: what each rank knows of its own part of a step, and what follows from all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from parallel.tensor.parameter import ShardedParameter
from parallel.topology import Topology
from parallel.zero.engine import Engine, StepInfo

NAMED_RANKS = 8  # beside the first one


@dataclass(frozen=True)
class Finding:
    """What of one rank's own was not finite in a step.

    `state`: the first of its weights and moments that was not when the step began; is it the one that `updates` it, or was it
    sent what another one has made? `loss`: that of its micro-batches.
    `gradient` and `micro_batch`: the first gradient that was not, before it met those of other ranks. `shard`: its shard of the
    sum over the data ranks. Names are empty where nothing was found, or where nobody looked.
    """

    rank: int
    state: str = ""
    updates: bool = False
    loss: bool = False
    gradient: str = ""
    micro_batch: int = -1
    shard: bool = False

    def __str__(self) -> str:
        if self.state:
            return f"{self.state} in the memory of rank {self.rank}"
        if self.gradient:
            loss = ", whose loss was not finite either" if self.loss else ""
            return f"gradient of {self.gradient} in micro-batch {self.micro_batch} of rank {self.rank}{loss}"
        what = "loss" if self.loss else "sum of the data ranks' gradients in the shard"
        return f"{what} of rank {self.rank}"


class GradientLook:
    """Inside, a look at each part of a gradient as it is made; afterwards `first` says which was the first bad one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parts: Counter[int] = Counter()  # seen of each parameter
        self._seen: list[tuple[str, int, Tensor]] = []

    def __enter__(self) -> GradientLook:
        self._engine.inspect_gradients(self._look)
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.inspect_gradients(None)

    def _look(self, parameter: ShardedParameter) -> None:
        if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # the graph would look in every later step, too
        micro_batch = self._parts[id(parameter)] // parameter.shard.uses
        self._parts[id(parameter)] += 1
        assert parameter.sink is not None
        gradient = parameter.sink.main_grad
        for segment in parameter.shard.segments:
            self._seen.append((segment.name, micro_batch, torch.isfinite(gradient[segment.local.slices()]).all()))

    @property
    def first(self) -> tuple[str, int]:
        """The name of the first bad gradient and the micro-batch that made it, ("", -1) where all were good."""
        if self._seen:
            good = torch.stack([flag for _, _, flag in self._seen]).tolist()
            for (name, micro_batch, _), is_good in zip(self._seen, good, strict=True):
                if not is_good:
                    return name, micro_batch
        return "", -1


@torch.no_grad()
def bad_state(engine: Engine) -> tuple[str, bool]:
    """The name of the first weight or moment here that is not finite, and whether this rank is the one that updates it.

    ("", False) where all are finite. Waits for the device.
    """
    engine.finish()
    for box in chain(engine.weight_boxes(write=False), engine.optimizer_boxes(write=False)):
        if not torch.isfinite(box.tensor).all():
            return box.name, True
    parameters = chain.from_iterable(chunk.parameters() for chunk in engine.chunks)
    for parameter in filter(Tensor.numel, parameters):  # (stage 3 keeps its weights elsewhere)
        for segment in parameter.shard.segments:
            if not torch.isfinite(parameter[segment.local.slices()]).all():
                return segment.name, False
    return "", False


def own_finding(
    rank: int, info: StepInfo, state: tuple[str, bool] = ("", False), gradient: tuple[str, int] = ("", -1)
) -> Finding:
    """What this rank knows of a step that has ended, from `bad_state` and `GradientLook.first` too where somebody looked."""
    squared_norm, loss = torch.isfinite(info.part[:2]).tolist()
    (state_name, updates), (name, micro_batch) = state, gradient
    return Finding(rank, state_name, updates, not loss, name, micro_batch, not squared_norm)


@dataclass(frozen=True)
class Cause:
    """Where numbers that were not finite came from, as far as is known: on which ranks, and what of the first one's."""

    ranks: list[int]
    first: Finding | None

    def __str__(self) -> str:
        if self.first is None:
            return "no rank has found it in its own part"
        others = self.ranks[1:]
        listed = ", ".join(map(str, others[:NAMED_RANKS])) + (" ..." if len(others) > NAMED_RANKS else "")
        return f"{self.first}" + (f" (as on rank {listed})" if others else "")


def find_cause(findings: Sequence[Finding], topology: Topology) -> Cause:
    """The ranks to look at, the likeliest first.

    A bad state explains all else. Otherwise it began where a loss or a gradient was bad before it met other ranks' ones; of
    a pipeline's ranks the last one made its gradients first. Where nobody looked at gradients, a shard of their sum is known.
    """

    def likeliest_first(finding: Finding) -> tuple:
        return not finding.updates, not finding.loss, -topology.coordinates(finding.rank).pp, finding.rank

    for is_bad in (
        lambda finding: bool(finding.state),
        lambda finding: finding.loss or bool(finding.gradient),
        lambda finding: finding.shard,
    ):
        bad = sorted(filter(is_bad, findings), key=likeliest_first)
        if bad:
            return Cause([finding.rank for finding in bad], bad[0])
    return Cause([], None)
