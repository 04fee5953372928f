"""The planner against published measurements: errors by source, layouts chosen, memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llama.plan import fit, rows
from megatron_llama.plan.hardware import GIB, Efficiency, find
from megatron_llama.plan.memory import largest, rank_memory
from megatron_llama.plan.rows import Row
from megatron_llama.plan.step_time import step_time

FAMILIES = {"a100-40gb": "a100-80gb", "h200": "h100", "gb300": "gb200"}  # GPUs that share another one's efficiency
RELATIVES = {"b200": "gb200", "gb200": "b200", "h100-500w": "h100"}  # whose efficiency a GPU takes that has one source alone
MEMORY_FIELDS = {"mem_alloc_gib": GIB, "mem_gib": GIB, "mem_gb": 1e9, "mem_mib": 2**20}
ALLOCATED = "mem_alloc_gib"  # the one field that reports allocated bytes; others hold what the allocator has reserved
OTHER_TIER = 0.25  # weight in a fit of rows outside the headline set: sweeps, small models, low precision
LEAST_SWEEP = 4  # layouts of one model on one number of GPUs that make a choice


@dataclass(frozen=True)
class Predicted:
    """One row and what is predicted of it. `error`: predicted over measured speed, less one."""

    row: Row
    tokens_per_second_per_gpu: float

    @property
    def error(self) -> float:
        return self.tokens_per_second_per_gpu / self.row["tok_s_gpu"] - 1

    @property
    def source(self) -> str:
        return self.row["group"]


@dataclass(frozen=True)
class Summary:
    """Errors of some rows, as shares: median and 90th percentile of their size, median with its sign."""

    rows: int
    median: float
    p90: float
    bias: float


def family(row: Row) -> str:
    """The profile whose efficiency a row's GPU has."""
    gpu = rows.GPUS[row["gpu"]]
    return FAMILIES.get(gpu, gpu)


def predict_row(row: Row, traits: bool = True, efficiency: Efficiency | None = None) -> Predicted:
    """The speed of a published run, by its GPU's profile or with another efficiency."""
    job = rows.job_of(row, traits)
    if efficiency is not None:
        job = fit.with_efficiency(job, efficiency)
    return Predicted(row, rows.tokens_per_second_per_gpu(row, step_time(job).total))


def summary(errors: Iterable[float]) -> Summary | None:
    """Of errors as shares; None where there are none."""
    values = np.array(list(errors))
    if not len(values):
        return None
    sizes = np.abs(values)
    return Summary(len(values), float(np.median(sizes)), float(np.percentile(sizes, 90)), float(np.median(values)))


def by_source(predicted: Sequence[Predicted]) -> dict[str, list[Predicted]]:
    """The rows of each source, in alphabetical order."""
    sources = defaultdict(list)
    for one in predicted:
        sources[one.source].append(one)
    return dict(sorted(sources.items()))


def one_run_median(predicted: Sequence[Predicted]) -> float | None:
    """Median error where another row of the same source has set a factor, over all choices of that row; every row counts once.

    Sources of one or two rows don't count; None where there are no others.
    """
    errors, weights = [], []
    for group in by_source(predicted).values():
        ratios = np.array([1 + one.error for one in group])
        for place, ratio in enumerate(ratios) if len(group) > 2 else ():
            errors.append(np.abs(np.delete(ratios, place) / ratio - 1))
            weights.append(np.full(len(ratios) - 1, 1 / (len(ratios) - 1)))
    if not errors:
        return None
    sizes, shares = np.concatenate(errors), np.concatenate(weights)
    order = np.argsort(sizes)
    middle = np.searchsorted(np.cumsum(shares[order]), shares.sum() / 2)
    return float(sizes[order][middle])


def layout_regrets(predicted: Sequence[Predicted]) -> dict[str, float]:
    """Share of the throughput that is lost by taking the predicted best of each sweep over layouts.

    A sweep: rows of one source with the same model, GPUs and batch.
    """
    sweeps = defaultdict(list)
    for one in predicted:
        row = one.row
        if row["tier"] == "sweep":
            shape = tuple(row[name] for name in ("group", "layers", "hidden", "heads", "vocab", "seq", "n_gpus", "gbs"))
            sweeps[shape].append(one)
    regrets = {}
    for shape, choices in sweeps.items():
        if len(choices) >= LEAST_SWEEP:
            chosen = max(choices, key=lambda one: one.tokens_per_second_per_gpu)
            source, layers, hidden, heads, vocabulary, _, gpus, batch = shape
            name = f"{source} {layers}x{hidden}, {heads} heads, vocabulary {vocabulary}, {gpus} GPUs, batch {batch}"
            regrets[name] = 1 - chosen.row["tok_s_gpu"] / max(one.row["tok_s_gpu"] for one in choices)
    return regrets


def memory_errors(measured: Iterable[Row]) -> dict[tuple[str, str], list[float]]:
    """(source, reported field) -> predicted over reported memory, less one: allocated bytes where those are reported."""
    errors = defaultdict(list)
    for row in measured:
        for name, unit in MEMORY_FIELDS.items():
            if name in row["reported"]:
                memory = largest(rank_memory(rows.job_of(row)))
                predicted = memory.allocated if name == ALLOCATED else memory.total
                errors[row["group"], name].append(predicted / (row["reported"][name] * unit) - 1)
    return dict(sorted(errors.items()))


def fitted(measured: Sequence[Row], float8: bool = False) -> dict[str, Efficiency]:
    """GPU family -> the efficiency fitted to these rows. `float8`: of float8 rows, with all else as in the profile."""
    jobs = defaultdict(list)
    for row in measured:
        if row["verified"] != "recalled":
            seconds = row["gbs"] * row["seq"] / row["tok_s_gpu"] / row["n_gpus"]
            jobs[family(row)].append((rows.job_of(row), seconds, row["group"], 1.0 if row["tier"] == "core" else OTHER_TIER))
    if float8:
        return {gpu: fit.fit(of_one, find(gpu).efficiency, fit.FLOAT8) for gpu, of_one in jobs.items()}
    return {gpu: fit.fit(of_one, Efficiency()) for gpu, of_one in jobs.items()}


def held_out(measured: Sequence[Row], report: Callable[[str], None] = lambda source: None) -> list[Predicted]:
    """Every row predicted with efficiencies that were fitted without any row of its source.

    Where a GPU has no other source, those of its nearest relative are taken.
    """
    predicted = []
    for source in sorted({row["group"] for row in measured}):
        report(source)
        own = [row for row in measured if row["group"] == source]
        others = [row for row in measured if row["group"] != source]
        known = {family(row) for row in others}
        stand_in = {gpu: gpu if gpu in known else RELATIVES[gpu] for gpu in {family(row) for row in own}}
        efficiencies = fitted([row for row in others if family(row) in stand_in.values()])
        predicted += [predict_row(row, efficiency=efficiencies[stand_in[family(row)]]) for row in own]
    return predicted
