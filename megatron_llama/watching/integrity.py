"""The audit of a run's replicated state, and what it means where copies differ."""

from __future__ import annotations

import socket

from megatron_llama.metrics import MetricsWriter
from megatron_llama.runtime import Runtime
from parallel.collectives import gather_objects
from parallel.errors import CorruptedStateError
from parallel.replica_audit import Audit, audit
from parallel.zero.engine import Engine

LISTED = 3  # findings that a message names


def check_replicas(runtime: Runtime, engine: Engine, step: int, metrics: MetricsWriter | None) -> None:
    """Raise CorruptedStateError, on all ranks, where copies of the state differ after `step`. All call it together.

    Nothing since the audit before can be trusted then. Checkpoints are older, as an audit comes before each.
    """
    engine.finish()
    world = runtime.groups.world
    found = audit(engine.replicated(), engine.rounded(), world, runtime.device)
    if not found.count:
        return
    hosts = gather_objects(socket.gethostname(), world)
    if metrics is not None:
        metrics.write_event(step, "corruption", ranks=found.culprits, findings=list(map(str, found.findings)))
    raise CorruptedStateError(_message(found, hosts, step), found.culprits)


def _message(found: Audit, hosts: list[str], step: int) -> str:
    named = ", ".join(f"{rank} ({hosts[rank]})" for rank in found.culprits)
    if len(found.culprits) == 1:
        which = f"the state of rank {named} is corrupt"
    else:
        which = f"the state of one of the ranks {named} is corrupt, and nothing tells which"
    listed = "; ".join(map(str, found.findings[:LISTED]))
    more = f"; and {found.count - LISTED} more" if found.count > LISTED else ""
    return (
        f"after step {step} {which}: {listed}{more}. Start the same command again to go on from the newest checkpoint, which "
        "was audited; where a rank is named twice, its hardware is at fault: leave its node out"
    )
