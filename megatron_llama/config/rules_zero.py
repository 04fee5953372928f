"""Rules about optimizer engines: what the support table refuses, and what a DeepSpeed configuration file may say.

Each raises ConfigError with the setting, the reason and the smallest change.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_llama.config.sections import RunConfig, micro_batches_per_step
from parallel.errors import ConfigError
from parallel.zero.support import refusal

ZERO_PLUS_PLUS = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False}  # off

# Sections and keys of a DeepSpeed file that would set what this program sets, and the flag for it ("": it has none).
NOT_TAKEN = {
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.learning_rate",
    "fp16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "pipeline": "parallel.pp",
    "compile": "train.compile",
    "activation_checkpointing": "parallel.recompute",
    "checkpoint": "checkpoint.directory",
    "data_efficiency": "",
    "curriculum_learning": "",
    "managed_gradient_accumulation": "",
    "gradient_allreduce_op": "",
    "prescale_gradients": "",
    "gradient_predivide_factor": "",
    "zero_allow_untested_optimizer": "",
    "zero_force_ds_cpu_optimizer": "",
    "zero_optimization.offload_param": "zero.offload",
    "zero_optimization.contiguous_gradients": "",
    "zero_optimization.compute_grad_norm": "",
    "zero_optimization.round_robin_gradients": "",
    "zero_optimization.parameter_alignment": "",
    "bf16.immediate_grad_update": "",
    "bf16.check_grad_overflow": "",
    "steps_per_print": "log.every",
}


def engine_supports(config: RunConfig) -> None:
    """The engine exists in its stage, and has everything that is asked of it."""
    engine, stage = config.zero.engine, config.zero.stage
    refused = refusal(engine, stage)
    if refused is not None:
        raise ConfigError(
            f"zero.engine = {engine} cannot be had with zero.stage = {stage}: {refused.because}; set {refused.instead}"
        )
    for feature, setting in wanted(config):
        refused = refusal(engine, stage, feature)
        if refused is not None:
            raise ConfigError(
                f"{setting} cannot be had with zero.engine = {engine}, zero.stage = {stage}: {refused.because}; "
                f"set {refused.instead}"
            )


def offload_folder(config: RunConfig) -> None:
    """A folder for the optimizer's files where they are asked for, and nowhere else."""
    offload, folder = config.zero.offload, config.zero.offload_directory
    if offload == "nvme" and not folder:
        raise ConfigError("zero.offload = nvme needs a folder; set --zero.offload_directory to one on a fast local disk")
    if folder and offload != "nvme":
        raise ConfigError(
            f"zero.offload_directory = {folder} is for zero.offload = nvme, not {offload}: remove it or set --zero.offload nvme"
        )


def wanted(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The features of the support table that a run asks for, each with the setting that asks."""
    parallel, zero, train, optimizer = config.parallel, config.zero, config.train, config.optimizer
    schedule, zero_plus_plus = parallel.schedule, _zero_plus_plus(config)
    asked = {
        "tensor": parallel.tp > 1 and f"parallel.tp = {parallel.tp}",
        "pipeline": parallel.pp > 1 and f"parallel.pp = {parallel.pp}",
        "schedules": schedule != "1f1b" and f"parallel.schedule = {schedule}",
        "post_validation": parallel.post_validation and "parallel.post_validation = true",
        "fp16": train.dtype == "fp16" and "train.dtype = fp16",
        "shard_groups": zero.shard_group_size and f"zero.shard_group_size = {zero.shard_group_size}",
        "bf16_gradients": zero.gradient_dtype == "bf16" and "zero.gradient_dtype = bf16",
        "bf16_wire": zero.reduce_dtype == "bf16" and "zero.reduce_dtype = bf16",
        "narrow_state": (optimizer.moment_dtype != "fp32" and f"optimizer.moment_dtype = {optimizer.moment_dtype}")
        or (optimizer.master_weights != "fp32" and f"optimizer.master_weights = {optimizer.master_weights}"),
        "host_offload": zero.offload == "cpu" and "zero.offload = cpu",
        "file_offload": zero.offload == "nvme" and "zero.offload = nvme",
        "compile": train.compile and "train.compile = true",
        "cuda_graphs": train.cuda_graphs and "train.cuda_graphs = true",
        "float8": train.float8 != "none" and f"train.float8 = {train.float8}",
        "zero_plus_plus": zero_plus_plus,
        "zero_plus_plus_tensor": parallel.tp > 1 and zero_plus_plus,
    }
    return ((feature, setting) for feature, setting in asked.items() if setting)


def _zero_plus_plus(config: RunConfig) -> str:
    """The key of ZeRO++ that the DeepSpeed file has, if any."""
    if not config.zero.deepspeed_config:
        return ""
    section = _read(config).get("zero_optimization", {})
    keys = [key for key, off in ZERO_PLUS_PLUS.items() if section.get(key, off) != off]
    return f"{keys[0]} in zero.deepspeed_config {config.zero.deepspeed_config}" if keys else ""


def deepspeed_file(config: RunConfig, world_size: int) -> None:
    """The DeepSpeed file is there, and says nothing else than the configuration does."""
    path = config.zero.deepspeed_config
    if not path:
        return
    if config.zero.engine != "deepspeed":
        raise ConfigError(f"zero.deepspeed_config = {path} is for zero.engine = deepspeed, not {config.zero.engine}; remove it")
    stated = _stated(config, world_size)
    for key, value in _leaves(_read(config)):
        if key in stated:
            ours, flag = stated[key]
            if value not in (ours, "auto"):
                raise ConfigError(
                    f"zero.deepspeed_config {path} has {key} = {json.dumps(value)}, and {flag} makes it {json.dumps(ours)}: "
                    f"remove it from the file, or change --{flag}"
                )
            continue
        for refused, flag in NOT_TAKEN.items():
            if key == refused or key.startswith(f"{refused}."):
                instead = f"--{flag} is for that" if flag else "the engine sets it itself"
                found = f"zero.deepspeed_config {path} has {key} = {json.dumps(value)}"
                raise ConfigError(f"{found}, which is not read from there: remove it, {instead}")
    _zero_plus_plus_device(config)


def _zero_plus_plus_device(config: RunConfig) -> None:
    import torch

    setting = _zero_plus_plus(config)
    if setting and (config.train.device == "cpu" or not torch.cuda.is_available()):
        raise ConfigError(f"{setting} needs CUDA: DeepSpeed has its quantisation for no other device; remove it from the file")


def _stated(config: RunConfig, world_size: int) -> dict[str, tuple[Any, str]]:
    """What a DeepSpeed file may repeat: its keys, our values, and the flags that they come from."""
    train, zero, optimizer = config.train, config.zero, config.optimizer
    return {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (micro_batches_per_step(config, world_size), "train.global_batch_size"),
        "gradient_clipping": (optimizer.clip_norm, "optimizer.clip_norm"),
        "bf16.enabled": (train.dtype == "bf16", "train.dtype"),
        "fp16.enabled": (train.dtype == "fp16", "train.dtype"),
        "communication_data_type": (zero.reduce_dtype, "zero.reduce_dtype"),
        "data_types.grad_accum_dtype": (zero.gradient_dtype, "zero.gradient_dtype"),
        "zero_optimization.stage": (zero.stage, "zero.stage"),
        "zero_optimization.overlap_comm": (zero.overlap, "zero.overlap"),
        "zero_optimization.reduce_bucket_size": (zero.bucket_size, "zero.bucket_size"),
        "zero_optimization.offload_optimizer.device": (zero.offload, "zero.offload"),
        "zero_optimization.offload_optimizer.nvme_path": (zero.offload_directory, "zero.offload_directory"),
    }


def further_settings(config: RunConfig) -> dict[str, Any]:
    """What the DeepSpeed file says beyond the configuration, for the engine."""
    if not config.zero.deepspeed_config:
        return {}
    repeated = _stated(config, world_size=1)
    return _without(_read(config), repeated)


def _without(section: Mapping[str, Any], keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The section without the keys whose dotted names are given."""
    kept = {name: value for name, value in section.items() if prefix + name not in keys}
    return {n: _without(v, keys, f"{prefix}{n}.") if isinstance(v, Mapping) else v for n, v in kept.items()}


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _read(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed file."""
    path = config.zero.deepspeed_config
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"zero.deepspeed_config {path} cannot be read: {error.strerror}; give a JSON file's path") from error
    except ValueError as error:
        raise ConfigError(f"zero.deepspeed_config {path} is no JSON: {error}; correct it there") from error
    if not isinstance(content, dict):
        raise ConfigError(f"zero.deepspeed_config {path} holds a {type(content).__name__}; DeepSpeed wants an object, {{...}}")
    for section in ("zero_optimization", "bf16", "data_types"):
        if not isinstance(content.get(section, {}), dict):
            raise ConfigError(f"zero.deepspeed_config {path} has {section} = {content[section]}; DeepSpeed wants an object")
    return content


RULES = (engine_supports, offload_folder)
