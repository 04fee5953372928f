"""How often a run reads each source of its mixture: the table of the LLaMA paper, and limits on epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CAPPED_PERIOD = 10**5
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class MixtureRow:
    """One source of a mixture over a run; `tokens` counts all that is read of it, also before the run was resumed."""

    name: str
    share: float  # of the samples, from here on
    unique_tokens: int  # in an epoch
    tokens: int
    max_epochs: float | None = None
    sample_tokens: int = 0  # by which a limit may be exceeded

    @property
    def epochs(self) -> float:
        return self.tokens / self.unique_tokens

    @property
    def exceeds(self) -> bool:
        return self.max_epochs is not None and self.tokens > self.max_epochs * self.unique_tokens + self.sample_tokens


def table_lines(rows: Sequence[MixtureRow]) -> list[str]:
    """The layout of Table 1 of the LLaMA paper: sampling proportion, epochs and size, here in tokens."""
    width = max(len(row.name) for row in rows)
    capped = any(row.max_epochs is not None for row in rows)
    lines = [f"{'source':<{width}}  proportion  epochs    tokens    unique" + ("  max epochs" if capped else "")]
    for row in rows:
        cap = "" if row.max_epochs is None else f"{row.max_epochs:12.2f}"
        mark = " exceeded" if row.exceeds else ""
        lines.append(
            f"{row.name:<{width}}  {row.share:9.2%}   {row.epochs:6.2f}  {format_tokens(row.tokens):>8}  "
            f"{format_tokens(row.unique_tokens):>8}{cap}{mark}"
        )
    return lines


def format_tokens(tokens: float) -> str:
    """A number of tokens with three or four digits and a unit: 937 B, 1.40 T, 3,000."""
    for size, unit in UNITS[:-1]:
        if tokens >= size:
            return f"{tokens / size:.{2 if tokens < 10 * size else 1 if tokens < 100 * size else 0}f} {unit}"
    return f"{tokens:,.0f}"


def redistribute(weights: Sequence[float], room: Sequence[float], amount: float) -> list[float] | None:
    """Splits `amount` in proportion to `weights`, to none more than its `room` (which may be infinite).

    What full sources cannot take goes to the others in proportion to their weights. None where all are full.
    """
    given = [0.0] * len(weights)
    open_sources = set(range(len(weights)))
    while open_sources:
        left = amount - sum(given[number] for number in range(len(weights)) if number not in open_sources)
        total = sum(weights[number] for number in open_sources)
        full = {number for number in open_sources if left * weights[number] / total > room[number]}
        for number in open_sources:
            given[number] = max(0.0, room[number]) if number in full else left * weights[number] / total
        if not full:
            return given
        open_sources -= full
    return None


def capped_weights(given: Sequence[float], room: Sequence[float], period: int = CAPPED_PERIOD) -> list[int]:
    """Integer weights for the amounts of `redistribute`, rounded so that a full source stays below its room."""
    total = sum(given)
    shares = [math.floor(amount / total * period) for amount in given]
    not_full = [number for number, amount in enumerate(given) if amount < room[number]]
    largest = max(not_full or range(len(given)), key=given.__getitem__)
    shares[largest] += period - sum(shares)
    return shares
