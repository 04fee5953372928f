"""Hardware profiles: what a GPU and its links can do by their data sheets, and what share of it programs reach.

A profile is a TOML file. Those of this folder come with the project; `find` takes the path of another one as well. A file may
be `based_on` another profile and give only what differs, as a cluster with slower links does:

    based_on = "h100"
    network_gb_per_second = 25          # per GPU and direction
    gpus_per_node = 4
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError

FOLDER = Path(__file__).parent / "hardware"
GIGA, TERA, GIB = 1e9, 1e12, 2**30
MAY_BE_ZERO = ("float8_tflops", "watts")  # a device without float8; one whose power is not known


@dataclass(frozen=True)
class Efficiency:
    """What programs reach of the data sheet, one set for all software and all sizes, fitted to published runs (`fit`).

    `product`: the share of the dense peak that large products reach. `product_depth`: the inner size at which half of that is
    reached. `attention`: factor on the shares of attention kernels. `memory`, `link`, `network`: shares of the bandwidths.
    `contention`: what communication that runs beside computation takes from it, in shares of its own time. `launch_seconds`:
    of the host to launch a kernel. `latency_seconds`: of a collective inside a node, twice that across nodes. `jitter`: what
    a step loses each time the number of nodes doubles. `float8`: share of the float8 peak, in units of `product`.
    """

    product: float = 0.70
    product_depth: float = 300.0
    attention: float = 1.0
    memory: float = 0.80
    link: float = 0.78
    network: float = 0.70
    contention: float = 0.15
    launch_seconds: float = 8e-6
    latency_seconds: float = 15e-6
    jitter: float = 0.002
    float8: float = 0.85


@dataclass(frozen=True)
class Hardware:
    """A GPU and its links: FLOP/s dense, bytes per second and direction, watts of the board.

    `link_*` is what joins the GPUs of a node (NVLink); `network_*` what joins nodes, per GPU. `attention`: kernel -> shares of
    the bf16 peak in the forward and the backward pass, causal FLOPs, heads of 128, long samples.
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    float8_flops: float
    memory_bytes_per_second: float
    multiprocessors: int
    link_bytes_per_second: float
    network_bytes_per_second: float
    gpus_per_node: int
    watts: float
    attention: Mapping[str, tuple[float, float]]
    efficiency: Efficiency

    def __hash__(self) -> int:
        return hash((self.name, self.efficiency, self.memory_bytes_per_second))


@dataclass(frozen=True)
class Cluster:
    """`gpus` GPUs of one kind; `gpus_per_node` of them are joined by fast links, the others by the network."""

    hardware: Hardware
    gpus: int
    gpus_per_node: int
    network_bytes_per_second: float

    @classmethod
    def of(cls, hardware: Hardware, gpus: int) -> Cluster:
        """A cluster as the profile describes it."""
        return cls(hardware, gpus, hardware.gpus_per_node, hardware.network_bytes_per_second)


_UNITS = {  # key of a file -> (field, unit)
    "memory_gib": ("memory_bytes", GIB),
    "bf16_tflops": ("bf16_flops", TERA),
    "float8_tflops": ("float8_flops", TERA),
    "memory_tb_per_second": ("memory_bytes_per_second", TERA),
    "multiprocessors": ("multiprocessors", 1),
    "link_gb_per_second": ("link_bytes_per_second", GIGA),
    "network_gb_per_second": ("network_bytes_per_second", GIGA),
    "gpus_per_node": ("gpus_per_node", 1),
    "watts": ("watts", 1),
}


def names() -> list[str]:
    """The profiles that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


@lru_cache
def find(name: str) -> Hardware:
    """The profile of that name, or in the file of that path. Raises ConfigError with the nearest known name."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{_plain(name)}.toml"
    if not path.is_file():
        raise ConfigError(f"unknown GPU {name!r}; the nearest known one is {_nearest(name)} (all: {', '.join(names())})")
    return _build(_plain(path.stem), _values(path), path)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")


def _nearest(name: str) -> str:
    wanted, known = _plain(Path(name).stem), names()
    starting = [one for one in known if one.startswith(wanted) or wanted.startswith(one)]
    return max(starting or known, key=lambda one: difflib.SequenceMatcher(None, one, wanted).ratio())


def _values(path: Path) -> dict[str, Any]:
    """The content of a profile over that of the one that it is based on. Raises ConfigError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"hardware profile {path}: {error}") from error
    known = {*_UNITS, "based_on", "source", "attention", "efficiency"}
    for key in values:
        if key not in known:
            closest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"hardware profile {path}: unknown key {key}; the closest known one is {closest}")
    if "based_on" not in values:
        return values
    base = FOLDER / f"{_plain(str(values.pop('based_on')))}.toml"
    if not base.is_file() or base == path.resolve():
        raise ConfigError(f"hardware profile {path}: based_on must be one of {', '.join(names())}, and is {base.stem!r}")
    merged = _values(base)
    for key in ("attention", "efficiency"):
        values[key] = merged.get(key, {}) | values.get(key, {})
    return merged | values


def _build(name: str, values: Mapping[str, Any], path: Path) -> Hardware:
    fields = {}
    for key, (field, unit) in _UNITS.items():
        value = values.get(key)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            if not (key in MAY_BE_ZERO and value == 0):
                raise ConfigError(f"hardware profile {path}: {key} must be a number above 0, and is {value!r}")
        fields[field] = value * unit
    attention = {kernel: tuple(shares) for kernel, shares in values.get("attention", {}).items()}
    unknown = set(values.get("efficiency", {})) - {item.name for item in dataclasses.fields(Efficiency)}
    if unknown:
        raise ConfigError(f"hardware profile {path}: unknown key efficiency.{sorted(unknown)[0]}")
    return Hardware(name=name, attention=attention, efficiency=Efficiency(**values.get("efficiency", {})), **fields)
