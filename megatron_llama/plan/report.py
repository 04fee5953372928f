"""Plans as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

from megatron_llama.plan.configured import Prediction
from megatron_llama.plan.economics import DAY, Bill, Rates, bill
from megatron_llama.plan.memory import Memory, gib
from megatron_llama.plan.risks import reasons, risks
from megatron_llama.plan.search import Found, sections
from megatron_llama.plan.shape import parameters

COLUMNS = (
    f"{'':>3}{'tp':>4}{'pp':>4}{'cp':>4}{'dp':>6}  {'schedule':<16}{'micro':>6}{'recompute':>16}{'zero':>13}"
    f"{'tokens/s/GPU':>14}{'step':>9}{'MFU':>7}{'full':>7}{'memory':>10}{'bubble':>8}{'exposed':>9}"
)


def plan_lines(found: Sequence[Found], top: int, tokens: int, rates: Rates) -> Iterator[str]:
    """The best layouts in a table, and the first one in detail."""
    best = found[0].prediction
    job, hardware = best.job, best.job.cluster.hardware
    model = f"{parameters(job.shape) / 1e9:.1f}B parameters, {job.shape.sequence_length:,} tokens per sample"
    yield f"{model}, {job.layout.samples:,.0f} samples per step, {job.cluster.gpus:,} x {hardware.name}"
    yield f"{len(found):,} layouts fit; the fastest are:"
    yield ""
    yield COLUMNS
    for place, one in enumerate(found[:top], 1):
        yield _row(place, one)
    yield ""
    yield f"the first takes {_days(tokens, bill(best, tokens, rates))}"
    yield f"it loses time to: {reasons(best)}"
    yield ""
    yield from memory_lines(best)
    dangers = list(risks(best))
    yield ""
    yield from (f"risk: {danger}" for danger in dangers)
    if not dangers:
        yield "risks: none known"


def _row(place: int, one: Found) -> str:
    prediction, layout, zero = one.prediction, one.prediction.job.layout, one.config.zero
    schedule = layout.schedule + (f" x {layout.chunks}" if layout.chunks > 1 else "")
    memory = f"{gib(prediction.largest.total):.0f} GiB"
    return (
        f"{place:>3}{layout.tp:>4}{layout.pp:>4}{layout.cp:>4}{layout.dp:>6}  {schedule if layout.pp > 1 else '-':<16}"
        f"{layout.micro_batch_size:>6g}{layout.recompute:>16}{f'{zero.engine} {zero.stage}':>13}"
        f"{prediction.tokens_per_second_per_gpu:>14,.0f}{prediction.step_seconds:>8.2f}s{prediction.mfu('causal'):>7.1%}"
        f"{prediction.mfu('full'):>7.1%}{memory:>10}{prediction.bubble:>8.1%}{prediction.exposed_communication:>9.1%}"
    )


def _days(tokens: int, cost: Bill) -> str:
    price = f", price {cost.cost:,.0f}" if cost.cost is not None else ""
    return (
        f"{cost.seconds / DAY:,.1f} days for {tokens / 1e9:,.0f}B tokens: {cost.gpu_hours:,.0f} GPU-hours, "
        f"{cost.megawatt_hours:,.0f} MWh, {cost.tonnes_co2:,.0f} t CO2{price}"
    )


def memory_lines(prediction: Prediction) -> Iterator[str]:
    """Memory of the first, the fullest and the last pipeline rank, in GiB."""
    memories = prediction.memory
    fullest = max(range(len(memories)), key=lambda rank: memories[rank].total)
    names = [item.name for item in fields(Memory)]
    yield "memory in GiB  " + "".join(f"{name:>13}" for name in names) + f"{'total':>8}"
    for rank in sorted({0, fullest, len(memories) - 1}):
        of_rank = "".join(f"{gib(getattr(memories[rank], name)):>13.1f}" for name in names)
        yield f"pp rank {rank:<7}{of_rank}{gib(memories[rank].total):>8.1f}"
    capacity = gib(prediction.job.cluster.hardware.memory_bytes)
    yield f"the fullest rank takes {prediction.fill:.0%} of {capacity:.1f} GiB"


def layout_values(one: Found, tokens: int, rates: Rates) -> dict[str, Any]:
    """A layout by name: the configuration's fields, and what is predicted."""
    prediction, config = one.prediction, one.config
    memory = prediction.largest
    of_parallel = ("tp", "pp", "dp", "cp", "chunks", "schedule", "sequence_parallel", "tp_overlap", "recompute")
    of_train = ("micro_batch_size", "global_batch_size", "sequence_length")
    return {
        **{name: getattr(config.parallel, name) for name in of_parallel},
        "layers_per_rank": list(prediction.job.layout.rank_layers),
        "engine": config.zero.engine,
        "stage": config.zero.stage,
        **{name: getattr(config.train, name) for name in of_train},
        "tokens_per_second_per_gpu": prediction.tokens_per_second_per_gpu,
        "step_seconds": prediction.step_seconds,
        "mfu_causal": prediction.mfu("causal"),
        "mfu_full": prediction.mfu("full"),
        "memory_bytes": {**asdict(memory), "total": memory.total},
        "memory_fill": prediction.fill,
        "bubble": prediction.bubble,
        "exposed_communication": prediction.exposed_communication,
        "time_seconds": asdict(prediction.time),
        "run": {"tokens": tokens, **asdict(bill(prediction, tokens, rates))},
        "reasons": reasons(prediction),
        "risks": list(risks(prediction)),
        "config": sections(one),
    }
