"""The audit of replicas: a bit that flips in any kind of copy is found, and the rank is named as far as that can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from parallel import replica_audit
from parallel.groups import ProcessGroups
from parallel.replica_audit import Audit, Finding, Replicated, audit, checksum
from parallel.shards import Box, Replica, Segment, Shard
from parallel.zero.engine import OptimizerSettings
from parallel.zero.native import NativeZero
from tests.parallel.building import CPU, grid, parameter, randn
from tests.ranks import run_ranks

HIDDEN, ROWS = 6, 8
FULL = {"wq": (ROWS, HIDDEN), "wk": (ROWS // 2, HIDDEN), "norm": (HIDDEN,), "table": (10, HIDDEN)}


def shards(groups: ProcessGroups) -> list[Shard]:
    """A fused weight of split query rows and a kv head that both tensor ranks have, a norm, and a table at both ends."""
    tp, embedding = groups.tp, groups.replicas.get("embedding")
    rows, kv = ROWS // tp.size, FULL["wk"]
    fused = (
        Segment("wq", FULL["wq"], Box((tp.rank * rows, 0), (rows, HIDDEN)), Box((0, 0), (rows, HIDDEN))),
        Segment("wk", kv, Box.whole(kv), Box((rows, 0), kv), Replica("kv", tp.rank, tp.size, True) if tp.size > 1 else None),
    )
    norm, both_ends = None, None
    if tp.size > 1:
        norm = Replica("tp", tp.rank, tp.size, partial_gradient=False)
    if embedding is not None:
        both_ends = Replica("embedding", embedding.rank, embedding.size, partial_gradient=True)
    box, table = Box.whole(FULL["norm"]), Box.whole(FULL["table"])
    return [
        Shard((rows + kv[0], HIDDEN), fused),
        Shard(FULL["norm"], (Segment("norm", FULL["norm"], box, box, norm),), decay=False),
        Shard(FULL["table"], (Segment("table", FULL["table"], table, table, both_ends),)),
    ]


@dataclass(frozen=True)
class Layout:
    """Sizes of the grid, and what is trained in."""

    sizes: dict[str, int]
    replica_groups: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    shard_group_size: int = 0
    dtype: torch.dtype = torch.float32
    settings: OptimizerSettings = OptimizerSettings(bucket_size=40)


@dataclass(frozen=True)
class Flip:
    """A bit of the element `place` of what `rank` calls `name`: a weight, or a KIND/weight of its shard."""

    rank: int
    name: str
    place: int = 0
    bit: int = 0


def trained(rank: int, layout: Layout) -> NativeZero:
    """An engine after one update, by gradients that are the same on all ranks."""
    groups = grid(rank, layout.replica_groups, layout.shard_group_size, **layout.sizes)
    full = {name: randn(*shape, seed=i).to(layout.dtype) for i, (name, shape) in enumerate(FULL.items())}
    engine = NativeZero([nn.ParameterList(parameter(shard, full) for shard in shards(groups))], groups, layout.settings)
    engine.begin_step()
    for item in engine.chunks[0].parameters():
        item.sink.main_grad.copy_(randn(*item.shape, seed=item.numel()))
    engine.step(0.1, torch.zeros(1, dtype=torch.float64))
    engine.finish()
    return engine


def state(engine: NativeZero) -> dict[str, Tensor]:
    """What this rank holds, by name: weights, and the pieces of its shards, as views."""
    found = {}
    for item in engine.chunks[0].parameters():
        found |= {segment.name: item.detach()[segment.local.slices()].reshape(-1) for segment in item.shard.segments}
    for kind, bucket, flat in engine.update.kept():
        found |= {f"{kind}/{piece.segment.name}": flat[place] for piece, place in bucket.pieces()}
    return found


def audit_of(engine: NativeZero) -> Audit:
    return audit(engine.replicated(), engine.rounded(), engine.groups.world, CPU)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def audits(rank: int, world_size: int, layout: Layout, flips: Iterable[Flip]) -> list[Audit]:
    """An audit of what is in order, one with each flip, and one after the last has been mended."""
    engine = trained(rank, layout)
    results = [audit_of(engine)]
    for flip in flips:
        values = bits(state(engine)[flip.name]) if flip.rank == rank else None
        if values is not None:
            values[flip.place] ^= 1 << flip.bit
        results.append(audit_of(engine))
        if values is not None:
            values[flip.place] ^= 1 << flip.bit
    return [*results, audit_of(engine)]


def found(layout: Layout, flips: list[Flip]) -> list[Audit]:
    """What all ranks find alike with each flip, after they have found nothing without."""
    world = 1
    for size in layout.sizes.values():
        world *= size
    outcomes = run_ranks(world, audits, layout, flips)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    first, *planted, last = outcomes[0]
    assert first == last == Audit()
    return planted


def findings(result: Audit) -> set[tuple[str, str]]:
    return {(finding.name, finding.axis) for finding in result.findings}


KV_HEADS = Layout({"dp": 2, "tp": 2}, {"kv": [(0, 1), (2, 3)]})
TIED = Layout({"pp": 2, "dp": 2}, {"embedding": [(0, 2), (1, 3)]})


def test_a_rank_that_differs_along_two_axes_gives_itself_away() -> None:
    split, norm, kv, moment = found(
        KV_HEADS, [Flip(3, "wq", 7, 31), Flip(2, "norm", 3), Flip(1, "wk", 23, 12), Flip(0, "exp_avg/norm", 0, 30)]
    )
    assert findings(split) == {("wq", "data")} and split.culprits == (1, 3)
    assert findings(norm) == {("norm", "data"), ("norm", "tp")} and norm.culprits == (2,)
    assert findings(kv) == {("wk", "data"), ("wk", "kv")} and kv.culprits == (1,)
    assert findings(moment) == {("exp_avg/norm", "tp")} and moment.culprits == (0, 1)
    assert (split.count, norm.count) == (1, 2)


def test_where_an_element_differs_is_told_in_the_global_tensor() -> None:
    (split,) = found(KV_HEADS, [Flip(3, "wq", 7, 31)])
    assert split.findings == (Finding("wq", Box((4, 0), (4, HIDDEN)), "data", (1, 3), (1, 3), 1, (5, 1)),)
    assert str(split.findings[0]) == "wq over data (ranks 1, 3): 1 of 24 elements differ, the first at [5, 1]"


def test_both_ends_of_a_tied_embedding_are_compared() -> None:
    table, moment = found(TIED, [Flip(0, "table", 59), Flip(2, "exp_avg_sq/table", 1)])
    assert findings(table) == {("table", "data"), ("table", "embedding")} and table.culprits == (0,)
    assert findings(moment) == {("exp_avg_sq/table", "embedding")} and moment.culprits == (0, 2)


def test_of_three_or_more_copies_the_majority_is_right() -> None:
    unsharded = Layout({"dp": 4}, dtype=torch.bfloat16, settings=OptimizerSettings(bucket_size=40, zero_stage=0))
    weight, moment, master, fine = found(
        unsharded, [Flip(1, "wk", 2, 9), Flip(3, "exp_avg_sq/wq"), Flip(2, "master/norm", 1, 25), Flip(0, "master/norm", 1, 0)]
    )
    assert weight.culprits == (1,) and moment.culprits == (3,) and fine.culprits == (0,)
    assert findings(master) == {("master/norm", "data"), ("norm", "")} and master.culprits == (2,)
    assert findings(moment) == {("exp_avg_sq/wq", "data")} and findings(fine) == {("master/norm", "data")}


def test_groups_of_ranks_with_a_copy_of_the_optimizer_each() -> None:
    groups = Layout({"dp": 4}, shard_group_size=2, dtype=torch.bfloat16)
    weight, moment = found(groups, [Flip(0, "wq", 11), Flip(2, "exp_avg/wk")])
    assert weight.culprits == (0,) and (("wq", "data") in findings(weight))
    assert findings(moment) == {("exp_avg/wk", "copies")} and moment.culprits == (0, 2)


@pytest.mark.parametrize("kept", ["remainder", "rounded moments"])
def test_what_is_kept_in_16_bits_is_compared_too(kept: str) -> None:
    settings = OptimizerSettings(bucket_size=40, zero_stage=0, moment_dtype=torch.bfloat16, master_weights="remainder")
    name = "master/wq" if kept == "remainder" else "exp_avg/wq"
    (result,) = found(Layout({"dp": 3}, dtype=torch.bfloat16, settings=settings), [Flip(1, name, 5, 4)])
    assert findings(result) == {(name, "data")} and result.culprits == (1,)


def test_a_process_alone_sees_weights_that_are_not_its_masters() -> None:
    (result,) = found(Layout({"dp": 1}, dtype=torch.bfloat16), [Flip(0, "wk", 3, 14)])
    assert findings(result) == {("wk", "")} and result.culprits == (0,)
    assert "wk on rank 0, which is not its master weights rounded: 1 of 24 elements differ" in str(result.findings[0])


def traffic(rank: int, world_size: int) -> tuple[dict, dict, int]:
    engine = trained(rank, KV_HEADS)
    ledger = engine.groups.ledger
    ledger.clear()
    audit_of(engine)
    weights = sum(len(item.shard.segments) for item in engine.chunks[0].parameters())
    return dict(ledger.calls), dict(ledger.sent_bytes), weights


def test_where_all_is_well_an_axis_costs_one_message_of_32_bytes_a_tensor() -> None:
    calls, sent, weights = run_ranks(4, traffic)[0]
    assert calls == {("all_reduce", axis): 1 for axis in ("data", "tp", "kv", "world")}
    assert sent["all_reduce", "data"] == weights * 32  # 2 (n - 1) / n of it, with n = 2
    assert sent["all_reduce", "world"] == 12


def audited_elements(rank: int, world_size: int) -> dict[str, int]:
    engine = trained(rank, Layout({"dp": world_size}, settings=OptimizerSettings(bucket_size=40, zero_stage=0)))
    counts: dict[str, int] = {}
    for copy in engine.replicated():
        counts[copy.name] = counts.get(copy.name, 0) + copy.tensor.numel()
    return counts


def test_every_weight_and_moment_is_audited_once() -> None:
    expected = {}
    for name, shape in FULL.items():
        expected |= {prefix + name: torch.Size(shape).numel() for prefix in ("", "exp_avg/", "exp_avg_sq/")}
    assert run_ranks(2, audited_elements)[0] == expected


def broken(values: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    changed = values.clone()
    change(changed)
    return checksum(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 17, 22])
def test_the_checksum_sees_every_flip_every_pair_of_flips_and_every_exchange(
    dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_audit, "SLICE", {"cpu": 7})
    values = randn(count).to(dtype)
    right, width = checksum(values), 8 * values.element_size()
    signed = -(1 << (width - 1))

    def mask(bit: int) -> int:
        return signed if bit == width - 1 else 1 << bit

    def flip(place: int, bit: int) -> Callable[[Tensor], None]:
        return lambda tensor: bits(tensor)[place].bitwise_xor_(mask(bit))

    for place in range(count):
        for bit in range(width):
            assert not torch.equal(broken(values, flip(place, bit)), right)
    for place in range(1, count):
        for bit in (0, width // 2, width - 1):
            assert not torch.equal(broken(values, lambda t, p=place, b=bit: (flip(0, b)(t), flip(p, b)(t))), right)
        if values[0] != values[place]:
            assert not torch.equal(broken(values, lambda t, p=place: swap(t, p)), right)


def swap(tensor: Tensor, place: int) -> None:
    tensor[0], tensor[place] = tensor[place].clone(), tensor[0].clone()


def test_a_checksum_does_not_depend_on_where_a_tensor_lies() -> None:
    memory = randn(41).bfloat16()
    assert torch.equal(checksum(memory[1:]), checksum(memory[1:].clone()))


def test_numbers_that_are_not_finite_equal_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([float("nan"), float("inf"), -0.0])
    assert torch.equal(checksum(values), checksum(values.clone()))
    assert not torch.equal(checksum(values), checksum(values.abs()))


def long_lists(rank: int, world_size: int) -> Audit:
    groups = grid(rank, dp=world_size)
    values = [torch.full((3,), float(rank == 2)) for _ in range(30)]
    copies = [Replicated(f"w{i}", Box.whole((3,)), tensor, (groups.data,)) for i, tensor in enumerate(values)]
    return audit(copies, [], groups.world, CPU)


def test_where_much_differs_only_the_first_tensors_are_looked_at() -> None:
    result = run_ranks(3, long_lists)[0]
    assert result.count == 30 and result.culprits == (2,)
    assert [finding.name for finding in result.findings] == [f"w{i}" for i in range(replica_audit.LOOKED_AT)]
