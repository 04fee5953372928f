"""The checker: proves a schedule complete, ordered and free of deadlock, and costs it, without a GPU.

Complete: each micro-batch, chunk and kind once, in an order that makes sense on its rank. Free of deadlock: both ends of every
lane have the messages in the same order, which NCCL needs as it pairs them by order and not by tags, and no circle of waiting
actions (`simulate` has the model and the argument). Ordered: each chunk adds up its gradients in the order of the
micro-batches, so every schedule computes the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from parallel.pipeline.costs import Costs, per_stage
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import Action, Schedule
from parallel.pipeline.schedules.action import source_stage, target_stage
from parallel.pipeline.simulate import ScheduleError, Simulation, Span

__all__ = ["Costs", "Report", "ScheduleError", "check_schedule"]

_BITS = {"F": 1, "B": 2, "I": 4, "W": 8}
_WANTED_BEFORE = {"F": 0, "B": 1, "I": 1, "W": 1 | 4}  # the kinds that have run when an action comes
_FINISHED = {"forward": (1,), "training": (1 | 2, 1 | 4 | 8)}


@dataclass(frozen=True)
class Report:
    """What a schedule costs, all seconds and sizes those of the `Costs`.

    `peak_activations[rank]`: the most (micro-batch, chunk) pairs whose forward pass has run and whose backward pass (B or I)
    has not. `peak_memory[rank]`: the most that activations and what I leaves for W take together. `makespan_seconds`: from the
    first action's start to the last one's end. `bubble`: idle share of all ranks' time. `idle_seconds[rank]`: idle time
    between the rank's own first and last action, which is what papers call the bubble. `spans[rank]`: (action, start, end).
    """

    peak_activations: list[int]
    peak_memory: list[float]
    makespan_seconds: float
    bubble: float
    idle_seconds: list[float]
    spans: list[list[Span]] = field(repr=False)


def check_schedule(
    schedule: Schedule, placement: Placement, micro_batches: int, costs: Costs | None = None, backward: bool = True
) -> Report:
    """Prove `schedule` valid and cost it. Raises ScheduleError naming the pp rank and the action.

    `backward=False` checks a list of forward passes alone.
    """
    costs = costs or Costs()
    if len(schedule) != placement.pp:
        raise ScheduleError(f"the schedule has {len(schedule)} lists for {placement.pp} pp ranks")
    for rank, actions in enumerate(schedule):
        _check_complete(rank, actions, placement.chunks, micro_batches, backward)
    _check_message_order(schedule, placement)
    spans = Simulation(schedule, placement, micro_batches, costs).run()
    for rank, actions in enumerate(schedule):
        _check_gradient_order(rank, actions)
    busy = [sum(end - start for _, start, end in of_rank) for of_rank in spans]
    makespan = max((of_rank[-1][2] for of_rank in spans if of_rank), default=0.0)
    return Report(
        peak_activations=[_peak_activations(actions) for actions in schedule],
        peak_memory=[_peak_memory(rank, actions, placement, costs) for rank, actions in enumerate(schedule)],
        makespan_seconds=makespan,
        bubble=1.0 - sum(busy) / (makespan * placement.pp) if makespan else 0.0,
        idle_seconds=[of_rank[-1][2] - of_rank[0][1] - busy[rank] if of_rank else 0.0 for rank, of_rank in enumerate(spans)],
        spans=spans,
    )


def _check_complete(rank: int, actions: list[Action], chunks: int, micro_batches: int, backward: bool) -> None:
    """Each micro-batch and chunk once per kind, F before its backward, I before its W."""
    done = [0] * (micro_batches * chunks)  # the bits of the kinds that have run
    for place, action in enumerate(actions):
        kind, micro_batch, chunk = action
        exists = 0 <= micro_batch < micro_batches and 0 <= chunk < chunks and kind in _BITS
        pair = micro_batch * chunks + chunk
        if not exists or done[pair] != _WANTED_BEFORE[kind] or (kind != "F" and not backward):
            problem = _problem(action, done[pair], backward) if exists else _unknown(action, chunks, micro_batches)
            raise ScheduleError(f"pp rank {rank}, action {place} ({action}): {problem}")
        done[pair] |= _BITS[kind]
    finished = _FINISHED["training" if backward else "forward"]
    for pair, bits in enumerate(done):
        if bits not in finished:
            raise ScheduleError(f"pp rank {rank}: micro-batch {pair // chunks} of chunk {pair % chunks} is not finished")


def _unknown(action: Action, chunks: int, micro_batches: int) -> str:
    if action.kind not in _BITS:
        return f"there is no kind {action.kind!r}"
    return f"there are {micro_batches} micro-batches and {chunks} chunks"


def _problem(action: Action, done: int, backward: bool) -> str:
    """Why an action can't come where `done` are the bits of what has run of its micro-batch and chunk."""
    if action.kind != "F" and not backward:
        return "only forward passes are wanted"
    if done & _BITS[action.kind]:
        return "is there twice"
    if action.kind == "W":
        return "runs before its I"
    if not done & _BITS["F"]:
        return "runs before its forward pass"
    return "the backward pass has run already"


def _check_message_order(schedule: Schedule, placement: Placement) -> None:
    """In every lane, the target needs messages in the order in which the source makes them."""
    made: dict[tuple[str, int, int], list[tuple[int, int]]] = defaultdict(list)  # -> (micro-batch, stage it comes out of)
    needed: dict[tuple[str, int, int], list[tuple[int, int]]] = defaultdict(list)
    for rank, actions in enumerate(schedule):
        edges = {kind: [_edges(kind, rank, chunk, placement) for chunk in range(placement.chunks)] for kind in _BITS}
        for kind, micro_batch, chunk in actions:
            stage, lane_out, source, lane_in = edges[kind][chunk]
            if lane_out is not None:
                made[lane_out].append((micro_batch, stage))
            if lane_in is not None:
                needed[lane_in].append((micro_batch, source))
    for lane, wanted in needed.items():
        for message, first in zip(wanted, made[lane], strict=True):
            if message != first:
                raise ScheduleError(_misplaced(schedule, placement, lane, message, first))


def _edges(kind: str, rank: int, chunk: int, placement: Placement) -> tuple:
    """(stage, lane of the message that the action makes or None, source stage, lane of the one that it needs or None)."""
    stage = placement.stage(rank, chunk)
    source = source_stage(kind, stage, placement.num_stages)
    target = target_stage(kind, stage, placement.num_stages)
    direction = "F" if kind == "F" else "B"
    lane_out = None if target is None else (direction, rank, placement.rank(target))
    lane_in = None if source is None else (direction, placement.rank(source), rank)
    inside = direction, rank, rank
    return stage, None if lane_out == inside else lane_out, source, None if lane_in == inside else lane_in


def _misplaced(
    schedule: Schedule, placement: Placement, lane: tuple[str, int, int], message: tuple[int, int], first: tuple[int, int]
) -> str:
    """Name the action that needs `message` where `first` is the next one of the lane."""
    direction, source, target = lane
    stage = message[1] + (1 if direction == "F" else -1)
    kinds = ("F",) if direction == "F" else ("B", "I")
    wanted = [(kind, message[0], placement.chunk(stage)) for kind in kinds]
    place, action = next((place, action) for place, action in enumerate(schedule[target]) if action in wanted)
    return (
        f"pp rank {target}, action {place} ({action}): needs {direction}{message[0]} of stage {message[1]}, but the next "
        f"message from pp rank {source} is {direction}{first[0]} of stage {first[1]}"
    )


def _check_gradient_order(rank: int, actions: list[Action]) -> None:
    """Each chunk runs its B and I, and its B and W, in the order of the micro-batches: these are the orders of the sums."""
    following: dict[tuple[str, int], int] = defaultdict(int)  # (I or W, chunk) -> micro-batch
    for place, action in enumerate(actions):
        kind, micro_batch, chunk = action
        for part in {"F": "", "B": "IW"}.get(kind, kind):
            if micro_batch != following[part, chunk]:
                raise ScheduleError(
                    f"pp rank {rank}, action {place} ({action}): adds to the gradients of chunk {chunk} before micro-batch "
                    f"{following[part, chunk]} does, so their last bits would differ from those of other schedules"
                )
            following[part, chunk] += 1


def _peak_activations(actions: list[Action]) -> int:
    live = peak = 0
    for action in actions:
        if action.kind == "F":
            live += 1
            peak = max(peak, live)
        elif action.kind != "W":
            live -= 1
    return peak


def _peak_memory(rank: int, actions: list[Action], placement: Placement, costs: Costs) -> float:
    stages = [placement.stage(rank, chunk) for chunk in range(placement.chunks)]
    activation, queued = per_stage(costs.activation, placement.num_stages), per_stage(costs.queued, placement.num_stages)
    change = {
        "F": [activation[stage] for stage in stages],
        "B": [-activation[stage] for stage in stages],
        "I": [queued[stage] - activation[stage] for stage in stages],
        "W": [-queued[stage] for stage in stages],
    }
    live = peak = 0.0
    for kind, _, chunk in actions:
        live += change[kind][chunk]
        peak = max(peak, live)
    return peak
