"""The results of a campaign as a page: a table by the rows of the matrix, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean

from tests.faults.campaign import FIRST_TIMEOUT, LEAST_TIMEOUT, Result
from tests.faults.matrix import ROWS

ELSEWHERE = {
    "F6": "that a slow rank is named: `tests/megatron_llama/watching/test_stragglers.py`",
    "F11": "gradients that are not finite: `tests/megatron_llama/watching/test_watch.py`",
    "F12": "loss spikes: `tests/megatron_llama/watching/test_watch.py`",
    "F16": "two jobs in one directory, stale locks: `tests/megatron_llama/test_run_lock.py`",
    "F18": "hostile files: `tests/parallel/checkpoint/test_damage.py`, `tests/megatron_llama/interop`",
    "F21": "the order of fsync and rename: `tests/parallel/checkpoint/test_save.py`",
}
HEADS = (
    *("row", "what happens", "faults", "lost", "steps redone"),
    *("death detected, s", "hang beyond limit, s", "first new step, s"),
)
TIMES = ("death_seconds", "hang_seconds", "restart_seconds")  # of a result
INTRODUCTION = """\
Each run is a real training of 1, 2 or 4 ranks (gloo, CPU) under the supervisor, in which processes are killed, stopped or
slowed down, or meet with errors, each at a place of its own. Afterwards everything is compared with a run in the same layout
that nothing happened to: the loss and gradient norm of each step, also of steps that were done twice, and all weights and
optimizer state of the last checkpoint, **bit for bit**; where it goes on in another layout (F13), the losses within 1e-6. The
exit codes, the rank that the report names, the checkpoints that are there, and that nothing unfinished is left, are checked
too. A run is *lost* where any of that is not as it has to be.

- *Steps redone*: complete steps that a restart takes back, mean and most. Every second step is saved here, in the background
  unless said otherwise.
- *Death detected*: from the fault until the supervisor has written its report, stacks of all ranks included.
- *Hang beyond limit*: what is added to the time for which a rank of that phase may stand still (here {least:g} s in steps,
  {first:g} s elsewhere).
- *First new step*: from the supervisor's decision to start again until the first new step has ended.
"""


def page(results: Sequence[Result], planned: int, command: str, environment: str, seconds: float) -> str:
    """The whole page, of as many results as were `planned`, or fewer."""
    lost = [result for result in results if result.wrong]
    faults = sum(result.faults for result in results)
    lines = [
        "# Faults injected, and what came of them",
        "",
        f"**{faults} faults in {len(results)} runs, of which {len(lost)} were lost.**"
        + (f" Stopped early: {planned} runs were planned." if len(results) < planned else ""),
        "",
        f"    {command}",
        "",
        f"{environment} It took {seconds / 60:.0f} minutes.",
        "",
        INTRODUCTION.format(least=LEAST_TIMEOUT, first=FIRST_TIMEOUT),
        *_table([HEADS, *_rows(results)]),
        "",
        "Rows of the matrix that are tested elsewhere:",
        "",
        *(f"- {row}: {text}" for row, text in ELSEWHERE.items()),
        "",
    ]
    if lost:
        lines += ["## Lost", "", *(f"- {result.name}: {'; '.join(result.wrong)}" for result in lost), ""]
    return "\n".join(lines)


def _rows(results: Sequence[Result]) -> Iterable[tuple[str, ...]]:
    present = [row for row in ROWS if any(result.row == row for result in results)]
    for row in present:
        yield row, ROWS[row], *_figures([result for result in results if result.row == row])
    yield "all", "", *_figures(results)


def _figures(results: Sequence[Result]) -> tuple[str, ...]:
    lost = sum(bool(result.wrong) for result in results)
    steps = [n for result in results for n in result.redone_steps]
    seconds = [[s for result in results for s in getattr(result, name)] for name in TIMES]
    return str(sum(result.faults for result in results)), str(lost), _spread(steps, 1), *(_spread(part, 2) for part in seconds)


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean and most."""
    return f"{mean(values):.{digits}f}, {max(values):.{digits}f}".removesuffix(".0") if values else "-"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
