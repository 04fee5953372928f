"""How often to save: what checkpoints and failures cost together, and the interval at which that is least.

Failures come at random, on average one in `mean_time_between_failures`; each loses what was done since the last checkpoint,
and `restart_seconds` until training goes on. An interval is the training time between two checkpoints, without their own.
All times are in seconds, and greater than zero but for `restart_seconds`.

J. W. Young, A first order approximation to the optimum checkpoint interval, Communications of the ACM 17(9), 1974.
J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
Systems 22(3), 2006.
"""

import math
from dataclasses import dataclass

SECONDS_PER_DAY = 86400.0
# 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama Team, The Llama 3 Herd of Models, 2024, section 3.3.4)
LLAMA_3_FAILURES_PER_GPU_DAY = 419 / (54 * 16384)


def mean_time_between_failures(failures_per_gpu_day: float, gpus: int) -> float:
    """Seconds between failures of a job that dies with any of its GPUs."""
    return SECONDS_PER_DAY / (failures_per_gpu_day * gpus)


def young_interval(checkpoint_seconds: float, mean_time_between_failures: float) -> float:
    """Seconds, to first order: sqrt(2 C M) (Young 1974). Good as long as a checkpoint is short beside M."""
    return math.sqrt(2 * checkpoint_seconds * mean_time_between_failures)


def daly_interval(checkpoint_seconds: float, mean_time_between_failures: float) -> float:
    """Seconds, to higher order (Daly 2006). A restart costs the same after any interval: it has no part in it."""
    if checkpoint_seconds >= 2 * mean_time_between_failures:
        return mean_time_between_failures
    ratio = checkpoint_seconds / (2 * mean_time_between_failures)
    correction = 1 + math.sqrt(ratio) / 3 + ratio / 9
    return young_interval(checkpoint_seconds, mean_time_between_failures) * correction - checkpoint_seconds


def productive_share(
    interval: float, checkpoint_seconds: float, restart_seconds: float, mean_time_between_failures: float
) -> float:
    """The share of wall time in steps that count, for a long run (Daly 2006, the complete model).

    Failures are exponentially distributed and may hit a checkpoint or a restart too. What was done since the last
    checkpoint is the only training time lost, so a save counts as safe when training goes on.
    """
    mean = mean_time_between_failures
    try:
        return interval / (mean * math.exp(restart_seconds / mean) * math.expm1((interval + checkpoint_seconds) / mean))
    except OverflowError:  # failures come so fast that nothing is ever done
        return 0.0


@dataclass(frozen=True)
class Rates:
    """What the best interval follows from, on a job of `gpus`."""

    gpus: int
    failures_per_gpu_day: float
    source: str  # of the rate of failures, for people
    checkpoint_seconds: float
    restart_seconds: float  # 0 where it is not known


@dataclass(frozen=True)
class Projection:
    """A job of so many GPUs: seconds, and shares of wall time in steps that count."""

    gpus: int
    mean_time_between_failures: float
    interval: float  # the best
    share: float  # with the best interval
    present_share: float | None  # with the present one


def project(rates: Rates, gpus: int, present_interval: float | None = None) -> Projection:
    """What failures and checkpoints leave of a job of `gpus`, if each costs there what it costs in `rates`."""
    checkpoint, mean = rates.checkpoint_seconds, mean_time_between_failures(rates.failures_per_gpu_day, gpus)

    def share(interval: float) -> float:
        return productive_share(interval, checkpoint, rates.restart_seconds, mean)

    best = daly_interval(checkpoint, mean)
    return Projection(gpus, mean, best, share(best), share(present_interval) if present_interval else None)
