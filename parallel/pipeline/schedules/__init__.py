"""Pipeline schedules: pure functions from sizes to lists of actions, one list per pp rank.

An action says what to compute, never what to send: sends and receives follow from the dependencies. Every schedule makes the
gradients of each chunk in the order of the micro-batches, so they add up in the same order in each of them.
"""

from parallel.pipeline.schedules.action import Action, Schedule
from parallel.pipeline.schedules.table import SCHEDULES, ScheduleKind
from parallel.pipeline.schedules.whole_backward import forward_only, gpipe, interleaved, one_forward_one_backward

__all__ = [
    "SCHEDULES",
    "Action",
    "Schedule",
    "ScheduleKind",
    "forward_only",
    "gpipe",
    "interleaved",
    "one_forward_one_backward",
]
