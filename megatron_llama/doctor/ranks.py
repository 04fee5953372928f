"""What the ranks of a job find out about one another: versions, names, clocks, and how fast they exchange data.

All functions are called by all ranks together, and rank 0 alone gets findings.
"""

from __future__ import annotations

import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llama.doctor.finding import Finding, failed, passed, warned
from parallel.collectives import all_reduce, barrier
from parallel.groups import Axis
from parallel.ledger import Ledger

CLOCK_SECONDS = 1.0  # by which clocks may differ: logs and file times of the nodes are compared by people and programs
SLOW = 0.5  # a link below this share of the median is named
REPEATS = 5
LOOPBACK = ("127.", "::1")  # addresses at which every node finds itself
MIB = 2**20


@dataclass(frozen=True)
class RankFacts:
    """What a rank says of itself. `clock` is its wall clock, in seconds, just after a barrier."""

    rank: int
    host: str
    address: str
    python: str
    torch: str
    device: str
    clock: float


def world_axis(rank: int, size: int) -> Axis:
    """All ranks, which have joined the default process group if there are several."""
    if size == 1:
        return Axis.single("world")
    return Axis("world", rank, size, tuple(range(size)), dist.group.WORLD, Ledger())


def rank_findings(world: Axis, device: torch.device, mib: int) -> Iterator[Finding]:
    """Facts, clocks, bandwidth. Yields on rank 0 alone, after all ranks have taken part."""
    everyone = _gather_facts(world, device)
    reduced = _reduce_rates(world, device, mib)
    links = _link_rates(world, device, mib)
    if world.rank:
        return
    yield from _compare(everyone)
    yield from _judge_sum(reduced, world, mib)
    yield from _judge_links(links, everyone)


def _gather_facts(world: Axis, device: torch.device) -> list[RankFacts]:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    barrier(world, device)
    barrier(world, device)  # the first one may make connections
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    mine = RankFacts(world.rank, host, address, sys.version.split()[0], torch.__version__, name, time.time())
    everyone: list[dict] = [{}] * world.size
    dist.all_gather_object(everyone, asdict(mine))
    return [RankFacts(**facts) for facts in everyone]


def _compare(everyone: list[RankFacts]) -> Iterator[Finding]:
    hosts = Counter(facts.host for facts in everyone)
    per_host = sorted(set(hosts.values()))
    shape = f"{per_host[0]} each" if len(per_host) == 1 else f"{per_host[0]} to {per_host[-1]} each"
    nodes = "one node" if len(hosts) == 1 else f"{len(hosts)} nodes, {shape}"
    yield passed("ranks", f"{len(everyone)} on {nodes}")
    if len(per_host) > 1:
        few = min(hosts, key=hosts.__getitem__)
        yield warned("ranks", f"{few} has {hosts[few]} of them only", "start as many ranks on every node")
    changes = sum(a.host != b.host for a, b in zip(everyone, everyone[1:], strict=False))
    if len(hosts) > 1 and changes >= len(hosts):
        fix = "srun --distribution=block, mpirun --map-by slot"
        yield warned("ranks", "not dealt out node by node: tp groups cross nodes", fix)
    yield from _addresses(everyone, len(hosts))
    for fact in ("python", "torch", "device"):
        counts = Counter(getattr(facts, fact) for facts in everyone)
        if len(counts) > 1:
            rare = min(counts, key=counts.__getitem__)
            odd = next(facts for facts in everyone if getattr(facts, fact) == rare)
            text = f"{fact} differs: {', '.join(sorted(counts))}; {rare} on {odd.host} (rank {odd.rank})"
            yield failed(fact, text, "the same environment or image on every node")
    clocks = [facts.clock for facts in everyone]
    late, early = everyone[clocks.index(min(clocks))], everyone[clocks.index(max(clocks))]
    apart = early.clock - late.clock
    if apart > CLOCK_SECONDS:
        yield warned("clocks", f"{late.host} is {apart:.1f} s behind {early.host}", "run chrony or ntpd on all nodes")
    else:
        yield passed("clocks", f"at most {apart * 1000:.0f} ms apart")


def _addresses(everyone: list[RankFacts], nodes: int) -> Iterator[Finding]:
    """A host whose own name means itself alone: gloo and NCCL would tell others to connect to their own node."""
    if nodes == 1:
        return
    wrong = [facts for facts in everyone if not facts.address or facts.address.startswith(LOOPBACK)]
    if wrong:
        one = wrong[0]
        text = f"{one.host} takes its own name for {one.address or 'nothing'}: others cannot connect to it"
        yield failed("host names", text, f"map {one.host} to its network address in /etc/hosts, or set GLOO_SOCKET_IFNAME")
    else:
        yield passed("host names", "every node's name has an address that others can reach")


# ---- bandwidth ----------------------------------------------------------------------------------------------------------


def _seconds(work: Callable[[], object], world: Axis, device: torch.device) -> float:
    """The best of some times of `work`, which the ranks begin together, on this rank."""
    best = float("inf")
    for _ in range(1 + REPEATS):  # the first one makes connections and is the slowest
        barrier(world, device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _reduce_rates(world: Axis, device: torch.device, mib: int) -> tuple[float, bool]:
    """Bus bandwidth of an all-reduce in bytes per second, 2 (n - 1) / n of the tensor over its time, and whether it is right.

    Source for "bus bandwidth": the performance notes of NVIDIA's nccl-tests.
    """
    tensor = torch.ones(mib * MIB // 4, device=device)
    right = all_reduce(torch.full((1024,), float(world.rank + 1), device=device), world)
    is_right = bool((right == world.size * (world.size + 1) / 2).all())
    seconds = _seconds(lambda: all_reduce(tensor, world), world, device)
    return 2 * (world.size - 1) / world.size * tensor.nbytes / seconds, is_right


def _judge_sum(found: tuple[float, bool], world: Axis, mib: int) -> Iterator[Finding]:
    rate, is_right = found
    if is_right:
        yield passed("all-reduce", f"{rate / 1e9:,.2f} GB/s bus bandwidth, {mib} MiB over {world.size} ranks")
    else:
        fix = "test the GPUs of each node alone; NCCL_DEBUG=INFO"
        yield failed("all-reduce", f"over {world.size} ranks gives a wrong sum", fix)


def _link_rates(world: Axis, device: torch.device, mib: int) -> list[float]:
    """Bytes per second from each rank to the next, one link at a time."""
    out, rates = torch.empty(mib * MIB // 4, device=device), []
    for source in range(world.size):
        target = (source + 1) % world.size
        here = world.rank in (source, target)
        seconds = _seconds(lambda s=source, t=target: _send(out, world, s, t) if here else None, world, device)  # noqa: B023
        times = all_reduce(_only(world, source, seconds, device), world)
        rates.append(out.nbytes / float(times[source]))
    return rates


def _send(tensor: Tensor, world: Axis, source: int, target: int) -> None:
    if world.rank == source:
        dist.send(tensor, target)
    elif world.rank == target:
        dist.recv(tensor, source)


def _only(world: Axis, rank: int, value: float, device: torch.device) -> Tensor:
    values = torch.zeros(world.size, dtype=torch.float64, device=device)
    if world.rank == rank:
        values[rank] = value
    return values


def _judge_links(rates: list[float], everyone: list[RankFacts]) -> Iterator[Finding]:
    """Links inside nodes and between nodes are compared among themselves."""
    kinds: dict[str, list[int]] = {}
    for source in range(len(rates)):
        same = everyone[source].host == everyone[(source + 1) % len(rates)].host
        kinds.setdefault("inside a node" if same else "between nodes", []).append(source)
    for kind, sources in kinds.items():
        median = statistics.median(rates[source] for source in sources)
        slowest = min(sources, key=rates.__getitem__)
        text = f"{kind} {median / 1e9:,.2f} GB/s, the slowest {rates[slowest] / 1e9:,.2f}"
        if rates[slowest] < SLOW * median:
            ends = everyone[slowest], everyone[(slowest + 1) % len(rates)]
            where = " to ".join(f"rank {end.rank} on {end.host}" for end in ends)
            yield warned("links", f"{text}: {where}", "look at that cable, port or GPU; NCCL_DEBUG=INFO says which way it goes")
        else:
            yield passed("links", text)
