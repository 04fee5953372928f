"""What the rows of the kernel table are made of: who provides an operation, where it runs, and what it needs.

Nothing here imports a provider's package or touches CUDA: packages are found by the specs of their modules.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pkgutil import resolve_name
from typing import Any

import torch

Kernel = Any  # a function, or what holds the functions of an operation that takes several

HALF = (torch.bfloat16, torch.float16)
ANY_DTYPE = (torch.float32, *HALF)


@dataclass(frozen=True)
class Workload:
    """What the kernels will run on: the device, the dtype of weights and activations, and the tensor-parallel size."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    tp_size: int = 1


@dataclass(frozen=True)
class Condition:
    """What a provider needs of the machine, in words and as a test."""

    need: str
    holds: Callable[[Workload], bool]


ANYWHERE = Condition("nothing", lambda workload: True)
AMPERE = Condition(
    "an NVIDIA GPU of the Ampere generation or later",
    lambda workload: torch.cuda.get_device_capability(workload.device) >= (8, 0),
)
HOPPER = Condition(
    "an NVIDIA GPU of the Hopper generation", lambda workload: torch.cuda.get_device_capability(workload.device)[0] == 9
)
COMPILER = Condition(
    "a C++ compiler, and triton on GPUs",
    lambda workload: (
        any(map(shutil.which, ("c++", "g++", "clang++"))) and (workload.device.type == "cpu" or is_installed("triton"))
    ),
)


@dataclass(frozen=True)
class Package:
    """A library that a provider needs besides torch: the modules that must be there, and how to get them."""

    modules: tuple[str, ...]
    how_to_get: str

    def missing(self) -> str | None:
        """The first module that is not installed and what to do about it, or None."""
        for module in self.modules:
            if not is_installed(module):
                return f"module {module} is not installed: {self.how_to_get}"
        return None


@dataclass(frozen=True)
class ApexPackage(Package):
    """NVIDIA Apex, by its compiled extension modules: another project owns the name `apex` on the package index."""

    def missing(self) -> str | None:
        """What is not installed, or who else is installed under that name; None where nothing is missing."""
        reason = super().missing()
        if reason is None or not is_installed("apex"):
            return reason
        if is_installed("apex.multi_tensor_apply"):
            return f"NVIDIA's apex is installed without its CUDA extensions: {reason}"
        return f"the installed 'apex' is not NVIDIA's: {reason}"


def is_installed(module: str) -> bool:
    """Whether the module can be found. Neither it nor a package that it lies in is imported."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec is not None


@dataclass(frozen=True)
class Provider:
    """One implementation of an operation.

    `function` is "module:name", imported when it is chosen. `verified` are the device types on which it has run against the
    real library; `auto` chooses it on no other.
    """

    name: str
    function: str
    package: Package | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = ANY_DTYPE
    tensor_parallel: bool = True
    verified: tuple[str, ...] = ("cpu", "cuda")
    condition: Condition = ANYWHERE

    def load(self) -> Kernel:
        """The function; imports its module."""
        return resolve_name(self.function)

    def missing(self, workload: Workload) -> str | None:
        """Why it cannot run there, or None."""
        device, dtype = workload.device.type, workload.dtype
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {device}"
        if dtype not in self.dtypes:
            return f"it computes in {' and '.join(map(short, self.dtypes))}, not in {short(dtype)}"
        if workload.tp_size > 1 and not self.tensor_parallel:
            return f"it knows no tensor parallelism, and parallel.tp = {workload.tp_size}"
        if self.package is not None and (reason := self.package.missing()) is not None:
            return reason
        if device == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA device"
        return None if self.condition.holds(workload) else f"it needs {self.condition.need}"


def short(dtype: torch.dtype) -> str:
    """Its name as the configuration has it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
