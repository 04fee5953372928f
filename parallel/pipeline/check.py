"""The checker: proves a schedule complete, ordered and free of deadlock, and costs it, without a GPU.

The model: a rank runs its actions in order; an action starts when its rank is free and what it depends on has arrived. Sends
are buffered and receives are posted ahead, so a send never blocks its rank; what remains as a deadlock is a cycle of
dependencies. NCCL pairs messages by their order and not by tags, so in each direction two ranks must need messages in the
order in which they are sent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import Action, Schedule

BACKWARD = ("B", "I")


class ScheduleError(ValueError):
    """A list of actions that is not a valid schedule; the message names the first offending action."""


@dataclass(frozen=True)
class Costs:
    """Seconds of one chunk's action, and of moving one activation between ranks."""

    forward: float = 1.0
    backward: float = 2.0
    input_backward: float = 1.0
    weight_backward: float = 1.0
    send: float = 0.0

    def of(self, action: Action) -> float:
        kinds = {"F": self.forward, "B": self.backward, "I": self.input_backward, "W": self.weight_backward}
        return kinds[action.kind]


@dataclass(frozen=True)
class Report:
    """What a schedule costs.

    `peak_activations[rank]`: the most (micro-batch, chunk) pairs whose forward pass has run and whose backward pass (B or I)
    has not. `makespan_seconds`: from the first action's start to the last one's end. `bubble`: idle share of all ranks' time.
    `spans[rank]`: (action, start, end).
    """

    peak_activations: list[int]
    makespan_seconds: float
    bubble: float
    spans: list[list[tuple[Action, float, float]]] = field(repr=False)


def check_schedule(
    schedule: Schedule, placement: Placement, micro_batches: int, costs: Costs | None = None, backward: bool = True
) -> Report:
    """Prove `schedule` valid and cost it. Raises ScheduleError naming the pp rank and the action.

    `backward=False` checks a list of forward passes alone.
    """
    if len(schedule) != placement.pp:
        raise ScheduleError(f"the schedule has {len(schedule)} lists for {placement.pp} pp ranks")
    for rank, actions in enumerate(schedule):
        _check_complete(rank, actions, placement.chunks, micro_batches, backward)
    spans = _simulate(schedule, placement, costs or Costs())
    _check_message_order(schedule, placement)
    makespan = max((rank_spans[-1][2] for rank_spans in spans if rank_spans), default=0.0)
    busy = sum(end - start for rank_spans in spans for _, start, end in rank_spans)
    bubble = 1.0 - busy / (makespan * placement.pp) if makespan else 0.0
    return Report([_peak(actions) for actions in schedule], makespan, bubble, spans)


def _check_complete(rank: int, actions: list[Action], chunks: int, micro_batches: int, backward: bool) -> None:
    """Each micro-batch and chunk once per kind, F before its backward, I before its W."""
    done: Counter[Action] = Counter()
    for place, action in enumerate(actions):
        where = f"pp rank {rank}, action {place} ({action})"
        pair = (action.micro_batch, action.chunk)
        if action.kind not in ("F", "B", "I", "W"):
            raise ScheduleError(f"{where}: there is no kind {action.kind!r}")
        if not (0 <= action.micro_batch < micro_batches and 0 <= action.chunk < chunks):
            raise ScheduleError(f"{where}: there are {micro_batches} micro-batches and {chunks} chunks")
        if action.kind != "F" and not backward:
            raise ScheduleError(f"{where}: only forward passes are wanted")
        if done[action]:
            raise ScheduleError(f"{where}: is there twice")
        if action.kind in BACKWARD and not done[Action("F", *pair)]:
            raise ScheduleError(f"{where}: runs before its forward pass")
        if action.kind in BACKWARD and any(done[Action(kind, *pair)] for kind in BACKWARD):
            raise ScheduleError(f"{where}: the backward pass has run already")
        if action.kind == "W" and not done[Action("I", *pair)]:
            raise ScheduleError(f"{where}: runs before its I")
        done[action] += 1
    for m in range(micro_batches):
        for chunk in range(chunks):
            whole, split = done[Action("B", m, chunk)], done[Action("I", m, chunk)] and done[Action("W", m, chunk)]
            if not done[Action("F", m, chunk)] or (backward and not (whole or split)):
                raise ScheduleError(f"pp rank {rank}: micro-batch {m} of chunk {chunk} is not finished")


def _dependency(action: Action, rank: int, placement: Placement) -> tuple[str, int, int] | None:
    """What must have run on another stage: ("F" or "B", micro-batch, global stage), or None."""
    stage = placement.stage(rank, action.chunk)
    if action.kind == "F" and stage > 0:
        return "F", action.micro_batch, stage - 1
    if action.kind in BACKWARD and stage < placement.num_stages - 1:
        return "B", action.micro_batch, stage + 1
    return None


def _simulate(schedule: Schedule, placement: Placement, costs: Costs) -> list[list[tuple[Action, float, float]]]:
    """Start and end of each action. Raises ScheduleError where no rank can go on."""
    ended: dict[tuple[str, int, int], tuple[float, int]] = {}  # (kind, micro-batch, stage) -> (time, rank)
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in schedule]
    remaining = sum(map(len, schedule))
    while remaining:
        before = remaining
        for rank, actions in enumerate(schedule):
            while len(spans[rank]) < len(actions):
                action = actions[len(spans[rank])]
                needed = _dependency(action, rank, placement)
                if needed is not None and needed not in ended:
                    break
                arrival = 0.0
                if needed is not None:
                    end, source = ended[needed]
                    arrival = end + (costs.send if source != rank else 0.0)
                start = max(arrival, spans[rank][-1][2] if spans[rank] else 0.0)
                end = start + costs.of(action)
                spans[rank].append((action, start, end))
                kind = "B" if action.kind in BACKWARD else action.kind
                ended[kind, action.micro_batch, placement.stage(rank, action.chunk)] = (end, rank)
                remaining -= 1
        if remaining == before:
            stuck = [(r, schedule[r][len(spans[r])]) for r in range(len(schedule)) if len(spans[r]) < len(schedule[r])]
            listed = "; ".join(f"pp rank {rank} waits in {action}" for rank, action in stuck)
            raise ScheduleError(f"deadlock: {listed}")
    return spans


def _check_message_order(schedule: Schedule, placement: Placement) -> None:
    """On every (direction, source, target), the target needs messages in the order in which the source makes them."""
    made: dict[tuple[str, int, int], list[tuple[int, int]]] = defaultdict(list)  # -> (micro-batch, stage it comes out of)
    for rank, actions in enumerate(schedule):
        for action in actions:
            stage = placement.stage(rank, action.chunk)
            kind, neighbour = ("F", stage + 1) if action.kind == "F" else ("B", stage - 1)
            if action.kind != "W" and 0 <= neighbour < placement.num_stages:
                made[kind, rank, placement.rank(neighbour)].append((action.micro_batch, stage))
    arriving = {lane: iter(messages) for lane, messages in made.items()}
    for rank, actions in enumerate(schedule):
        for place, action in enumerate(actions):
            needed = _dependency(action, rank, placement)
            if needed is None or placement.rank(needed[2]) == rank:
                continue
            kind, micro_batch, stage = needed
            source = placement.rank(stage)
            first = next(arriving[kind, source, rank])
            if first != (micro_batch, stage):
                raise ScheduleError(
                    f"pp rank {rank}, action {place} ({action}): needs {kind}{micro_batch} of stage {stage}, but the next "
                    f"message from pp rank {source} is {kind}{first[0]} of stage {first[1]}"
                )


def _peak(actions: list[Action]) -> int:
    live = peak = 0
    for action in actions:
        live += (action.kind == "F") - (action.kind in BACKWARD)
        peak = max(peak, live)
    return peak
