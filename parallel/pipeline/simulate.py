"""The cost model: when each action of a schedule runs, and where a schedule that never ends is stuck.

A rank runs its actions in order; an action starts when its rank is free and what it needs has arrived. A lane is the sequence
of messages of one kind (F: activations, B: gradients) from one rank to another. Each lane has a communicator of its own, and a
transfer is a rendezvous: it starts when the message is made, its receive is posted and the lane is free.

Why nothing else can block, if both ends of each lane have the same order (`check` proves it): when a rank waits for a message,
it has received all earlier ones of that lane and posted this one's receive. So the message travels as soon as it is made,
whatever happens in other lanes, and making it waits for actions alone. What remains as a deadlock is a circle of actions, and
the simulation finds it. With blocking sends a rank waits for its receiver too, and the simulation counts that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from parallel.pipeline.costs import Costs
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import Action, Schedule
from parallel.pipeline.schedules.action import source_stage, target_stage

Span = tuple[Action, float, float]  # action, start, end in seconds


class ScheduleError(ValueError):
    """A list of actions that is not a valid schedule; the message names the first offending action."""


@dataclass
class _Lane:
    """`reached[k]`: when the receiver came to the action that needs message k."""

    reached: list[float] = field(default_factory=list)
    num_sent: int = 0
    num_received: int = 0
    last_arrival: float = 0.0

    def posted(self, message: int, ahead: int) -> float | None:
        """When the receive of a message is posted; None if that is not known yet."""
        if message < ahead:
            return 0.0
        return self.reached[message - ahead] if message - ahead < len(self.reached) else None


class _Step(NamedTuple):
    """What one kind of action on one stage takes: times are lists by micro-batch, None where not known yet."""

    seconds: float
    needed: list[float | None] | None
    made: list[float | None]
    lane_in: _Lane | None
    lane_out: _Lane | None


class Simulation:
    """Runs all ranks' lists against the clock. `spans[rank]` grows as `run` goes on."""

    def __init__(self, schedule: Schedule, placement: Placement, micro_batches: int, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        self.spans: list[list[Span]] = [[] for _ in schedule]
        self.free = [0.0] * placement.pp
        self.sending: list[tuple[_Lane, int] | None] = [None] * placement.pp  # a blocking send: its lane and place there
        self.steps = _steps(placement, micro_batches, costs)

    def run(self) -> list[list[Span]]:
        """Start and end of each action. Raises ScheduleError where no rank can go on."""
        ranks = range(len(self.schedule))
        while any([self._advance(rank) for rank in ranks]):
            pass
        stuck = [rank for rank in ranks if len(self.spans[rank]) < len(self.schedule[rank]) or self.sending[rank]]
        if stuck:
            raise ScheduleError("deadlock: " + "; ".join(self._where(rank) for rank in stuck))
        return self.spans

    def _where(self, rank: int) -> str:
        if self.sending[rank]:
            return f"pp rank {rank} waits to send what {self.spans[rank][-1][0]} made"
        return f"pp rank {rank} waits in {self.schedule[rank][len(self.spans[rank])]}"

    def _advance(self, rank: int) -> bool:
        """Run a rank until it needs a time that is not known yet. True if it got anywhere."""
        actions, spans, steps = self.schedule[rank], self.spans[rank], self.steps[rank]
        before = len(spans)
        sent = self._finish_send(rank)
        while len(spans) < len(actions) and self.sending[rank] is None:
            action = actions[len(spans)]
            kind, micro_batch, chunk = action
            seconds, needed, made, lane_in, lane_out = steps[kind][chunk]
            start = self.free[rank]
            if needed is not None:
                arrival = self._arrival(start, needed[micro_batch], lane_in)
                if arrival is None:
                    break
                start = max(start, arrival)
            end = self.free[rank] = made[micro_batch] = start + seconds
            spans.append((action, start, end))
            if self.costs.blocking_sends and lane_out is not None:
                self.sending[rank] = lane_out, lane_out.num_sent
                lane_out.num_sent += 1
                self._finish_send(rank)
        return sent or len(spans) > before

    def _arrival(self, reached: float, made: float | None, lane: _Lane | None) -> float | None:
        """When a lane's next message, made at `made`, is here for a rank that came for it at `reached`; None if unknown."""
        if lane is None:  # from a stage of the same rank
            return made
        if len(lane.reached) == lane.num_received:
            lane.reached.append(reached)
        if made is None:
            return None
        posted = lane.posted(lane.num_received, self.costs.receives_ahead)
        lane.num_received += 1
        lane.last_arrival = max(made, posted, lane.last_arrival) + self.costs.send
        return lane.last_arrival

    def _finish_send(self, rank: int) -> bool:
        """Let a rank go on whose blocking send is through. True if there was one and it is."""
        if self.sending[rank] is None:
            return False
        lane, message = self.sending[rank]
        posted = lane.posted(message, self.costs.receives_ahead)
        if posted is None:
            return False
        self.free[rank] = max(self.free[rank], posted) + self.costs.send
        self.sending[rank] = None
        return True


def _steps(placement: Placement, micro_batches: int, costs: Costs) -> list[dict[str, list[_Step]]]:
    """Per rank and kind, the step of each chunk. B and I share their messages and times."""
    num_stages = placement.num_stages
    seconds = costs.seconds(num_stages)
    times: dict[str, list[list[float | None]]] = {
        kind: [[None] * micro_batches for _ in range(num_stages)] for kind in ("F", "B", "W")
    }
    lanes: dict[tuple[str, int, int], _Lane] = {}

    def lane(kind: str, source: int, target: int) -> _Lane | None:
        ends = placement.rank(source), placement.rank(target)
        return lanes.setdefault((kind, *ends), _Lane()) if ends[0] != ends[1] else None

    def step(kind: str, stage: int) -> _Step:
        message = "B" if kind == "I" else kind
        source, target = source_stage(kind, stage, num_stages), target_stage(kind, stage, num_stages)
        return _Step(
            seconds[kind][stage],
            None if source is None else times[message][source],
            times[message][stage],
            None if source is None else lane(message, source, stage),
            None if target is None else lane(message, stage, target),
        )

    stages = [[placement.stage(rank, chunk) for chunk in range(placement.chunks)] for rank in range(placement.pp)]
    return [{kind: [step(kind, stage) for stage in of_rank] for kind in "FBIW"} for of_rank in stages]
