"""Several "nodes" on one machine, each with network, host name, processes and /dev/shm of its own, and a login node, the head.

Nothing is added to the machine's own network: the bridge that joins the nodes is inside the head, and a packet to anywhere else
is unreachable. All of it is held by processes that end with this one, so nothing stays behind even after a kill.
Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("ip", "tc", "unshare", "nsenter", "setpriv", "mount")
HEAD, HEAD_ADDRESS = "head", "10.77.0.1"


class CannotHaveIt(Exception):
    """This machine lacks what the laboratory needs."""


class Laboratory:
    """As a context: nodes `n01`, `n02`, ... with addresses 10.77.0.11, ...; `directory` is seen by all of them."""

    def __init__(self, directory: Path, nodes: int = 3) -> None:
        self.directory = directory
        self.addresses = {HEAD: HEAD_ADDRESS} | {f"n{i:02d}": f"10.77.0.{10 + i}" for i in range(1, nodes + 1)}
        self.nodes = [name for name in self.addresses if name != HEAD]
        self._holders: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Laboratory:
        check_machine()
        self.directory.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        (self.directory / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self.directory / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        try:
            self._hold(HEAD)
            bridge = ["name", "br0", "type", "bridge"]
            for command in (
                ["link", "add", *bridge],
                ["address", "add", f"{HEAD_ADDRESS}/24", "dev", "br0"],
                ["link", "set", "br0", "up"],
            ):
                self.run(HEAD, "ip", *command)
            for name in self.nodes:
                self.power_on(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in [*self.nodes, HEAD]:
            self.power_off(name)

    # ---- nodes ------------------------------------------------------------------------------------------------------------

    def power_on(self, name: str) -> None:
        """Start a node that is off, and plug it in."""
        self._hold(name)
        pid, head = self._pid(name), self._pid(HEAD)
        with suppress(subprocess.CalledProcessError):  # the old end of its cable, if the kernel still has it
            self.run(HEAD, "ip", "link", "delete", f"v-{name}")
        _call("ip", "link", "add", f"v-{name}", "netns", head, "type", "veth", "peer", "name", "eth0", "netns", pid)
        self.run(name, "ip", "address", "add", f"{self.addresses[name]}/24", "dev", "eth0")
        self.run(name, "ip", "link", "set", "eth0", "up")
        self.join(name)

    def power_off(self, name: str) -> None:
        """Pull the plug: everything on the node ends at once, by SIGKILL."""
        holder = self._holders.pop(name, None)
        if holder is not None:
            holder.kill()
            holder.wait()

    def cut(self, name: str) -> None:
        """From now on packets to and from the node vanish, and nobody is told."""
        self.run(HEAD, "ip", "link", "set", f"v-{name}", "down")

    def join(self, name: str) -> None:
        """The opposite of `cut`."""
        self.run(HEAD, "ip", "link", "set", f"v-{name}", "up", "master", "br0")

    def limit(self, name: str, rate: str) -> None:
        """Limit the node's link, each way, to a rate as `tc` writes it (`200mbit`)."""
        bucket = ["root", "tbf", "rate", rate, "burst", "128kb", "latency", "100ms"]
        self.run(name, "tc", "qdisc", "replace", "dev", "eth0", *bucket)
        self.run(HEAD, "tc", "qdisc", "replace", "dev", f"v-{name}", *bucket)

    # ---- programs ---------------------------------------------------------------------------------------------------------

    def on(self, name: str, *command: object) -> list[str]:
        """The command line that runs `command` on a node, from this machine or from the head."""
        spaces = ["--mount", "--uts", "--net"] + (["--ipc", "--pid"] if name != HEAD else [])
        return ["nsenter", "--target", self._pid(name), *spaces, "--wdns=/", "--", *map(str, command)]

    def run(self, name: str, *command: object, timeout: float = 60, environment: Mapping[str, str] | None = None) -> str:
        """What a command prints that is run to its end on a node. Raises CalledProcessError."""
        return _call(*self.on(name, *command), timeout=timeout, environment=environment)

    def start(self, name: str, *command: object, log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Start a command on a node; it ends with the node, or with this process."""
        with open(log, "ab") as file:
            line = ["setpriv", "--pdeathsig", "KILL", *self.on(name, *command)]
            return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)

    def children(self, name: str, module: str) -> list[int]:
        """Ids on this machine of the processes of a node that a `python -m module` has started: the ranks of a launcher."""
        lines = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if os.readlink(folder / "ns/pid") == os.readlink(f"/proc/{self._pid(name)}/ns/pid"):
                    words = (folder / "cmdline").read_text().split("\0")
                    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                    lines[int(folder.name)] = int(parent), words
        started = {pid for pid, (_, words) in lines.items() if "-m" in words and words[words.index("-m") + 1] == module}
        return sorted(pid for pid, (parent, _) in lines.items() if parent in started)

    def _hold(self, name: str) -> None:
        """Start the process that the node's namespaces live by; its first process reaps what is left over there."""
        files = "".join(f"mount --bind {self.directory / file} /etc/{file}; " for file in ("hosts", "nsswitch.conf"))
        own = "" if name == HEAD else "mount -t tmpfs tmpfs /dev/shm; "
        script = (
            f"{files}{own}hostname {name}; ip link set lo up; touch {self._ready(name)}; while :; do sleep 1000 & wait; done"
        )
        spaces = ["--mount", "--uts", "--net"] + (["--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"] if own else [])
        self._ready(name).unlink(missing_ok=True)
        line = ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "bash", "-c", script]
        self._holders[name] = subprocess.Popen(line, stdin=subprocess.DEVNULL, start_new_session=True)
        wait_until(self._ready(name).exists, f"node {name} is up")

    def _ready(self, name: str) -> Path:
        return self.directory / f"{name}.ready"

    def _pid(self, name: str) -> str:
        """A process in the node's namespaces."""
        holder = self._holders[name].pid
        return str(holder) if name == HEAD else Path(f"/proc/{holder}/task/{holder}/children").read_text().split()[0]


def check_machine() -> None:
    """Raises CannotHaveIt."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        raise CannotHaveIt(f"{', '.join(absent)} not found: apt-get install iproute2 util-linux")
    try:
        _call("unshare", "-m", "-u", "-i", "-n", "-p", "-f", "ip", "link", "add", "name", "b0", "type", "bridge")
    except subprocess.CalledProcessError as error:
        raise CannotHaveIt(f"this machine lets no one make namespaces with a bridge: {error.stderr.strip()}") from error


def wait_until(holds: Callable[[], object], what: str, seconds: float = 60, pause: float = 0.05) -> None:
    """Return when `holds()` is true; raises AssertionError, saying `what` did not come, after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(pause)


def _call(*command: str, timeout: float = 60, environment: Mapping[str, str] | None = None) -> str:
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return out
