"""How each figure of a plan comes about: the text and the sources stand at the code that computes it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping

from megatron_llama.plan import (
    block_memory,
    bubble,
    configured,
    economics,
    kernels,
    memory,
    peak,
    risks,
    shape,
    state_memory,
    step_time,
)
from parallel.errors import ConfigError

FIELDS: Mapping[str, tuple[Callable, ...]] = {
    "tokens_per_second_per_gpu": (step_time.step_time, step_time.StepTime),
    "step_seconds": (step_time.step_time, step_time.StepTime),
    "mfu_causal": (configured.Prediction.mfu, shape.token_flops),
    "mfu_full": (configured.Prediction.mfu, shape.token_flops),
    "memory_bytes": (
        memory.Memory,
        configured.rank_memory,
        state_memory.state_bytes,
        peak.RankPeak,
        block_memory.MicroBatchMemory,
        memory.with_framework,
    ),
    "bubble": (bubble.bubble_seconds, bubble.held_micro_batches),
    "exposed_communication": (
        step_time.tensor_seconds,
        step_time.pipeline_seconds,
        step_time.data_seconds,
        step_time.gather_seconds,
        step_time.context_seconds,
    ),
    "linear": (kernels.product_seconds,),
    "attention": (kernels.attention_seconds,),
    "elementwise": (step_time.block_passes,),
    "recompute": (step_time.recomputed,),
    "head": (step_time.head_seconds,),
    "optimizer": (step_time.optimizer_seconds,),
    "time": (economics.bill,),
    "energy": (economics.bill,),
    "risks": (risks.risks,),
}


def explain(field: str) -> str:
    """What is known about one figure. Raises ConfigError with the nearest known one."""
    if field not in FIELDS:
        closest = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"--explain {field}: unknown; the closest one is {closest} (all: {', '.join(FIELDS)})")
    parts = [f"{source.__module__}.{source.__qualname__}\n\n{inspect.getdoc(source)}" for source in FIELDS[field]]
    return "\n\n".join(parts)
