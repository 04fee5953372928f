"""All layouts that this program can run on a number of GPUs, predicted, and the best of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_llama.config import ParallelConfig, RunConfig, ZeroConfig, validate_layout, validate_model
from megatron_llama.config.rules import WAITING
from megatron_llama.plan.configured import Prediction, predict
from megatron_llama.plan.hardware import Hardware
from megatron_llama.plan.memory import gib
from megatron_llama.plan.risks import FULL
from parallel.errors import ConfigError
from parallel.pipeline.schedules import SCHEDULES
from parallel.zero.support import refusal

POWERS = tuple(2**power for power in range(11))
MICRO_BATCHES = (1, 2, 4, 8, 16)
INTERLEAVED_CHUNKS = (2, 3, 4, 5, 8)
PIPELINES = ("1f1b", "interleaved", "zb-h1", "zb-v", "v-half")
RECOMPUTE = ("none", "linear_outputs", "full")
ENGINES = (("native", 1), ("native", 2), ("deepspeed", 3))  # stage 0 is never faster than 1 and needs more memory
STALLED = 1.10  # what a step takes where memory is nearly full: the penalty of `FULL`
GROWTH = 2  # from one number of GPUs to the next that an error offers


@dataclass(frozen=True)
class Found:
    """A layout with its configuration. `ranking_seconds` is the step with the penalty for nearly full memory."""

    config: RunConfig
    prediction: Prediction

    @property
    def ranking_seconds(self) -> float:
        return self.prediction.step_seconds * (STALLED if self.prediction.fill > FULL else 1.0)

    def __str__(self) -> str:
        layout = self.prediction.job.layout
        pipeline = f"pp {layout.pp} {layout.schedule} x {layout.chunks}, " if layout.pp > 1 else f"zero {layout.zero_stage}, "
        return f"tp {layout.tp}, {pipeline}micro {layout.micro_batch_size:g}, {layout.recompute}"


def search(base: RunConfig, world_size: int, hardware: Hardware, calibration: float = 1.0) -> list[Found]:
    """The layouts that fit, fastest first. `base` gives the model, the batch and all that is no layout.

    Raises ConfigError, with the nearest that works, where no layout divides the batch, or none fits the memory.
    """
    validate_model(base)
    candidates = list(layouts(base, world_size))
    if not candidates:
        raise ConfigError(_no_layout(base, world_size))
    found = [Found(config, predict(config, world_size, hardware, calibration)) for config in candidates]
    fitting = [one for one in found if one.prediction.fill <= 1.0]
    if not fitting:
        raise ConfigError(_does_not_fit(base, world_size, hardware, found))
    return sorted(fitting, key=lambda one: (one.ranking_seconds, one.prediction.fill))


def layouts(base: RunConfig, world_size: int) -> Iterator[RunConfig]:
    """Every configuration of the search that the program's rules on layouts accept."""
    for parallel in _grids(base, world_size):
        dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
        for micro_batch in MICRO_BATCHES:
            if base.train.global_batch_size % (micro_batch * dp):
                break
            micro_batches = base.train.global_batch_size // (micro_batch * dp)
            if not SCHEDULES[parallel.schedule].allows(parallel.pp, parallel.chunks, micro_batches):
                break
            train = replace(base.train, micro_batch_size=micro_batch)
            for recompute in RECOMPUTE:
                for zero in _engines(base.zero, parallel, recompute):
                    yield replace(base, parallel=replace(parallel, recompute=recompute), zero=zero, train=train)


def _grids(base: RunConfig, world_size: int) -> Iterator[ParallelConfig]:
    """Sizes and schedules that divide the world and the model."""
    contexts = (1,) if "parallel.cp" in WAITING else POWERS
    for tp in POWERS:
        for cp in contexts:
            for pp in _pipeline_sizes(base, world_size, tp * cp):
                for schedule, chunks in _schedules(base, pp):
                    parallel = replace(
                        base.parallel,
                        tp=tp,
                        cp=cp,
                        pp=pp,
                        dp=world_size // (tp * cp * pp),
                        schedule=schedule,
                        chunks=chunks,
                        layers_per_stage="auto",
                        recompute_layers=0,
                    )
                    if _allowed(replace(base, parallel=parallel), world_size):
                        yield parallel


def _pipeline_sizes(base: RunConfig, world_size: int, others: int) -> list[int]:
    """Pipeline sizes that divide what is left of the world: those that divide the layers, and powers of two."""
    if world_size % others:
        return []
    layers, left = base.model.num_layers, world_size // others
    return [pp for pp in range(1, min(layers, left) + 1) if left % pp == 0 and (layers % pp == 0 or pp in POWERS)]


def _schedules(base: RunConfig, pp: int) -> Iterator[tuple[str, int]]:
    if pp == 1:
        yield "1f1b", 1
        return
    for schedule in PIPELINES:
        kind = SCHEDULES[schedule]
        most = base.model.num_layers // pp
        counts = INTERLEAVED_CHUNKS if kind.max_chunks is None else (kind.min_chunks,)
        yield from ((schedule, chunks) for chunks in counts if chunks <= most)


def _allowed(config: RunConfig, world_size: int) -> bool:
    try:
        validate_layout(replace(config, zero=replace(config.zero, shard_group_size=0)), world_size)
    except ConfigError:
        return False
    return True


def _engines(zero: ZeroConfig, parallel: ParallelConfig, recompute: str) -> Iterator[ZeroConfig]:
    """Engines and stages that support the layout (parallel/zero/support.py)."""
    features = ["tensor"] * (parallel.tp > 1) + ["pipeline"] * (parallel.pp > 1) + ["schedules"] * (parallel.schedule != "1f1b")
    for engine, stage in ENGINES:
        if stage > 1 and (parallel.pp > 1 or parallel.dp == 1) or (stage == 3 and recompute == "linear_outputs"):
            continue
        if any(refusal(engine, stage, feature) for feature in features):
            continue
        yield replace(zero, engine=engine, stage=stage, shard_group_size=0)


def _no_layout(base: RunConfig, world_size: int) -> str:
    """What to change where no layout divides the world, the batch and the model."""
    batch = base.train.global_batch_size
    problem = f"no layout of {world_size} GPUs divides train.global_batch_size = {batch}"
    sizes = {parallel.dp for parallel in _grids(base, world_size)}
    nearest = min((_nearest_multiple(batch, dp) for dp in sizes), key=lambda size: abs(size - batch))
    tokens = nearest * base.train.sequence_length
    return f"{problem}; the nearest that works is {nearest} samples: --global-batch-tokens {tokens}"


def _nearest_multiple(number: int, unit: int) -> int:
    return max(1, round(number / unit)) * unit


def _does_not_fit(base: RunConfig, world_size: int, hardware: Hardware, found: Sequence[Found]) -> str:
    """The least that a layout needs, and the number of GPUs that would do."""
    least = min(found, key=lambda one: one.prediction.fill).prediction
    needed = f"the leanest layout needs {gib(least.largest.total):.0f} GiB of {gib(hardware.memory_bytes):.0f} GiB on a GPU"
    more = f"no layout of {world_size} x {hardware.name} fits the model: {needed}"
    size = world_size
    while size < 2**20:
        size *= GROWTH
        enlarged = [Found(config, predict(config, size, hardware)) for config in layouts(base, size)]
        if any(one.prediction.fill <= 1.0 for one in enlarged):
            return f"{more}; the nearest that works is {size} GPUs"
        if not enlarged:
            break
    return f"{more}; use a GPU with more memory, or a smaller model"


def with_global_batch(base: RunConfig, tokens: int) -> RunConfig:
    """The configuration with a step of about that many tokens, in whole samples. Raises ConfigError below one."""
    length = base.train.sequence_length
    samples = round(tokens / length)
    if samples < 1:
        raise ConfigError(f"a global batch of {tokens} tokens is less than one sample of {length}; the nearest is {length}")
    return replace(base, train=replace(base.train, global_batch_size=samples))


def sections(found: Found) -> dict[str, dict]:
    """The layout's part of the configuration: section -> field -> value."""
    config = found.config
    train = ("global_batch_size", "micro_batch_size", "sequence_length", "compile", "dtype")
    return {
        "parallel": dataclasses.asdict(config.parallel),
        "zero": {name: getattr(config.zero, name) for name in ("engine", "stage", "shard_group_size", "bucket_size")},
        "train": {name: getattr(config.train, name) for name in train},
    }
