"""How DeepSpeed is started: its one version, its configuration, our axes as it asks for them, and nothing left behind.

The only module that imports DeepSpeed, and only when it is asked for.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.errors import ConfigError
from parallel.groups import ProcessGroups
from parallel.launch import lent_environment, provide_local_rank
from parallel.zero.engine import OptimizerSettings

VERSION = "0.19.8"  # the one that was tested; its optimizers are reached into
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class DeepSpeedOptions:
    """What only this engine has. `extra` is merged into DeepSpeed's configuration."""

    offload: str = "none"
    micro_batch_size: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)
    offload_directory: str = ""  # for offload = "nvme"


def deepspeed_settings(dtype: torch.dtype, settings: OptimizerSettings, options: DeepSpeedOptions) -> dict[str, Any]:
    """DeepSpeed's configuration: what it must be for this engine, and `options.extra`."""
    stage, bf16 = settings.zero_stage, dtype == torch.bfloat16
    offloaded = options.offload != "none"
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": settings.overlap and stage > 1,
        "contiguous_gradients": stage > 1 or offloaded,
        "reduce_bucket_size": settings.bucket_size,
    }
    if stage < 3 and not offloaded and not (stage == 1 and bf16):
        zero["compute_grad_norm"] = False
    if offloaded:
        zero["offload_optimizer"] = {"device": options.offload}
    if options.offload == "nvme":
        zero["offload_optimizer"]["nvme_path"] = options.offload_directory
    made = {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "sum" if stage < 3 else "mean",
        "communication_data_type": _NAMES[settings.reduce_dtype],
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": bf16, "immediate_grad_update": False, "check_grad_overflow": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    return _merged(options.extra, made)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section."""
    result = dict(base)
    for key, value in over.items():
        result[key] = _merged(base.get(key, {}), value) if isinstance(value, Mapping) else value
    return result


def start_deepspeed(
    model: nn.Module, optimizer: torch.optim.Optimizer, groups: ProcessGroups, device: torch.device, config: dict[str, Any]
) -> Any:
    """A DeepSpeed engine over the model; all ranks call it together."""
    local_rank = device.index or 0
    if config["zero_optimization"]["stage"] == 3:
        provide_local_rank(local_rank)  # read in forward passes too
    silence = redirect_stdout(StringIO())  # it prints its memory use, whatever its logging is set to
    with lent_environment({"DS_ACCELERATOR": device.type, "LOCAL_RANK": str(local_rank)}), silence:
        deepspeed = import_deepspeed()
        if config["zero_optimization"].get("offload_optimizer", {}).get("device") == "nvme":
            load_async_io(deepspeed)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=Mpu(groups))
        except ValueError as error:
            raise ConfigError(f"DeepSpeed refuses its configuration: {error}; correct zero.deepspeed_config") from error
    return engine


def import_deepspeed() -> ModuleType:
    """DeepSpeed, of the one version that was tested. Raises ConfigError where it is another or cannot be imported."""
    advice = f"pip install deepspeed=={VERSION} (or megatron-llama[deepspeed]), or set --zero.engine native"
    try:
        with _quiet_linker():
            import deepspeed
    except (ImportError, OSError) as error:
        raise ConfigError(f"zero.engine = deepspeed needs deepspeed, which fails to import ({error}): {advice}") from error
    found = deepspeed.__version__
    if found != VERSION:
        raise ConfigError(f"zero.engine = deepspeed needs deepspeed {VERSION}, and {found} is installed: {advice}")
    # On CPUs the first process group would otherwise compile a shared-memory all-reduce, meant for inference, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def load_async_io(deepspeed: ModuleType) -> None:
    """DeepSpeed's extension for files, compiled at its first use on a machine. Raises ConfigError where it cannot be had."""
    builder = deepspeed.ops.op_builder.AsyncIOBuilder()
    if not builder.is_compatible():
        raise ConfigError(
            "zero.offload = nvme needs libaio, which is not found: apt-get install libaio-dev (Debian, Ubuntu), "
            "dnf install libaio-devel (Fedora, RHEL), or set --zero.offload cpu"
        )
    try:
        builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        raise ConfigError(
            f"zero.offload = nvme needs DeepSpeed's extension async_io, which cannot be compiled or loaded ({error}): "
            "install g++ and ninja, or set --zero.offload cpu"
        ) from error


def own_folder(directory: str) -> str:
    """A new folder in `directory` for this process alone. Raises ConfigError where files can't be written past the cache."""
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory) as probe:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
        return tempfile.mkdtemp(prefix="optimizer-", dir=directory)
    except OSError as error:
        raise ConfigError(
            f"zero.offload_directory = {directory} cannot hold files for direct reads and writes: {error.strerror}; "
            "give a folder on a local disk"
        ) from error


@contextmanager
def _quiet_linker() -> Iterator[None]:
    """Importing DeepSpeed tries to link libraries that it can do without, and the linker says so for each one on each rank."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Mpu:
    """Our axes as DeepSpeed asks for them; "model parallel" is tensor and pipeline together. All ranks build it together."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups
        topology, rank = groups.topology, groups.world.ranks[groups.world.rank]
        self._data = groups.data.group or _member_group(topology.groups("dp", "cp"), rank)
        self._model = _member_group(topology.groups("pp", "tp"), rank)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._groups.data.ranks)

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data.size

    def get_data_parallel_rank(self) -> int:
        return self._groups.data.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return self._groups.topology.tp * self._groups.topology.pp

    def get_model_parallel_rank(self) -> int:
        return self._groups.place.pp * self._groups.topology.tp + self._groups.place.tp

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.tp.size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.tp.rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._groups.topology.pp


def _member_group(all_ranks: list[tuple[int, ...]], rank: int) -> dist.ProcessGroup:
    """This rank's process group among `all_ranks`, of one member too: DeepSpeed would take None for the world."""
    mine = None
    for ranks in all_ranks:
        group = dist.new_group(list(ranks))
        if rank in ranks:
            mine = group
    assert mine is not None
    return mine
