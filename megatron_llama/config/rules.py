"""Which configurations can run. Each rule raises ConfigError with the rule, the numbers, and the smallest change.

`validate_model` is what any program needs that builds the model, `validate_layout` what any needs that splits it over
processes, `validate_training` what a training run needs besides. `validate` is all three.
"""

import dataclasses
from collections.abc import Callable, Iterable

from megatron_llama.config import rules_memory, rules_precision, rules_zero
from megatron_llama.config.sections import (
    ModelConfig,
    RunConfig,
    data_parallel_size,
    limit_error,
    tokens_per_step,
    total_steps,
)
from parallel.errors import ConfigError

WAITING = (
    "parallel.cp",
)

FURTHER = (*rules_memory.RULES, *rules_precision.RULES, *rules_zero.RULES)


def validate(config: RunConfig, world_size: int) -> None:
    """Checks everything that a training run on `world_size` processes needs. Raises ConfigError."""
    validate_model(config)
    validate_layout(config, world_size)
    validate_training(config, world_size)


def validate_model(config: RunConfig) -> None:
    """Checks that the model's sizes are given and fit each other. Raises ConfigError."""
    for rule in (_field_limits, _sizes_given, _heads_fit, _rope_scaling):
        rule(config)


def validate_layout(config: RunConfig, world_size: int) -> None:
    """Checks that the model can be split over `world_size` processes as asked. Raises ConfigError."""
    for rule in (_landed, _tensor_parallel, _tp_overlap, _stages, _layers_per_stage, _sequence_split):
        rule(config)
    _world_size(config, world_size)
    _shard_groups(config, world_size)


def validate_training(config: RunConfig, world_size: int) -> None:
    """Checks data, batch, length and optimizer of a training run. Raises ConfigError."""
    for rule in (_training_data, _length, _optimizer, _gradients, _post_validation, _evaluation, _start, *FURTHER):
        rule(config)
    _batch(config, world_size)
    rules_memory.cuda_graphs(config, world_size)
    rules_zero.deepspeed_file(config, world_size)


def _field_limits(config: RunConfig) -> None:
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for item in dataclasses.fields(values):
            problem = limit_error(f"{section.name}.{item.name}", item.metadata, getattr(values, item.name))
            if problem:
                raise ConfigError(problem)


def _sizes_given(config: RunConfig) -> None:
    for name in ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "vocab_size"):
        if getattr(config.model, name) < 1:
            raise ConfigError(f"model.{name} is not given; set --model.{name}, or a published size with --model.preset")
    for name in ("rope_theta", "norm_eps"):
        if getattr(config.model, name) <= 0:
            raise ConfigError(f"model.{name} = {getattr(config.model, name)} must be above 0; remove it to take the default")


def _heads_fit(config: RunConfig) -> None:
    model = config.model
    hidden, heads, kv_heads = model.hidden_size, model.num_heads, model.num_kv_heads
    if heads % kv_heads:
        raise ConfigError(
            f"model.num_kv_heads must divide model.num_heads: {kv_heads} over {heads}; "
            f"set --model.num_kv_heads to {_either(_around(kv_heads, range(1, heads + 1), lambda n: heads % n == 0))}"
        )
    if hidden % (2 * heads):
        below, above = hidden // (2 * heads) * 2 * heads, -(-hidden // (2 * heads)) * 2 * heads
        raise ConfigError(
            f"model.hidden_size must be an even head size times model.num_heads: {hidden} over {heads} heads; "
            f"set --model.hidden_size to {_either([size for size in (below, above) if size])}"
        )


def _rope_scaling(config: RunConfig) -> None:
    model = config.model
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    if model.rope_scaling_factor != 1.0 and not 0 < low < high:
        raise ConfigError(
            f"model.rope_low_freq_factor must be above 0 and below model.rope_high_freq_factor: {low} and {high}; "
            "LLaMA-3.1 has 1.0 and 4.0"
        )


def _landed(config: RunConfig) -> None:
    """Settings that the interface has and the program does not carry out yet."""
    defaults = RunConfig()
    for dotted in WAITING:
        section, _, name = dotted.partition(".")
        found, needed = (getattr(getattr(values, section), name) for values in (config, defaults))
        if found != needed:
            raise ConfigError(f"{dotted} = {found} has not landed; set --{dotted} to {needed}")


def _tensor_parallel(config: RunConfig) -> None:
    model, tp = config.model, config.parallel.tp
    if not _tp_fits(model, tp):
        fitting = _around(tp, range(1, model.num_heads + 1), lambda size: _tp_fits(model, size))
        raise ConfigError(
            "parallel.tp must divide model.num_heads and model.ffn_hidden_size, and divide or be a multiple of "
            f"model.num_kv_heads: tp {tp}, {model.num_heads} heads, ffn {model.ffn_hidden_size}, "
            f"{model.num_kv_heads} kv heads; set --parallel.tp to {_either(fitting)}"
        )


def _tp_fits(model: ModelConfig, tp: int) -> bool:
    kv_heads = model.num_kv_heads
    divides = model.num_heads % tp == 0 and model.ffn_hidden_size % tp == 0
    return divides and (kv_heads % tp == 0 or tp % kv_heads == 0)


def _tp_overlap(config: RunConfig) -> None:
    parallel, train = config.parallel, config.train
    if parallel.tp_overlap != "async" or parallel.tp == 1:
        return
    reason = ""
    if not parallel.sequence_parallel:
        reason = "torch's fused operators are for sequence parallelism, and parallel.sequence_parallel = false"
    elif train.device == "cpu":
        reason = "it needs GPUs joined by NVLink, and train.device = cpu"
    if reason:
        raise ConfigError(f"parallel.tp_overlap = async cannot be had: {reason}; set --parallel.tp_overlap chunks")


def _stages(config: RunConfig) -> None:
    stages, layers = config.parallel.pp * config.parallel.chunks, config.model.num_layers
    if layers < stages:
        raise ConfigError(
            f"each stage needs a layer: model.num_layers is {layers}, parallel.pp x parallel.chunks is "
            f"{config.parallel.pp} x {config.parallel.chunks} = {stages}; "
            f"set --parallel.pp to at most {max(1, layers // config.parallel.chunks)}"
        )


def _layers_per_stage(config: RunConfig) -> None:
    parallel, layers = config.parallel, config.model.num_layers
    split, stages = parallel.layers_per_stage, parallel.pp * parallel.chunks
    if split == "auto":
        return
    found = f"parallel.layers_per_stage = {list(split)}"
    if len(split) != stages:
        raise ConfigError(f"{found} has {len(split)} numbers; parallel.pp x parallel.chunks = {stages} are needed, or auto")
    if min(split) < 1:
        raise ConfigError(f"{found}: each stage needs at least 1 layer; raise the {min(split)}, or set it to auto")
    if sum(split) != layers:
        last = split[-1] + layers - sum(split)
        fix = f"set the last one to {last}" if last > 0 else "set it to auto"
        raise ConfigError(f"{found} sums to {sum(split)}; model.num_layers is {layers}: {fix}")


def _world_size(config: RunConfig, world_size: int) -> None:
    parallel = config.parallel
    model_parallel = parallel.tp * parallel.pp * parallel.cp
    layout = f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp}"
    if parallel.dp and world_size != model_parallel * parallel.dp:
        fix = f" or set --parallel.dp to {world_size // model_parallel}" if world_size % model_parallel == 0 else ""
        raise ConfigError(
            f"the world size must be {layout} x dp {parallel.dp} = {model_parallel * parallel.dp}, and is {world_size}; "
            f"start {model_parallel * parallel.dp} processes{_launcher(world_size)}{fix}"
        )
    if world_size % model_parallel or world_size == 0:
        below = world_size // model_parallel * model_parallel
        raise ConfigError(
            f"the world size must be a multiple of {layout} = {model_parallel}, and is {world_size}; "
            f"start {_either([size for size in (below, below + model_parallel) if size])} processes{_launcher(world_size)}"
        )


def _launcher(world_size: int) -> str:
    """A hint for who started a program as one process."""
    return " (torchrun --nproc-per-node=NUMBER -m megatron_llama.train ...)" if world_size == 1 else ""


def _batch(config: RunConfig, world_size: int) -> None:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    dp = data_parallel_size(config, world_size)
    unit = micro * dp
    if batch % unit:
        below = batch // unit * unit
        raise ConfigError(
            f"train.global_batch_size must be a multiple of train.micro_batch_size x data-parallel size: {batch} over "
            f"{micro} x {dp} = {unit}; set --train.global_batch_size to "
            f"{_either([size for size in (below, below + unit) if size])}"
        )


def _shard_groups(config: RunConfig, world_size: int) -> None:
    size, dp = config.zero.shard_group_size, data_parallel_size(config, world_size)
    if size and dp % size:
        fitting = _around(size, range(1, dp + 1), lambda group: dp % group == 0)
        raise ConfigError(
            f"zero.shard_group_size must divide the data-parallel size: {size} over {dp}; "
            f"set --zero.shard_group_size to {_either(fitting)}, or to 0 to shard over all of them"
        )
    if size and config.zero.stage == 0:
        raise ConfigError(
            f"zero.shard_group_size = {size} says which ranks share an optimizer, and in zero.stage = 0 none do; "
            "set --zero.stage 1, or --zero.shard_group_size 0"
        )


def _gradients(config: RunConfig) -> None:
    if config.zero.gradient_dtype == "bf16" and config.train.dtype != "bf16":
        raise ConfigError(
            f"zero.gradient_dtype = bf16 needs train.dtype = bf16, which is {config.train.dtype}; "
            "set --zero.gradient_dtype fp32"
        )


def _sequence_split(config: RunConfig) -> None:
    length, tp = config.train.sequence_length, config.parallel.tp
    if config.parallel.sequence_parallel and length % tp:
        below = length // tp * tp
        raise ConfigError(
            f"under sequence parallelism parallel.tp must divide train.sequence_length: {length} over tp {tp}; "
            f"set --train.sequence_length to {_either([size for size in (below, below + tp) if size])}, "
            "or --parallel.sequence_parallel to false"
        )


def _training_data(config: RunConfig) -> None:
    if not config.data.train:
        raise ConfigError(
            "data.train is empty; give the prefix of an indexed dataset (PREFIX.bin and PREFIX.idx) with --data.train PREFIX"
        )
    packing = config.data.packing
    if packing != "none" and config.data.order == "megatron":
        raise ConfigError(
            f"data.packing = {packing} cannot be had with data.order = megatron, which cuts documents as Megatron does; "
            "set --data.packing none"
        )
    if packing != "none" and not config.data.document_mask:
        raise ConfigError(
            f"data.packing = {packing} puts unrelated documents into one sample, and data.document_mask = false would let them "
            "attend to each other; set --data.document_mask true"
        )


def _length(config: RunConfig) -> None:
    train = config.train
    if bool(train.steps) == bool(train.tokens):
        raise ConfigError(
            f"one of train.steps and train.tokens must be given: they are {train.steps} and {train.tokens}; "
            + ("set one of them to 0" if train.steps else f"set --train.steps (one step is {tokens_per_step(config)} tokens)")
        )
    if train.exit_step > total_steps(config):
        raise ConfigError(
            f"train.exit_step = {train.exit_step} is after the last step, {total_steps(config)}; set it to 0 to run to the end"
        )


def _optimizer(config: RunConfig) -> None:
    optimizer, steps = config.optimizer, total_steps(config)
    if optimizer.learning_rate <= 0:
        raise ConfigError(f"optimizer.learning_rate = {optimizer.learning_rate} must be above 0; LLaMA 7B has 3e-4")
    if optimizer.warmup_steps > steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is more than the {steps} steps of the run; "
            f"set --optimizer.warmup_steps to at most {steps}"
        )
    for name in ("beta1", "beta2"):
        if getattr(optimizer, name) >= 1:
            raise ConfigError(f"optimizer.{name} = {getattr(optimizer, name)} must be below 1; LLaMA has 0.9 and 0.95")
    if optimizer.min_learning_rate_ratio > 1:
        raise ConfigError(
            f"optimizer.min_learning_rate_ratio = {optimizer.min_learning_rate_ratio} is a share of the peak; "
            "set it to at most 1"
        )
    if optimizer.name == "adamw" and optimizer.eps <= 0:
        raise ConfigError(f"optimizer.eps = {optimizer.eps} must be above 0; the usual value is 1e-8")


def _post_validation(config: RunConfig) -> None:
    if config.parallel.post_validation and config.parallel.pp == 1:
        raise ConfigError(
            "parallel.post_validation = true spares pipeline ranks a wait for one another, and parallel.pp = 1: "
            "set --parallel.post_validation false"
        )


def _evaluation(config: RunConfig) -> None:
    if config.train.evaluate_every and not config.data.valid:
        raise ConfigError(
            f"train.evaluate_every = {config.train.evaluate_every} needs held-out data, and data.valid is empty; "
            "give --data.valid PREFIX, or set --train.evaluate_every to 0"
        )


def _start(config: RunConfig) -> None:
    checkpoint = config.checkpoint
    if checkpoint.weights_from and checkpoint.load not in ("auto", "none"):
        raise ConfigError(
            f"checkpoint.weights_from = {checkpoint.weights_from} and checkpoint.load = {checkpoint.load}: a run starts from "
            "one of them; set --checkpoint.load auto to start from the weights, or --checkpoint.weights_from '' to go on"
        )


def _around(value: int, candidates: Iterable[int], fits: Callable[[int], bool]) -> list[int]:
    """The fitting candidates nearest to `value`: the largest not above it and the smallest above it."""
    fitting = [candidate for candidate in candidates if fits(candidate)]
    below = [candidate for candidate in fitting if candidate <= value]
    above = [candidate for candidate in fitting if candidate > value]
    return below[-1:] + above[:1]


def _either(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)
