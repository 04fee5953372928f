"""What each optimizer engine can do, as one table: the rules of a configuration read it, and docs/zero.md shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FEATURES: Mapping[str, str] = {  # the table's columns, and what stands above them
    "tensor": "tp, sp",
    "pipeline": "pp",
    "schedules": "schedules but 1f1b, split backward",
    "post_validation": "post-validation",
    "fp16": "fp16",
    "shard_groups": "shard groups",
    "bf16_gradients": "bf16 sums of micro-batches",
    "bf16_wire": "bf16 wire",
    "narrow_state": "bf16 moments, remainders",
    "host_offload": "offload to the host",
    "file_offload": "offload to files",
    "compile": "compile",
    "cuda_graphs": "CUDA graphs",
    "float8": "float8",
    "zero_plus_plus": "ZeRO++ (CUDA)",
    "zero_plus_plus_tensor": "ZeRO++ with tp",
}


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be had, and the smallest change that helps (what to set instead)."""

    because: str
    instead: str


_STAGE_1 = "--zero.stage 1"
_NATIVE = "--zero.engine native"
_NOT_DEEPSPEED = Refusal("only the native engine has it", _NATIVE)
_NOT_NATIVE = Refusal("the native engine keeps its state on the device", "--zero.engine deepspeed, or --zero.offload none")
_FILES_NOT_NATIVE = Refusal(_NOT_NATIVE.because, "--zero.engine deepspeed --zero.stage 3, or --zero.offload none")
_STAGE_3_FILES = Refusal("DeepSpeed's other stages would keep it in host memory", "--zero.stage 3, or --zero.offload cpu")
_ZERO_PLUS_PLUS = Refusal("it is of DeepSpeed's stage 3", "--zero.engine deepspeed --zero.stage 3, or remove it from the file")

_NO_ZERO_PLUS_PLUS = {"zero_plus_plus": _ZERO_PLUS_PLUS, "zero_plus_plus_tensor": _ZERO_PLUS_PLUS}

_NATIVE_ROW = {"host_offload": _NOT_NATIVE, "file_offload": _FILES_NOT_NATIVE, **_NO_ZERO_PLUS_PLUS}
_DEEPSPEED_ROW = {
    "post_validation": _NOT_DEEPSPEED,
    "fp16": Refusal("its loss scale is not the engine's own, which is checked and saved", f"--train.dtype bf16, or {_NATIVE}"),
    "shard_groups": Refusal("DeepSpeed shards over all data ranks", f"--zero.shard_group_size 0, or {_NATIVE}"),
    "bf16_gradients": Refusal("gradients add up in fp32 under DeepSpeed", f"--zero.gradient_dtype fp32, or {_NATIVE}"),
    "narrow_state": Refusal("DeepSpeed's masters and moments are fp32", _NATIVE),
    "cuda_graphs": Refusal("it was never tried under DeepSpeed", f"--train.cuda_graphs false, or {_NATIVE}"),
}
_BY_HOOKS = {
    "pipeline": Refusal("gradients would leave in every micro-batch of every stage, in no common order", _STAGE_1),
    "schedules": Refusal("its hooks want a backward pass after each forward pass", f"--parallel.schedule 1f1b, or {_STAGE_1}"),
}

# What is missing here is supported. The key "" refuses a whole row.
REFUSALS: Mapping[tuple[str, int], Mapping[str, Refusal]] = {
    ("native", 0): _NATIVE_ROW,
    ("native", 1): _NATIVE_ROW,
    ("native", 2): {
        **_NATIVE_ROW,
        "pipeline": Refusal("gradients would leave in every micro-batch of every stage", f"{_STAGE_1}, or --parallel.pp 1"),
        "post_validation": Refusal("it is about pipelines, which stage 2 has not", "--parallel.post_validation false"),
        "cuda_graphs": Refusal(
            "whole gradients are made anew in each pass, not where a graph would add them",
            f"{_STAGE_1}, or --train.cuda_graphs false",
        ),
    },
    ("native", 3): {"": Refusal("only DeepSpeed shards the weights", f"--zero.engine deepspeed, or {_STAGE_1}")},
    ("deepspeed", 0): {
        "": Refusal(
            "in bf16 DeepSpeed's stage 0 decays the weights once before the first step, and its norm leaves out the gradients "
            "of all tensor ranks but one",
            _NATIVE,
        )
    },
    ("deepspeed", 1): {**_DEEPSPEED_ROW, "file_offload": _STAGE_3_FILES, **_NO_ZERO_PLUS_PLUS},
    ("deepspeed", 2): {**_DEEPSPEED_ROW, **_BY_HOOKS, "file_offload": _STAGE_3_FILES, **_NO_ZERO_PLUS_PLUS},
    ("deepspeed", 3): {
        **_DEEPSPEED_ROW,
        **_BY_HOOKS,
        "pipeline": Refusal("DeepSpeed compares the order of modules over all ranks, and hangs where it differs", _STAGE_1),
        "zero_plus_plus_tensor": Refusal(
            "its groups are runs of neighbouring ranks, which are tensor ranks here: the losses would be wrong",
            "--parallel.tp 1, or remove it from the file",
        ),
        "float8": Refusal("it was never tried with weights that come and go", f"--train.float8 none, or {_STAGE_1}"),
    },
}


def refusal(engine: str, stage: int, feature: str = "") -> Refusal | None:
    """Why `engine` in `stage` cannot have the feature (or does not exist, without one); None where it can."""
    row = REFUSALS.get((engine, stage))
    if row is None:
        return Refusal(f"the {engine} engine has no such stage", _STAGE_1)
    return row.get(feature)


def matrix() -> str:
    """The table in Markdown: a line per engine and stage, a column per feature."""
    lines = [
        f"| engine, stage | {' | '.join(FEATURES.values())} |",
        f"|---|{'---|' * len(FEATURES)}",
    ]
    for (engine, stage), row in REFUSALS.items():
        cells = [_cell(row, feature) for feature in FEATURES]
        lines.append(f"| {engine} {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Refusal], feature: str) -> str:
    if "" in row:
        return "-"
    return "no" if feature in row else "yes"
