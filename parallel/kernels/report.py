"""The kernel table for people: what a machine has, and the reference page's list of providers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from parallel.kernels.providers import ANY_DTYPE, ANYWHERE, Provider, Workload, short
from parallel.kernels.table import ROWS


def table_lines(workload: Workload, chosen: Mapping[str, str]) -> Iterator[str]:
    """A line for each provider of each operation: chosen, available, unverified, or missing and why.

    `chosen`: operation -> provider, as `Kernels.names` has it.
    """
    for operation, row in ROWS.items():
        for place, provider in enumerate(row):
            state = "chosen" if chosen.get(operation) == provider.name else _state(provider, workload)
            yield f"{'' if place else operation:<14} {provider.name:<19} {state}"


def _state(provider: Provider, workload: Workload) -> str:
    reason = provider.missing(workload)
    if reason is not None:
        return f"missing: {reason}"
    device = workload.device.type
    return "available" if device in provider.verified else f"unverified: it has never run on {device}; its name chooses it"


def markdown_lines() -> Iterator[str]:
    """The providers of each operation in order of preference, for the documentation."""
    yield "| operation | provider | runs on | dtypes | needs | has run on |"
    yield "|---|---|---|---|---|---|"
    for operation, row in ROWS.items():
        for provider in row:
            dtypes = "all" if provider.dtypes == ANY_DTYPE else ", ".join(map(short, provider.dtypes))
            cells = (f"`{operation}`", f"`{provider.name}`", ", ".join(provider.devices), dtypes, _needs(provider))
            yield f"| {' | '.join(cells)} | {', '.join(provider.verified) or 'unverified'} |"


def _needs(provider: Provider) -> str:
    """Packages, hardware and layout, or "nothing"."""
    needs = [f"`{module}`" for module in provider.package.modules] if provider.package else []
    if provider.condition != ANYWHERE:
        needs.append(provider.condition.need)
    if not provider.tensor_parallel:
        needs.append("`parallel.tp = 1`")
    return ", ".join(needs) or "nothing"
