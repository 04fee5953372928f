"""What pipeline ranks lose by waiting for one another, and how many micro-batches they hold meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from megatron_llama.plan.job import Layout
from parallel.pipeline.check import check_schedule
from parallel.pipeline.costs import Costs
from parallel.pipeline.schedules import SCHEDULES

CLOSED = ("1f1b", "gpipe", "interleaved")  # schedules whose waiting and memory have a formula
MOST_SIMULATED = 16  # pipeline ranks; schedules without a formula waste the same share beyond
WARM = 4  # a schedule is steady after that many micro-batches per rank: more of them add their own time and nothing else


def bubble_seconds(layout: Layout, stages: Sequence[float]) -> float:
    """Idle seconds of the slowest rank in a step. `stages`: seconds of one micro-batch on each pipeline rank.

    1f1b: while the pipeline fills and empties, the time of a micro-batch on all other ranks; interleaving divides it by the
    chunks (Narayanan et al. 2021, section 2.2), and a group of micro-batches that is not full leaves its places empty. Other
    schedules: the share of that which their action lists, simulated, leave idle.
    """
    if layout.pp == 1:
        return 0.0
    slowest = max(stages)
    others = sum(stages) - slowest
    if layout.schedule not in CLOSED:
        return others * idle_micro_batches(layout.schedule, layout.pp, layout.chunks, layout.micro_batches) / (layout.pp - 1)
    idle = others / layout.chunks
    if layout.schedule == "interleaved" and layout.micro_batches % layout.pp:
        idle += (layout.chunks - 1) / layout.chunks * slowest * (-layout.micro_batches % layout.pp)
    return idle


def idle_micro_batches(schedule: str, pp: int, chunks: int, micro_batches: int) -> float:
    """Idle time of a rank in units of a micro-batch's time on it, with equal ranks: pp - 1 in 1f1b."""
    simulated = min(pp, MOST_SIMULATED)
    makespan, _ = _simulated(schedule, simulated, chunks, _steady(simulated, micro_batches))
    return (makespan - _steady(simulated, micro_batches)) * (pp - 1) / max(1, simulated - 1)


@lru_cache(maxsize=4096)
def held_micro_batches(schedule: str, pp: int, chunks: int, micro_batches: int) -> tuple[float, ...]:
    """The most that each rank keeps for backward passes, in units of a micro-batch's activations on it.

    What a split backward pass leaves for its weight gradients counts as whole, as in the papers. Of formulas: Narayanan et al.
    2021, section 2.2; 1f1b holds one micro-batch for each rank from its own on.
    """
    if schedule == "gpipe":
        return (float(micro_batches),) * pp
    if schedule == "1f1b":
        return tuple(float(min(micro_batches, pp - rank)) for rank in range(pp))
    if schedule == "interleaved":
        passes = [2 * (pp - rank - 1) + (chunks - 1) * pp + 1 for rank in range(pp)]
        return tuple(min(float(micro_batches), count / chunks) for count in passes)
    simulated = min(pp, MOST_SIMULATED)
    _, held = _simulated(schedule, simulated, chunks, _steady(simulated, micro_batches))
    return tuple(held[rank * simulated // pp] * pp / simulated for rank in range(pp))


def _steady(pp: int, micro_batches: int) -> int:
    """As few micro-batches as behave alike: the same remainder by pp."""
    return micro_batches if micro_batches <= WARM * pp else WARM * pp + micro_batches % pp


@lru_cache(maxsize=1024)
def _simulated(schedule: str, pp: int, chunks: int, micro_batches: int) -> tuple[float, tuple[float, ...]]:
    """Makespan in micro-batches of a rank, and peaks, of a schedule's own action lists with equal stages."""
    kind = SCHEDULES[schedule]
    placement = kind.placement(pp, chunks)
    third = 1 / (3 * chunks)
    costs = Costs(third, 2 * third, third, third, activation=1 / chunks, queued=1 / chunks)
    report = check_schedule(kind(placement, micro_batches), placement, micro_batches, costs)
    return report.makespan_seconds, tuple(report.peak_memory)
