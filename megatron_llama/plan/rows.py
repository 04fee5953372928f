"""Published measurements of training runs, and what they say in the planner's terms.

The file `published_runs.json` has one row per measurement; its `meta.fields` explains every field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llama.plan.hardware import GIGA, Cluster, Hardware, find
from megatron_llama.plan.job import Job, Layout, Shape, Software
from megatron_llama.plan.step_time import recompute_shares
from parallel.errors import DataError
from parallel.pipeline.schedules import SCHEDULES

PUBLISHED = Path(__file__).parent / "published_runs.json"
Row = Mapping[str, Any]

GPUS = {
    "A100-40G": "a100-40gb",
    "A100-80G": "a100-80gb",
    "H100-80G": "h100",
    "H100-96G-500W": "h100-500w",
    "H200": "h200",
    "B200": "b200",
    "GB200": "gb200",
    "GB300": "gb300",
}
NEUTRAL = Software("partial", hides_pipeline=False)  # where a row names no stack that is known, or traits are left out
STACKS = {
    "fused": Software("fused", hides_pipeline=True),
    "fused_small": Software("fused", hides_pipeline=False),
    "compile": Software("compiled", hides_pipeline=False),
    "jax": Software("compiled", hides_pipeline=False),
    "nanotron": Software("partial", hides_pipeline=False),
    "intern": Software("eager", hides_pipeline=False),
    "mosaic": Software("eager", hides_pipeline=False),
    "eager": Software("eager", hides_pipeline=False),
    "megatron2021": Software("eager", hides_pipeline=False),
    "megatron2022": Software("eager", hides_pipeline=False),
}
SCHEDULE_NAMES = {"none": "1f1b", "zb1p": "zb-h1", "zb2p": "zb-h2", "zbv": "zb-v"}
TP_EXPOSED = 0.35


def read_rows(path: Path = PUBLISHED) -> list[Row]:
    """The rows of a file. Raises DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path} has no list of rows: it must hold {{"rows": [...]}}, as {PUBLISHED.name} does')
    return rows


def usable(row: Row) -> bool:
    """Whether a row's layout is known, so that its speed can be predicted."""
    return bool(row["layout_known"])


def core(row: Row) -> bool:
    """Whether a row belongs to the headline set: 16-bit products, a known layout."""
    return usable(row) and row["precision"] == "bf16" and row["tier"] == "core"


def job_of(row: Row, traits: bool = True, hardware: Hardware | None = None) -> Job:
    """What a row says, in the planner's terms. Raises DataError where a field is missing or unknown.

    `traits=False`: the same neutral software for every row. `hardware`: another profile than the row's GPU has.
    """
    try:
        return _job(row, traits, hardware or find(GPUS[row["gpu"]]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"row {row.get('id', '?')}: cannot read {error.args[0]!r}") from error


def _job(row: Row, traits: bool, hardware: Hardware) -> Job:
    shape = Shape(
        num_layers=row["layers"],
        hidden_size=row["hidden"],
        num_heads=row["heads"],
        num_kv_heads=row["kv_heads"],
        ffn_hidden_size=row["ffn"],
        vocab_size=row["vocab"],
        sequence_length=row["seq"],
        tied=row["tied"],
        gated=row["glu"],
    )
    cluster = Cluster(hardware, row["n_gpus"], row["gpus_per_node"], row["net_GBps_per_gpu"] * GIGA)
    software = STACKS.get(row["stack"], NEUTRAL) if traits else NEUTRAL
    attention = row["attention"] if row["attention"] == "unfused" or row["attention"] in hardware.attention else "flash2"
    return Job(shape, _layout(row), cluster, Software(software.elementwise, software.hides_pipeline, attention))


def _layout(row: Row) -> Layout:
    micro_batches = max(1, round(row["gbs"] / (row["dp"] * row["mbs"])))
    schedule, recompute = SCHEDULE_NAMES.get(row["schedule"], row["schedule"]), row["recompute"]
    recompute_shares(recompute)
    if schedule not in SCHEDULES:
        raise KeyError(schedule)
    if recompute == "selective" and row["attention"] != "unfused":
        recompute = "none"  # there is nothing large inside fused attention
    return Layout(
        tp=row["tp"],
        pp=row["pp"],
        dp=row["dp"],
        cp=row["cp"],
        chunks=max(1, row["vpp"]),
        schedule=schedule,
        rank_layers=spread_layers(row["layers"], row["pp"]),
        sequence_parallel=row["sp"],
        zero_stage=row["zero"],
        shard_size=row["shard"],
        micro_batch_size=row["gbs"] / (row["dp"] * micro_batches),
        micro_batches=micro_batches,
        recompute=recompute,
        tp_exposed=(TP_EXPOSED, TP_EXPOSED) if row["tp_overlap"] else (1.0, 1.0),
        dp_overlap=row["dp_overlap"],
        float8=row["precision"] != "bf16",
    )


def spread_layers(num_layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each pipeline rank where a source does not say: evenly, the last, then the first ranks having one less."""
    most = -(-num_layers // pp)
    layers = [most] * pp
    for turn in range(pp * most - num_layers):
        place = -1 - turn // 2 if turn % 2 == 0 else turn // 2
        layers[place] -= 1
    return tuple(layers)


def tokens_per_second_per_gpu(row: Row, step_seconds: float) -> float:
    """The speed that a row would have with that step."""
    return row["gbs"] * row["seq"] / step_seconds / row["n_gpus"]
