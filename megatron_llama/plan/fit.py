"""Fitting the efficiencies of GPUs to measured steps: one set per GPU family, whatever the software.

The cost is robust (medians and clipped means of the logarithm of predicted over measured), weighs a source by the root of
its rows' weights, and pulls lightly towards the general values of `Efficiency`, so that what no row tells stays there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean, median

from megatron_llama.plan.hardware import Efficiency
from megatron_llama.plan.job import Job
from megatron_llama.plan.step_time import step_time

LIMITS: Mapping[str, tuple[float, float]] = {
    "product": (0.35, 0.95),
    "product_depth": (100.0, 800.0),
    "attention": (0.7, 1.15),
    "memory": (0.5, 0.95),
    "link": (0.4, 0.95),
    "network": (0.25, 0.95),
    "contention": (0.0, 0.5),
    "launch_seconds": (2e-6, 30e-6),
    "jitter": (0.0, 0.004),
}
FLOAT8 = {"float8": (0.4, 1.2)}
PULL = 0.05  # weight of the squared distance from the general values, in units of the ranges
WORST = 0.5  # logarithms beyond are clipped
ROUNDS = 12


Measured = tuple[Job, float, str, float]  # a job, its step's seconds, their source, and the row's weight


def fit(measured: Sequence[Measured], start: Efficiency, limits: Mapping[str, tuple[float, float]] = LIMITS) -> Efficiency:
    """The efficiency that predicts `measured` best: jobs of one GPU family.

    A pattern search (Hooke and Jeeves 1961): each parameter in turn goes up or down by a step as long as that helps, and steps
    are halved when nothing does.
    """
    best, cost = start, _cost(measured, start, limits)
    width = 0.16
    for _ in range(ROUNDS):
        improved = False
        for name, (low, high) in limits.items():
            for direction in (1, -1):
                value = min(high, max(low, getattr(best, name) + direction * width * (high - low)))
                trial = replace(best, **{name: value})
                trial_cost = _cost(measured, trial, limits)
                if trial_cost < cost - 1e-7:
                    best, cost, improved = trial, trial_cost, True
                    break
        if not improved:
            width /= 2
    return best


def with_efficiency(job: Job, efficiency: Efficiency) -> Job:
    """The job on the same GPUs with another efficiency."""
    hardware = replace(job.cluster.hardware, efficiency=efficiency)
    return replace(job, cluster=replace(job.cluster, hardware=hardware))


def _cost(measured: Sequence[Measured], efficiency: Efficiency, limits: Mapping[str, tuple[float, float]]) -> float:
    errors = defaultdict(list)
    for job, seconds, source, _ in measured:
        error = math.log(step_time(with_efficiency(job, efficiency)).total / seconds)
        errors[source].append(min(abs(error), WORST))
    weights = {source: math.sqrt(sum(weight for *_, name, weight in measured if name == source)) for source in errors}
    typical = {source: 0.5 * median(of_one) + 0.5 * fmean(of_one) for source, of_one in errors.items()}
    fitted = sum(weights[source] * typical[source] for source in errors) / sum(weights.values())
    general, values = asdict(Efficiency()), asdict(efficiency)
    distance = fmean(((values[name] - general[name]) / (high - low)) ** 2 for name, (low, high) in limits.items())
    return fitted + PULL * distance
