"""The audit of replicas on the real model: DeepSpeed's engine, and pipelines whose updates are validated late."""

from __future__ import annotations

import pytest
import torch

from parallel.replica_audit import Audit, audit
from tests.parity.test_engines import SP, deepspeed
from tests.parity.test_parity import ONE_KV_HEAD, SHALLOW, SMALL_BATCH, layout
from tests.parity.training import Case, Session
from tests.ranks import run_ranks
from tests.with_deepspeed import deepspeed_imported  # noqa: F401

NORM = "layers.0.attention_norm"
LATE = Case("late", layout(pp=2, dp=2, schedule="zb-h1", post_validation=True), SHALLOW, SMALL_BATCH)
TENSORS = Case("tensors", layout(dp=2, **SP), ONE_KV_HEAD, SMALL_BATCH, zero=deepspeed(1))
SHARDED_WEIGHTS = Case("sharded weights", layout(dp=2, **SP), ONE_KV_HEAD, SMALL_BATCH, zero=deepspeed(3))


def audits(rank: int, world_size: int, case: Case, flips: list[tuple[int, str]]) -> list[Audit]:
    """Audits after a step, with a flipped bit each in what a rank calls so; the first one without."""
    session = Session(rank, world_size, case)
    session.step(0)
    engine, results = session.engine, []
    for at_rank, name in [(-1, ""), *flips]:
        found = [copy for copy in engine.replicated() if copy.name == name]
        if rank == at_rank:
            found[0].tensor.view(-1).view(torch.int32)[0] ^= 1
        results.append(audit(engine.replicated(), engine.rounded(), session.runtime.groups.world, session.runtime.device))
        if rank == at_rank:
            found[0].tensor.view(-1).view(torch.int32)[0] ^= 1
    return results


def planted(case: Case, flips: list[tuple[int, str]]) -> list[tuple[list[str], tuple[int, ...]]]:
    """What is found: the axes, and the ranks that are named."""
    first, *others = run_ranks(case.world_size, audits, case, flips)[0]
    assert first == Audit()
    return [([finding.axis for finding in other.findings], other.culprits) for other in others]


def test_an_update_is_validated_before_it_is_audited() -> None:
    assert planted(LATE, [(3, "layers.1.attention.wk")]) == [(["data"], (2, 3))]


@pytest.mark.usefixtures("deepspeed_imported")
def test_what_deepspeed_holds_several_times() -> None:
    weight, kv, moment = planted(TENSORS, [(1, NORM), (2, "layers.0.attention.wv"), (0, f"exp_avg_sq/{NORM}")])
    assert sorted(weight[0]) == ["", "data", "tp"] and weight[1] == (1,)
    assert {"data", "kv"} <= set(kv[0]) and kv[1] == (2,)
    assert moment == (["tp"], (0, 1))


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_imported")
def test_deepspeed_shards_the_weights_over_data_ranks_and_not_over_tensor_ranks() -> None:
    weight, master = planted(SHARDED_WEIGHTS, [(1, f"weights/{NORM}"), (2, f"master/{NORM}")])
    assert "tp" in weight[0] and weight[1] == (1,)
    assert "tp" in master[0] and master[1] == (2,)
