"""The kernel table: operation -> provider, resolved once, printed at start.

The last provider of each row is "reference": plain torch, which every other one is tested against. "auto" takes the first of
the row that is available on the device and has been run there against the real library.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.collectives import all_reduce
from parallel.errors import ConfigError
from parallel.groups import Axis
from parallel.host_copy import host_readable
from parallel.kernels import reference_kernels
from parallel.kernels.cross_entropy_kernels import CrossEntropyKernels
from parallel.kernels.providers import (
    AMPERE,
    COMPILER,
    HALF,
    HOPPER,
    ApexPackage,
    Condition,
    Kernel,
    Package,
    Provider,
    Workload,
)
from parallel.kernels.self_test import failure

HERE = "parallel.kernels."
TRITON = Package(("triton",), "pip install triton")


def _apex(function: str, extension: str, option: str, **facts: Any) -> Provider:
    package = ApexPackage((extension,), f"build NVIDIA's Apex from source with APEX_CPP_EXT=1 {option}=1")
    return Provider("apex", HERE + function, package, devices=("cuda",), verified=(), **facts)


def _transformer_engine(function: str) -> Provider:
    package = Package(("transformer_engine", "transformer_engine.pytorch"), "pip install transformer-engine[pytorch]")
    return Provider("transformer_engine", HERE + function, package, devices=("cuda",), verified=())


def _liger(function: str) -> Provider:
    package = Package(("liger_kernel", "triton"), "pip install liger-kernel")
    return Provider("liger", f"{HERE}liger_kernels:{function}", package, devices=("cuda",), verified=())


def _flash_attention(version: int, module: str, how_to_get: str, condition: Condition) -> Provider:
    function, package = f"{HERE}flash_attention_kernels:flash_attention_{version}", Package((module,), how_to_get)
    name = f"flash_attention_{version}"
    return Provider(name, function, package, ("cuda",), HALF, verified=(), condition=condition)


def _triton(function: str) -> Provider:
    """Our own. Run on CPUs in Triton's interpreter only, which is for tests."""
    return Provider("triton", HERE + function, TRITON, devices=("cuda",), verified=())


def _torch(function: str) -> Provider:
    return Provider("torch", HERE + function)


def _compiled(function: str) -> Provider:
    return Provider("compiled", f"{HERE}compiled_kernels:{function}", verified=("cpu",), condition=COMPILER)


def _reference(function: str, **facts: Any) -> Provider:
    return Provider("reference", HERE + function, **facts)


FA3_SOURCE = "build it from the folder hopper of FlashAttention's source"

# In order of preference.
ROWS: Mapping[str, tuple[Provider, ...]] = {
    "rms_norm": (
        _apex("apex_kernels:rms_norm", "fused_layer_norm_cuda", "APEX_CUDA_EXT"),
        _transformer_engine("transformer_engine_kernels:rms_norm"),
        _liger("rms_norm"),
        _triton("triton_norm:rms_norm"),
        _torch("torch_kernels:rms_norm"),
        _compiled("rms_norm"),
        _reference("reference_kernels:rms_norm"),
    ),
    "add_rms_norm": (
        _transformer_engine("transformer_engine_kernels:add_rms_norm"),
        _liger("add_rms_norm"),
        _triton("triton_norm:add_rms_norm"),
        _torch("torch_kernels:add_rms_norm"),
        _compiled("add_rms_norm"),
        _reference("reference_kernels:add_rms_norm"),
    ),
    "rope": (
        _apex("apex_kernels:rope", "fused_rotary_positional_embedding", "APEX_CUDA_EXT"),
        _liger("rope"),
        _torch("torch_kernels:rope"),
        _compiled("rope"),
        _reference("reference_kernels:rope"),
    ),
    "qkv_rope": (
        _triton("triton_rope:qkv_rope"),
        _reference("reference_kernels:qkv_rope"),
    ),
    "swiglu": (
        _transformer_engine("transformer_engine_kernels:swiglu"),
        _liger("swiglu"),
        _torch("torch_kernels:swiglu"),
        _compiled("swiglu"),
        _reference("reference_kernels:swiglu"),
    ),
    "attention": (
        _flash_attention(4, "flash_attn.cute", "pip install flash-attn-4", AMPERE),
        _flash_attention(3, "flash_attn_interface", FA3_SOURCE, HOPPER),
        _flash_attention(2, "flash_attn_2_cuda", "pip install flash-attn --no-build-isolation", AMPERE),
        Provider("varlen", f"{HERE}torch_attention:varlen", devices=("cuda",), dtypes=HALF, condition=AMPERE),
        Provider("sdpa", f"{HERE}torch_attention:sdpa"),
        _reference("reference_kernels:attention"),
    ),
    "wgrad": (
        _apex("apex_kernels:wgrad", "fused_weight_gradient_mlp_cuda", "APEX_CUDA_EXT"),
        _transformer_engine("transformer_engine_kernels:wgrad"),
        _torch("torch_kernels:wgrad"),
        _reference("reference_kernels:wgrad"),
    ),
    "cross_entropy": (
        _apex(
            "apex_kernels:cross_entropy",
            "xentropy_cuda",
            "APEX_XENTROPY",
            dtypes=(torch.float32, torch.float16),
            tensor_parallel=False,
        ),
        Provider("triton", "parallel.tensor.cross_entropy:triton_cross_entropy", TRITON, devices=("cuda",), verified=()),
        Provider("torch", "parallel.tensor.cross_entropy:vocabulary_parallel_cross_entropy"),
        _reference("reference_kernels:cross_entropy", tensor_parallel=False),
    ),
    "head_loss": (
        _triton("triton_cross_entropy:FUSED"),
        _torch("cross_entropy_kernels:BLOCKED"),
        _reference("reference_kernels:head_loss"),
    ),
    "adamw": (
        _apex("multi_tensor_kernels:apex_adamw", "amp_C", "APEX_CUDA_EXT"),
        _transformer_engine("multi_tensor_kernels:transformer_engine_adamw"),
        _torch("optimizer_kernels:adamw"),
        _reference("optimizer_kernels:adamw_reference"),
    ),
    "l2_norm": (
        _apex("multi_tensor_kernels:apex_l2_norm", "amp_C", "APEX_CUDA_EXT"),
        _transformer_engine("multi_tensor_kernels:transformer_engine_l2_norm"),
        _torch("optimizer_kernels:l2_norm"),
        _reference("optimizer_kernels:l2_norm_reference"),
    ),
}


@dataclass(frozen=True)
class Kernels:
    """The chosen function of each operation; signatures are those of `parallel.kernels.reference_kernels`."""

    rms_norm: Kernel
    add_rms_norm: Kernel
    rope: Kernel
    qkv_rope: Kernel
    swiglu: Kernel
    attention: Kernel
    wgrad: Kernel
    cross_entropy: Kernel
    head_loss: CrossEntropyKernels
    adamw: Kernel
    l2_norm: Kernel
    names: Mapping[str, str]  # operation -> provider
    unverified: frozenset[str] = frozenset()  # operations whose provider has never run on this kind of device
    fprop: Kernel = reference_kernels.fprop  # the other two products of a linear; float8 replaces all three
    dgrad: Kernel = reference_kernels.dgrad

    def __str__(self) -> str:
        return ", ".join(
            f"{operation} {name}{' (unverified)' if operation in self.unverified else ''}"
            for operation, name in self.names.items()
        )


def resolve_kernels(wanted: Mapping[str, str] | None = None, workload: Workload | None = None) -> Kernels:
    """Choose a provider per operation. `wanted` maps operations to "auto" or a provider's name.

    Raises ConfigError where an operation or a provider is not known, cannot run there, or fails its self-test.
    """
    workload, wanted = workload or Workload(), dict(wanted or {})
    unknown = set(wanted) - set(ROWS)
    if unknown:
        raise ConfigError(f"kernels.{min(unknown)}: no such operation; there are {', '.join(ROWS)}")
    chosen = {operation: _choose(operation, wanted.get(operation, "auto"), workload) for operation in ROWS}
    device = workload.device.type
    return Kernels(
        **{operation: provider.load() for operation, provider in chosen.items()},
        names={operation: provider.name for operation, provider in chosen.items()},
        unverified=frozenset(operation for operation, provider in chosen.items() if device not in provider.verified),
    )


def _choose(operation: str, name: str, workload: Workload) -> Provider:
    row = ROWS[operation]
    if name == "auto":
        return _first_that_works(operation, workload)
    for provider in row:
        if provider.name == name:
            reason = provider.missing(workload) or _problem(operation, provider, workload)
            if reason is not None:
                raise ConfigError(f"kernels.{operation} = {name!r} cannot run here: {reason}; set --kernels.{operation} auto")
            return provider
    known = ", ".join(["auto"] + [provider.name for provider in row])
    raise ConfigError(f"kernels.{operation} = {name!r} is not a provider of this version; there are {known}")


def _first_that_works(operation: str, workload: Workload) -> Provider:
    """The first provider that is verified on the device, available, and passes its self-test."""
    for provider in ROWS[operation]:
        if workload.device.type not in provider.verified or provider.missing(workload) is not None:
            continue
        problem = _problem(operation, provider, workload)
        if problem is None:
            return provider
        warnings.warn(f"kernels.{operation} = auto passes over {provider.name}: {problem}", stacklevel=2)
    raise ConfigError(f"kernels.{operation} = 'auto' finds no provider that can run here")


def _problem(operation: str, provider: Provider, workload: Workload) -> str | None:
    """What the self-test finds, or None. Torch on a CPU and the references are taken as they are."""
    if provider.package is None and (workload.device.type == "cpu" or provider.name == "reference"):
        return None
    return failure(operation, provider, ROWS[operation][-1], workload)


def check_same_choice(kernels: Kernels, world: Axis, device: torch.device) -> None:
    """All ranks call it together. Raises ConfigError on each of them where their choices differ.

    Ranks with other kernels round otherwise, and what should be copies would drift apart.
    """
    places = [[provider.name for provider in row].index(kernels.names[name]) for name, row in ROWS.items()]
    extremes = torch.tensor([places, [-place for place in places]], device=host_readable(device))
    highest, lowest = all_reduce(extremes, world, dist.ReduceOp.MAX).tolist()
    for (operation, row), high, low in zip(ROWS.items(), highest, lowest, strict=True):
        if high != -low:
            first, last = row[-low].name, row[high].name
            raise ConfigError(
                f"kernels.{operation} = auto chooses {first} on some ranks and {last} on others: their machines differ; "
                f"set --kernels.{operation} {last}"
            )
