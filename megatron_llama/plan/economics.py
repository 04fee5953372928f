"""What a run costs: time, energy, carbon dioxide and money."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llama.plan.configured import Prediction

HOUR, DAY = 3600.0, 86400.0
LLAMA_PUE = 1.1  # of the data centre, and kg of carbon dioxide per kWh: Touvron et al. 2023, section 6
LLAMA_CARBON = 0.385


@dataclass(frozen=True)
class Rates:
    """`pue`: energy of the data centre over that of its GPUs. `carbon`: kg of carbon dioxide per kWh. `price`: per GPU-hour."""

    pue: float = LLAMA_PUE
    carbon: float = LLAMA_CARBON
    price: float | None = None


@dataclass(frozen=True)
class Bill:
    """Of a whole run. `cost` is None without a price."""

    seconds: float
    gpu_hours: float
    megawatt_hours: float
    tonnes_co2: float
    cost: float | None


def bill(prediction: Prediction, tokens: int, rates: Rates) -> Bill:
    """What `tokens` tokens take. Energy: the board's full power x hours x PUE (Touvron et al. 2023, section 6)."""
    cluster = prediction.job.cluster
    seconds = tokens / (prediction.tokens_per_second_per_gpu * cluster.gpus)
    gpu_hours = seconds * cluster.gpus / HOUR
    megawatt_hours = gpu_hours * cluster.hardware.watts * rates.pue / 1e6
    cost = gpu_hours * rates.price if rates.price is not None else None
    return Bill(seconds, gpu_hours, megawatt_hours, megawatt_hours * rates.carbon, cost)
