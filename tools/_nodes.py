"""Two "nodes" on one machine: network namespaces joined by a link whose rate can be limited. Needs root and iproute2.

Nothing is added to the machine's own network: both ends of the link are inside the namespaces, and vanish with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

INTERFACE = "eth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PREFIX = "link-test"  # of the namespaces' names, which go on with this process's number


class Nodes:
    """As a context: makes the nodes, and at the end ends the processes that it started and removes the nodes.

    Raises OSError, saying why, where the machine lets no one make them.
    """

    def __init__(self) -> None:
        self.names = [f"{PREFIX}-{os.getpid()}-{rank}" for rank in range(len(ADDRESSES))]
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Nodes:
        reason = missing()
        if reason is not None:
            raise OSError(reason)
        _remove_orphans()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()

    def _make(self) -> None:
        for name in self.names:
            _call("ip", "netns", "add", name)
        first, second = self.names
        _call("ip", "-n", first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _call("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _call("ip", "-n", name, "link", "set", interface, "up")

    def _remove(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for name in self.names:
            with suppress(OSError):
                _call("ip", "netns", "delete", name)

    def start(
        self, node: int, command: Sequence[str], environment: Mapping[str, str], errors: IO[str]
    ) -> subprocess.Popen[str]:
        """Start a program on a node, its standard output in a pipe, its standard error in `errors`."""
        line = ["ip", "netns", "exec", self.names[node], *command]  # (it becomes the program: one process, its own /sys)
        process = subprocess.Popen(line, env=dict(environment), stdout=subprocess.PIPE, stderr=errors, text=True)
        self._processes.append(process)
        return process


def missing() -> str | None:
    """Why nodes cannot be made here, or None."""
    absent = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if absent:
        return f"{' and '.join(absent)} not found: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _call("ip", "netns", "add", name)
        _call("ip", "-n", name, "link", "add", "d0", "type", "veth", "peer", "name", "d1")
        _call("ip", "netns", "exec", name, "tc", *_limit("d0", 1))
    except OSError as error:
        return f"this machine lets no one make network namespaces with limited links: {error}"
    finally:
        with suppress(OSError):
            _call("ip", "netns", "delete", name)
    return None


def limit_rate(megabits: float) -> None:
    """Called on a node: limit what it sends. Both nodes together limit both directions."""
    _call("tc", *_limit(INTERFACE, megabits))


def transmitted_bytes() -> int:
    """Called on a node: what it has sent so far, headers and acknowledgements included."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def _limit(interface: str, megabits: float) -> list[str]:
    rate = ["rate", f"{megabits:g}mbit", "burst", "128kb", "latency", "100ms"]  # a token bucket, and a queue behind it
    return ["qdisc", "replace", "dev", interface, "root", "tbf", *rate]


def _remove_orphans() -> None:
    """Remove the nodes of processes that were killed before they could."""
    for path in Path("/run/netns").glob(f"{PREFIX}-*"):
        owner = path.name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if not Path("/proc", owner).exists():
            with suppress(OSError):
                _call("ip", "netns", "delete", path.name)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
