"""Seconds of collectives over the links of a cluster.

Ring algorithms: of X bytes on each rank, an all-gather or a reduce-scatter over n ranks sends (n - 1) / n X, an all-reduce
twice that (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009).
"""

from __future__ import annotations

from megatron_llama.plan.hardware import Cluster


def ring_bandwidth(cluster: Cluster, ranks_in_node: float, ranks: float) -> float:
    """Bytes per second of a ring over `ranks`, `ranks_in_node` of which share a node and its links to the network."""
    efficiency = cluster.hardware.efficiency
    link = cluster.hardware.link_bytes_per_second * efficiency.link
    if ranks_in_node >= ranks:
        return link
    return min(link, max(1.0, ranks_in_node) * cluster.network_bytes_per_second * efficiency.network)


def send_seconds(cluster: Cluster, size_bytes: float, inside_node: bool) -> float:
    """Of a message between two ranks."""
    return size_bytes / ring_bandwidth(cluster, 2 if inside_node else 1, 2) + cluster.hardware.efficiency.latency_seconds


def shard_seconds(cluster: Cluster, size_bytes: float, ranks_in_node: float, ranks: float) -> float:
    """Of an all-gather to `size_bytes`, or of a reduce-scatter from them, without latency."""
    if ranks <= 1:
        return 0.0
    return (ranks - 1) / ranks * size_bytes / ring_bandwidth(cluster, ranks_in_node, ranks)
