"""What a check says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report. WARN: a run works, and something is missing or slow. FAIL: a run would end badly.

    `fix` is the smallest change that helps; a PASS has none.
    """

    state: State
    subject: str
    text: str
    fix: str = ""

    def lines(self) -> list[str]:
        """For a terminal."""
        first = f"{self.state}  {self.subject:<18} {self.text}"
        return [first, f"      {'':<18} fix: {self.fix}"] if self.fix else [first]


def passed(subject: str, text: str) -> Finding:
    return Finding("PASS", subject, text)


def warned(subject: str, text: str, fix: str) -> Finding:
    return Finding("WARN", subject, text, fix)


def failed(subject: str, text: str, fix: str) -> Finding:
    return Finding("FAIL", subject, text, fix)


def summary(findings: Iterable[Finding]) -> str:
    """How many there are of each state."""
    states = [finding.state for finding in findings]
    return ", ".join(f"{states.count(state)} {state}" for state in ("PASS", "WARN", "FAIL"))
