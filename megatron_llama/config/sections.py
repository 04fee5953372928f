"""The fields of a run: frozen sections, each field with its default, one line of help and its own limits.

A section holds what a user can set and nothing derived: data-parallel size, total steps and the like are functions at
the end. Limits that concern one field alone (`choices`, `minimum`) stand next to it; rules across fields are in
`rules`.
"""

import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.pipeline.schedules import SCHEDULES


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), minimum: float | None = None) -> Any:
    """A dataclass field with its help line and the limits that concern it alone."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass(frozen=True)
class DataSource:
    """One indexed dataset, `prefix`.bin and `prefix`.idx, and its share of the blend relative to the other sources.

    Without weights (None), sources are mixed in proportion to their sizes. `max_epochs` limits how often a run may read it.
    """

    prefix: str
    weight: float | None = None
    max_epochs: float | None = None


Sources = tuple[DataSource, ...]
StageLayers = str | tuple[int, ...]  # "auto", or the layers of each stage in global order
RECOMPUTE_MODES = ("none", "selective", "linear_outputs", "full")
TP_OVERLAPS = ("none", "backward", "chunks", "async")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Sizes of 0 are not given: a preset or the user must give them."""

    preset: str = setting("", "a published size, such as llama-7b; the other fields override it")
    num_layers: int = setting(0, "transformer blocks", minimum=0)
    hidden_size: int = setting(0, "width of the residual stream", minimum=0)
    num_heads: int = setting(0, "query heads", minimum=0)
    num_kv_heads: int = setting(0, "key and value heads; 0 takes num_heads", minimum=0)
    ffn_hidden_size: int = setting(0, "width of the SwiGLU feed-forward", minimum=0)
    vocab_size: int = setting(0, "vocabulary rows, without padding", minimum=0)
    rope_theta: float = setting(10_000.0, "base of the rotary frequencies")
    rope_scaling_factor: float = setting(1.0, "LLaMA-3.1 stretching of low rotary frequencies; 1.0 is off", minimum=1.0)
    rope_low_freq_factor: float = setting(1.0, "wavelengths above original context / this are stretched fully")
    rope_high_freq_factor: float = setting(4.0, "wavelengths below original context / this are left alone")
    rope_original_context: int = setting(8192, "context in tokens before stretching", minimum=1)
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm")
    tie_embeddings: bool = setting(False, "use the embedding matrix as the output head too")
    init_std: float = setting(0.02, "standard deviation of the initial weights", minimum=0.0)

    def __post_init__(self) -> None:
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class ParallelConfig:
    """The layout: world size = tp x pp x dp x cp."""

    tp: int = setting(1, "tensor-parallel size", minimum=1)
    pp: int = setting(1, "pipeline stages (ranks)", minimum=1)
    dp: int = setting(0, "data-parallel size; 0 follows from the world size", minimum=0)
    cp: int = setting(1, "context-parallel size", minimum=1)
    chunks: int = setting(1, "model chunks on each pipeline rank", minimum=1)
    schedule: str = setting("1f1b", "pipeline schedule; auto takes the fastest that fits", choices=("auto", *SCHEDULES))
    activation_memory_gib: float = setting(0.0, "activations that a rank may keep; 0 is no limit", minimum=0.0)
    sequence_parallel: bool = setting(True, "split norms and residuals along the sequence over tp ranks; no effect at tp 1")
    tp_overlap: str = setting("backward", "what hides tensor-parallel communication", choices=TP_OVERLAPS)
    recompute: str = setting("none", "activations to compute again in the backward", choices=RECOMPUTE_MODES)
    recompute_layers: int = setting(0, "layers of each stage that recompute = full applies to; 0 is all", minimum=0)
    offload_layers: int = setting(0, "layers of each stage whose activations wait in host memory", minimum=0)
    layers_per_stage: StageLayers = setting("auto", "layers of each stage, pp x chunks numbers; auto balances, head included")
    post_validation: bool = setting(False, "update before the norm is known and correct it later: no wait at a step's end")


@dataclass(frozen=True)
class ZeroConfig:
    """The optimizer engine: what is sharded over the data ranks, and in which numbers gradients add up and travel."""

    stage: int = setting(1, "shards 0 nothing, 1 the optimizer, 2 gradients too, 3 weights too (deepspeed)", minimum=0)
    engine: str = setting("native", "who reduces gradients and updates", choices=("native", "deepspeed"))
    shard_group_size: int = setting(0, "dp ranks that share one optimizer copy; 0 is all of them", minimum=0)
    bucket_size: int = setting(40_000_000, "parameters in one gradient bucket", minimum=1)
    overlap: bool = setting(True, "reduce during the backward pass and gather behind the next forward pass")
    gradient_dtype: str = setting("fp32", "numbers in which micro-batches add up their gradients", choices=("fp32", "bf16"))
    reduce_dtype: str = setting("fp32", "numbers in which gradients travel; sums are fp32", choices=("fp32", "bf16"))
    offload: str = setting("none", "where the optimizer lives (deepspeed)", choices=("none", "cpu", "nvme"))
    offload_directory: str = setting("", "fast local folder for offload = nvme")
    deepspeed_config: str = setting("", "JSON file of further DeepSpeed settings")


@dataclass(frozen=True)
class DataConfig:
    """Indexed datasets, each "PREFIX" or {prefix = "PREFIX", weight = 0.7, max_epochs = 4}; paths from the working folder."""

    train: Sources = setting((), "training datasets")
    valid: Sources = setting((), "held-out datasets")
    seed: int = setting(1234, "seed of the sample order", minimum=0)
    order: str = setting("windows", "order of samples; megatron is megatron-core's", choices=("windows", "megatron"))
    on_cap: str = setting("error", "what to do where a source would exceed max_epochs", choices=("error", "redistribute"))
    allow_changed: bool = setting(False, "resume although a dataset, the seed or the order is not the checkpoint's")
    first_sample: int = setting(0, "sample that a fresh start begins with: a Megatron run's consumed samples", minimum=0)
    megatron_split: str = setting("1", "--split of the Megatron run, whose first part is trained on (order = megatron)")
    document_mask: bool = setting(True, "attend inside documents only, positions from each start; off if order = megatron")
    packing: str = setting("none", "best_fit puts whole documents into each sample, not windows", choices=("none", "best_fit"))
    tokenizer: str = setting("", "tokenizer .model file, copied into the run and its checkpoints; may be empty")


@dataclass(frozen=True)
class KernelConfig:
    """One implementation per operation: "auto", or the name of a provider (python -m parallel.kernels lists them)."""

    rms_norm: str = setting("auto", "provider of RMSNorm")
    add_rms_norm: str = setting("auto", "provider of RMSNorm after a residual addition")
    rope: str = setting("auto", "provider of the rotary embedding")
    qkv_rope: str = setting("auto", "provider that splits, rotates and lays out the fused q, k and v; or by rope")
    swiglu: str = setting("auto", "provider of SwiGLU")
    attention: str = setting("auto", "provider of attention")
    wgrad: str = setting("auto", "provider of weight-gradient accumulation")
    cross_entropy: str = setting("auto", "provider of the loss of whole logits")
    head_loss: str = setting("auto", "provider of the loss of logits too large to be whole")
    adamw: str = setting("auto", "provider of AdamW over shards")
    l2_norm: str = setting("auto", "provider of the gradient norm over shards")


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its learning-rate curve: linear warm-up, then cosine."""

    name: str = setting("adamw", "update rule", choices=("adamw", "sgd"))
    learning_rate: float = setting(3e-4, "peak learning rate", minimum=0.0)
    min_learning_rate_ratio: float = setting(0.1, "final learning rate as a share of the peak", minimum=0.0)
    warmup_steps: int = setting(0, "steps of linear warm-up", minimum=0)
    beta1: float = setting(0.9, "decay of the first moment", minimum=0.0)
    beta2: float = setting(0.95, "decay of the second moment", minimum=0.0)
    eps: float = setting(1e-8, "term added to the root of the second moment", minimum=0.0)
    weight_decay: float = setting(0.1, "decoupled weight decay; norm weights have none", minimum=0.0)
    clip_norm: float = setting(1.0, "global gradient norm to clip to; 0 is off", minimum=0.0)
    moment_dtype: str = setting("fp32", "numbers of AdamW's two moments", choices=("fp32", "bf16"))
    master_weights: str = setting("fp32", "kept whole, or as the 16 bits that bf16 weights lack", choices=("fp32", "remainder"))


@dataclass(frozen=True)
class TrainConfig:
    """How long, on how much at once, and in which numbers. Give steps or tokens."""

    steps: int = setting(0, "optimizer steps of the whole schedule", minimum=0)
    tokens: int = setting(0, "training tokens, instead of steps; rounded up to whole steps", minimum=0)
    exit_step: int = setting(0, "stop after this step with a checkpoint, the schedule unchanged; 0 is off", minimum=0)
    global_batch_size: int = setting(32, "sequences in one optimizer step", minimum=1)
    micro_batch_size: int = setting(1, "sequences in one forward of one data-parallel rank", minimum=1)
    sequence_length: int = setting(2048, "tokens in one sequence", minimum=1)
    seed: int = setting(1234, "seed of the initial weights", minimum=0)
    dtype: str = setting("bf16", "numbers of forward and backward", choices=("fp32", "bf16", "fp16"))
    loss_scale: float = setting(65536.0, "fp16: what the loss is multiplied by at first", minimum=1.0)
    loss_scale_window: int = setting(1000, "fp16: finite steps until the scale is doubled", minimum=1)
    float8: str = setting("none", "linears in float8, scaled per", choices=("none", "tensorwise", "rowwise"))
    compile: bool = setting(False, "torch.compile what lies between a block's linears and attention")
    cuda_graphs: bool = setting(False, "replay each micro-batch's kernels from a CUDA graph")
    device: str = setting("auto", "where to run; auto takes CUDA if there is any", choices=("auto", "cpu", "cuda"))
    start_timeout: float = setting(600.0, "seconds that ranks wait for each other until the first step has ended", minimum=1.0)
    step_timeout: float = setting(300.0, "seconds that ranks wait for each other in later steps", minimum=1.0)
    evaluate_every: int = setting(0, "steps between held-out evaluations; 0 is off", minimum=0)
    evaluate_tokens: int = setting(1_000_000, "tokens of one held-out evaluation", minimum=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """Where state is kept, how often, and what to start from."""

    directory: str = setting("", "where checkpoints go; empty is log.directory/checkpoints")
    save_every: int = setting(1000, "steps between checkpoints; 0 saves at the end only", minimum=0)
    load: str = setting("auto", "auto (this run's newest good one, else a new start), none, or the path of one")
    weights_from: str = setting("", "checkpoint whose weights a new run starts from, with a new optimizer, at step 0")
    keep: int = setting(3, "newest checkpoints to keep; 0 keeps all", minimum=0)
    keep_every: int = setting(0, "keep the steps that it divides for good, besides; 0 is off", minimum=0)
    asynchronous: bool = setting(True, "write in the background, from a copy of the state in host memory")
    when_busy: str = setting("wait", "what to do if one is due and the last is not written yet", choices=("wait", "skip"))
    failures_allowed: int = setting(3, "saves in a row that may fail; the run's last must not", minimum=0)


@dataclass(frozen=True)
class WatchConfig:
    """What is done about wrong numbers, and how state and ranks are watched; docs/failures.md, from "The numbers" on."""

    non_finite: str = setting("rerun", "a loss or gradient is not finite: do", choices=("rerun", "skip", "stop"))
    spikes: str = setting("report", "one is far above the last ones: do", choices=("off", "report", "skip", "roll_back"))
    spike_deviations: float = setting(6.0, "standard deviations above the mean where spikes begin", minimum=1.0)
    window: int = setting(128, "steps before a step that count: for spikes, and for what is allowed", minimum=2)
    skips_allowed: int = setting(8, "batches that may be skipped in so many steps; then the run goes back", minimum=0)
    rollbacks_allowed: int = setting(1, "times that it may go back to a checkpoint in so many steps; then it stops", minimum=0)
    audit_every: int = setting(500, "steps between audits of what several ranks hold; 0 audits before saves only", minimum=0)
    straggler_every: int = setting(50, "steps between two looks at how busy the ranks are", minimum=1)
    straggler_factor: float = setting(1.2, "a rank that is busy so many times as long as its peers is named", minimum=1.0)


@dataclass(frozen=True)
class LogConfig:
    """The run directory and its rhythm."""

    directory: str = setting("runs/llama", "run directory: config.toml, metrics.jsonl, tensorboard, logs, checkpoints")
    every: int = setting(10, "steps between progress lines", minimum=1)
    trace_steps: int = setting(0, "steps to trace, from this process's second on, to traces/step_N.json", minimum=0)
    hardware: str = setting("auto", "GPU profile to predict by: auto (the GPU's own), none, a name or a TOML file")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is told."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    data: DataConfig = DataConfig()
    kernels: KernelConfig = KernelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
    log: LogConfig = LogConfig()


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """`parallel.dp`, or what the world size leaves to it where it is 0 (0 if the other axes don't fit the world)."""
    parallel = config.parallel
    return parallel.dp or world_size // (parallel.tp * parallel.pp * parallel.cp)


def masks_documents(data: DataConfig) -> bool:
    """Whether attention stays inside documents: as asked for, but never in Megatron's order, whose runs attend across them."""
    return data.document_mask and data.order != "megatron"


def saves_in_background(config: RunConfig) -> bool:
    """Whether saves wait for a copy in host memory only; not where the state is on a disk, as it may be too large for it."""
    return config.checkpoint.asynchronous and config.zero.offload != "nvme"


def tokens_per_step(config: RunConfig) -> int:
    """Tokens that one optimizer step reads, over all ranks."""
    return config.train.global_batch_size * config.train.sequence_length


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the whole schedule: `train.steps`, or enough of them to read `train.tokens`."""
    return config.train.steps or math.ceil(config.train.tokens / tokens_per_step(config))


def micro_batches_per_step(config: RunConfig, world_size: int) -> int:
    """Micro-batches that one data-parallel rank runs in one optimizer step."""
    return config.train.global_batch_size // (config.train.micro_batch_size * data_parallel_size(config, world_size))


def checkpoint_directory(config: RunConfig) -> Path:
    """`checkpoint.directory`, or `checkpoints` in the run directory."""
    return Path(config.checkpoint.directory) if config.checkpoint.directory else Path(config.log.directory) / "checkpoints"


def limit_error(dotted: str, metadata: Any, value: Any) -> str:
    """What is wrong with the value of one field by its own limits; empty if nothing."""
    choices, minimum = metadata["choices"], metadata["minimum"]
    if choices and value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{dotted} = {value!r} is not one of {', '.join(choices)}{hint}"
    if minimum is not None and value < minimum:
        return f"{dotted} = {value} is too small; it must be at least {minimum}"
    return ""
