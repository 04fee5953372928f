"""The kernel table: operation -> backend, resolved once, printed at start.

Every operation has the backend "torch": plain torch, which is the reference that others are tested against. "auto" takes the
first backend of the operation's row that is available on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from parallel.errors import ConfigError
from parallel.kernels import lean_kernels, torch_kernels

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """One implementation: its name, the function, and a reason why it is not available (None where it is)."""

    name: str
    function: Kernel
    missing: Callable[[torch.device], str | None] = lambda device: None


# In order of preference. Fused Apex, Triton and FlashAttention backends are rows to add here.
ROWS: Mapping[str, tuple[Backend, ...]] = {
    "rms_norm": (Backend("lean", lean_kernels.rms_norm), Backend("torch", torch_kernels.rms_norm)),
    "rope": (Backend("lean", lean_kernels.rope), Backend("torch", torch_kernels.rope)),
    "swiglu": (Backend("lean", lean_kernels.swiglu), Backend("torch", torch_kernels.swiglu)),
    "attention": (
        Backend("varlen", torch_kernels.varlen_attention, torch_kernels.varlen_missing),
        Backend("sdpa", torch_kernels.sdpa_attention),
        Backend("torch", torch_kernels.attention),
    ),
    "wgrad": (Backend("torch", torch_kernels.wgrad),),
}


@dataclass(frozen=True)
class Kernels:
    """The chosen function of each operation; signatures are those of `parallel.kernels.torch_kernels`."""

    rms_norm: Kernel
    rope: Kernel
    swiglu: Kernel
    attention: Kernel
    wgrad: Kernel
    names: Mapping[str, str]
    fprop: Kernel = torch_kernels.fprop  # the other two products of a linear; float8 replaces all three
    dgrad: Kernel = torch_kernels.dgrad

    def __str__(self) -> str:
        return ", ".join(f"{operation} {name}" for operation, name in self.names.items())


def resolve_kernels(wanted: Mapping[str, str] | None = None, device: torch.device | None = None) -> Kernels:
    """Choose a backend per operation. `wanted` maps operations to "auto" or a backend's name.

    Raises ConfigError where an operation or a backend is not known, or is not available on the device.
    """
    device = device or torch.device("cpu")
    wanted = dict(wanted or {})
    unknown = set(wanted) - set(ROWS)
    if unknown:
        raise ConfigError(f"kernels.{min(unknown)}: no such operation; there are {', '.join(ROWS)}")
    chosen = {operation: _choose(operation, wanted.get(operation, "auto"), device) for operation in ROWS}
    functions = {operation: backend.function for operation, backend in chosen.items()}
    return Kernels(**functions, names={operation: backend.name for operation, backend in chosen.items()})


def _choose(operation: str, name: str, device: torch.device) -> Backend:
    for backend in ROWS[operation]:
        reason = backend.missing(device)
        if name == backend.name and reason is not None:
            raise ConfigError(f"kernels.{operation} = {name!r} cannot run here: {reason}")
        if name == backend.name or (name == "auto" and reason is None):
            return backend
    known = ", ".join(["auto"] + [backend.name for backend in ROWS[operation]])
    raise ConfigError(f"kernels.{operation} = {name!r} is not a backend of this version; there are {known}")
