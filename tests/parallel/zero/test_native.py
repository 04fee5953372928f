"""The native engine against torch.optim on whole parameters, and what it promises about when messages leave."""

from functools import lru_cache

import pytest
import torch

from parallel.groups import build_groups
from parallel.topology import Topology
from parallel.zero.buckets import Bucket
from parallel.zero.engine import OptimizerSettings
from parallel.zero.native import NativeZero
from tests.parallel.building import box_parts, coverage, grid, sum_of_parts
from tests.parallel.zero.model import SHARDS, Net, backward_passes, micro_batches, train_step
from tests.ranks import run_ranks

STEPS, LEARNING_RATE, CLIP = 4, 0.05, 1.5
ADAMW = OptimizerSettings(eps=1e-5, clip_norm=CLIP, bucket_size=60)
SGD = OptimizerSettings(algorithm="sgd", clip_norm=CLIP, bucket_size=60)
# fp32: gradients are summed in another order; a few units in the last place over four steps
TOLERANCE = dict(rtol=1e-5, atol=1e-6)


def settings_of(base, **changes):
    return OptimizerSettings(**{**base.__dict__, **changes})


def torch_optimizer(net, settings):
    named = net.named()
    decayed = [p for name, p in named.items() if SHARDS[name].decay]
    others = [p for name, p in named.items() if not SHARDS[name].decay]
    if settings.algorithm == "sgd":
        return torch.optim.SGD(decayed + others, lr=LEARNING_RATE)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(settings.beta1, settings.beta2), eps=settings.eps)


@lru_cache
def reference(settings, data_size, steps=tuple(range(STEPS))):
    """Weights after the steps, the norms before clipping, and Adam's moments, by torch.optim on one process."""
    net = Net()
    optimizer, norms = torch_optimizer(net, settings), []
    for step in steps:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)  # an unused parameter's gradient is zero, not missing: it decays
        for data_rank in range(data_size):
            for tokens, targets in micro_batches(step, data_rank):
                net(tokens, targets).backward()
        limit = settings.clip_norm or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), limit).item())
        optimizer.step()
    named = net.named()
    moments = {}
    for kind in ("exp_avg", "exp_avg_sq") if settings.algorithm == "adamw" else ():
        moments |= {f"{kind}/{name}": optimizer.state[p][kind] for name, p in named.items()}
    return {name: p.detach() for name, p in named.items()}, norms, moments


def train(rank, world_size, settings, shard_group_size=0):
    net = Net()
    groups = grid(rank, shard_group_size=shard_group_size, dp=world_size)
    engine = NativeZero([net], groups, settings)
    norms = [train_step(net, engine, step, rank, LEARNING_RATE).norm.item() for step in range(STEPS)]
    engine.finish()
    state = sum(flat.numel() for kind in engine.update.moment_names for flat in engine.update.read(kind))
    return {
        "norms": norms,
        "parameters": {name: p.detach().clone() for name, p in net.named().items()},
        "weights": box_parts(engine.weight_boxes(write=False)),
        "written weights": box_parts(engine.weight_boxes(write=True)),
        "written moments": box_parts(engine.optimizer_boxes(write=True)),
        "state": state,
        "bucket sizes": sum(bucket.size for bucket in engine.buckets),
        "steps": engine.optimizer_steps,
    }


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("base", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_training_is_torchs_on_the_whole_parameters(base, stage, size):
    """Weights, norms and moments; in stage 1 each rank has its part of them; what is written is everything, once."""
    settings = settings_of(base, zero_stage=stage)
    weights, norms, moments = reference(base, size)
    assert min(norms) > CLIP, "clipping must be at work"
    ranks = run_ranks(size, train, settings)
    for rank in ranks:
        assert rank["norms"] == pytest.approx(norms, rel=1e-5) and rank["norms"] == ranks[0]["norms"]
        torch.testing.assert_close(rank["parameters"], weights, **TOLERANCE)
        assert all(torch.equal(p, ranks[0]["parameters"][name]) for name, p in rank["parameters"].items())
        adam = base.algorithm == "adamw"
        assert rank["steps"] == STEPS
        assert rank["state"] == (2 * rank["bucket sizes"] // (size if stage else 1) if adam else 0)
    for what, right in (("written weights", weights), ("written moments", moments)):
        written = [part for rank in ranks for part in rank[what]]
        assert all((count == 1).all() for count in coverage(written, right).values()), what
        torch.testing.assert_close(sum_of_parts(written, right), right, **TOLERANCE)
    held = coverage([part for rank in ranks for part in rank["weights"]], weights)
    assert all((count == (1 if stage else size)).all() for count in held.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_an_optimizer_that_is_sharded_over_some_of_the_ranks_is_the_same_and_written_once(stage):
    weights, norms, moments = reference(ADAMW, 4)
    ranks = run_ranks(4, train, settings_of(ADAMW, zero_stage=stage), 2)
    for rank in ranks:
        assert rank["norms"] == pytest.approx(norms, rel=1e-5) and rank["norms"] == ranks[0]["norms"]
        assert all(torch.equal(p, ranks[0]["parameters"][name]) for name, p in rank["parameters"].items())
        torch.testing.assert_close(rank["parameters"], weights, **TOLERANCE)
        assert rank["state"] == 2 * rank["bucket sizes"] // 2
    written = [part for rank in ranks for part in rank["written moments"]]
    assert all((count == 1).all() for count in coverage(written, moments).values())
    torch.testing.assert_close(sum_of_parts(written, moments), moments, **TOLERANCE)


def test_without_clipping_nothing_is_scaled():
    settings = settings_of(SGD, clip_norm=0.0)
    weights, norms, _ = reference(settings, 2)
    for rank in run_ranks(2, train, settings):
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)
        torch.testing.assert_close(rank["parameters"], weights, **TOLERANCE)


def test_a_norm_below_the_limit_is_not_scaled_up():
    settings = settings_of(SGD, clip_norm=1e6)
    weights, _, _ = reference(settings_of(SGD, clip_norm=0.0), 1)
    torch.testing.assert_close(run_ranks(1, train, settings)[0]["parameters"], weights, **TOLERANCE)


def train_in_bf16(rank, world_size):
    net, groups = Net(torch.bfloat16), grid(rank, dp=world_size)
    engine = NativeZero([net], groups, ADAMW)
    start = {name: p.detach().float() for name, p in net.named().items()}
    for step in range(STEPS):
        train_step(net, engine, step, rank, 1e-4)  # updates below a bf16 step: only the master can hold them
    engine.finish()
    rounded = all(torch.equal(s.bucket.local_weights, s.read("master").bfloat16()) for s in engine.update.shards)
    return rounded, start, box_parts(engine.weight_boxes(write=True)), {n: p.detach() for n, p in net.named().items()}


def test_bf16_weights_are_the_fp32_master_rounded_and_small_updates_are_not_lost():
    ranks = run_ranks(2, train_in_bf16)
    start = ranks[0][1]
    master = sum_of_parts([part for rank in ranks for part in rank[2]], start)
    for rounded, _, _, parameters in ranks:
        assert rounded
        assert all(torch.equal(p, master[name].bfloat16()) for name, p in parameters.items())
    moved = (master["up"] - start["up"]).abs()
    assert moved.max() < 5e-4 and (moved > 0).all()


def train_with_one_bad_step(rank, world_size, settings, bad):
    """Step 1 is not finite on the last rank alone, in a gradient or in one of the caller's sums."""
    net, groups = Net(), grid(rank, dp=world_size)
    engine = NativeZero([net], groups, settings)
    skipped, steps = [], []
    for step in range(3):
        backward_passes(net, engine, micro_batches(step, rank))
        sums = torch.ones(2, dtype=torch.float64)
        if step == 1 and rank == world_size - 1:
            if bad == "sum":
                sums[1] = float("nan")
            else:
                engine.reduce_gradients()
                engine.buckets[0].master_grad[0] = float(bad)
        info = engine.step(LEARNING_RATE, sums)
        skipped.append(info.skipped.item())
        steps.append(engine.optimizer_steps)
    engine.finish()
    return skipped, steps, info.sums.tolist(), {name: p.detach().clone() for name, p in net.named().items()}


@pytest.mark.parametrize(("stage", "bad"), [(0, "nan"), (1, "inf"), (1, "nan"), (1, "sum"), (2, "nan")])
def test_a_step_that_is_not_finite_anywhere_is_skipped_everywhere(stage, bad):
    """Adam's count stands still: the next step is as if the bad one had never been."""
    weights, _, _ = reference(ADAMW, 2, steps=(0, 2))
    for skipped, steps, sums, parameters in run_ranks(2, train_with_one_bad_step, settings_of(ADAMW, zero_stage=stage), bad):
        assert skipped == [0.0, 1.0, 0.0]
        assert steps == [1, 1, 2]
        assert sums == [2.0, 2.0]  # added up over the world
        torch.testing.assert_close(parameters, weights, **TOLERANCE)


def note_when_reductions_start(rank, world_size, settings):
    """Events of one step: F and B of each micro-batch, and the names in each bucket whose reduction starts."""
    net, groups = Net(), grid(rank, dp=world_size)
    engine = NativeZero([net], groups, settings)
    events = []
    for bucket in engine.buckets:

        def start(bucket=bucket):
            events.append("+".join(p.shard.segments[0].name for p in bucket.parameters))
            Bucket.start_reduction(bucket)

        bucket.start_reduction = start
    engine.begin_step()
    engine.expect_passes(3)
    for index, (tokens, targets) in enumerate(micro_batches(0, rank)):
        net(tokens, targets).backward()
        events.append(f"B{index}")
    events.append("end of backward")
    engine.step(LEARNING_RATE, torch.zeros(1, dtype=torch.float64))
    return events


def skip_parts_of_the_net(rank, world_size, settings, skipping):
    """The gradients of a step in one of whose backward passes two linears and the norm are not used."""
    net, groups = Net(), grid(rank, dp=world_size)
    engine = NativeZero([net], groups, settings)
    engine.begin_step()
    engine.expect_passes(3)
    departures = []
    for index, (tokens, targets) in enumerate(micro_batches(0, rank)):
        net(tokens, targets, feed_forward=index != skipping).backward()
        departures.append(sum(bucket.has_left for bucket in engine.buckets))
    engine.reduce_gradients()
    return box_parts(engine.gradient_boxes()), departures


@pytest.mark.parametrize("skipping", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_that_a_backward_pass_does_not_use(stage, skipping):
    """The bucket of the table and the linears does not fill then; in stage 2 it leaves in the middle of a later pass."""
    net = Net()
    for data_rank in range(2):
        for index, (tokens, targets) in enumerate(micro_batches(0, data_rank)):
            net(tokens, targets, feed_forward=index != skipping).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named().items()}
    ranks = run_ranks(2, skip_parts_of_the_net, settings_of(ADAMW, zero_stage=stage, bucket_size=200), skipping)
    reduced = [part for parts, _ in ranks for part in parts] if stage else ranks[0][0]
    torch.testing.assert_close(sum_of_parts(reduced, gradients), gradients, **TOLERANCE)
    assert all(departures == [0, 0, 0] for _, departures in ranks)


LEAVE = ["down", "up", "norm", "table"]  # the reverse of their use; the table last, for it waits for its second use


@pytest.mark.parametrize("stage", [0, 1])
def test_buckets_leave_during_the_last_backward_pass_as_they_fill(stage):
    """The bucket of the unused parameter never fills, so it leaves in `step`; each leaves once."""
    for events in run_ranks(2, note_when_reductions_start, settings_of(ADAMW, zero_stage=stage)):
        assert events == ["B0", "B1", *LEAVE, "B2", "end of backward", "unused"]


def test_in_stage_2_buckets_leave_in_each_backward_pass():
    for events in run_ranks(2, note_when_reductions_start, settings_of(ADAMW, zero_stage=2)):
        assert events == [*LEAVE, "B0", *LEAVE, "B1", *LEAVE, "B2", "end of backward", "unused"]


def test_without_overlap_buckets_leave_when_all_backward_passes_are_over():
    for events in run_ranks(2, note_when_reductions_start, settings_of(ADAMW, overlap=False)):
        assert events == ["B0", "B1", "B2", "end of backward", "down", "up", "table", "unused", "norm"]


def test_a_gradient_that_comes_after_its_bucket_has_left_is_noticed():
    """It would be lost: a pass too many, or a parameter used more often than its shard says."""
    net = Net()
    engine = NativeZero([net], build_groups(Topology(), 0), ADAMW)
    engine.begin_step()
    engine.expect_passes(1)
    (tokens, targets), *_ = micro_batches(0, 0)
    net(tokens, targets).backward()
    with pytest.raises(AssertionError, match="a gradient came after its bucket had left"):
        net(tokens, targets).backward()


class Half(torch.nn.Module):
    """A chunk that holds some of a net's modules."""

    def __init__(self, *modules):
        super().__init__()
        self.held = torch.nn.ModuleList(modules)


def share_a_table(rank, world_size):
    """Two chunks of one rank, the table in both: as a tied head and its embedding under a V placement."""
    net, groups = Net(), grid(rank, dp=world_size)
    chunks = [Half(net.embedding, net.norm), Half(net.up, net.down, net.head)]
    engine = NativeZero(chunks, groups, ADAMW)
    names = [[p.shard.segments[0].name for b in buckets for p in b.parameters] for buckets in engine.chunk_buckets]
    started = []
    for bucket in engine.buckets:

        def start(bucket=bucket):
            started.append(bucket.parameters[0].shard.segments[0].name)
            Bucket.start_gather(bucket)

        bucket.start_gather = start
    train_step(net, engine, 0, rank, LEARNING_RATE)
    engine.finish()
    return names, started, {name: p.detach().clone() for name, p in net.named().items() if name != "unused"}


def test_a_table_that_two_chunks_share_is_owned_once_and_gathers_start_with_the_first_chunk():
    weights, _, _ = reference(ADAMW, 2, steps=(0,))
    for names, started, parameters in run_ranks(2, share_a_table):
        assert names == [["table", "norm"], ["down", "up"]]
        assert started == ["norm", "table", "up", "down"]
        torch.testing.assert_close(parameters, {name: weights[name] for name in parameters}, **TOLERANCE)


def look_at_gathers(rank, world_size, overlap):
    """The buckets whose weights are on their way: after the step, where each module begins, and after `finish`."""
    net, groups = Net(), grid(rank, dp=world_size)
    engine = NativeZero([net], groups, settings_of(ADAMW, overlap=overlap))
    owner = {p.shard.segments[0].name: bucket for bucket in engine.buckets for p in bucket.parameters}

    def on_their_way():
        return [name for name, bucket in owner.items() if bucket.gather is not None]

    train_step(net, engine, 0, rank, LEARNING_RATE)
    seen = [("step", on_their_way())]
    modules = {"table": net.embedding, "norm": net.norm, "up": net.up, "down": net.down}
    for name, module in modules.items():
        original = module.forward

        def look(x, name=name, original=original):
            seen.append((name, on_their_way()))
            return original(x)

        module.forward = look
    net(*micro_batches(1, rank)[0])
    engine.finish()
    return [*seen, ("finish", on_their_way())]


def test_weights_come_two_buckets_ahead_of_the_one_in_use():
    """They start in the order of the net's parameters, those without weight decay first: norm, unused, table, up, down.

    The net itself waits for its parameter that nothing uses.
    """
    for seen in run_ranks(2, look_at_gathers, True):
        assert seen == [
            ("step", ["unused", "norm"]),
            ("table", ["down", "up", "norm"]),
            ("norm", ["down", "up"]),
            ("up", ["down"]),
            ("down", []),
            ("finish", []),
        ]


def test_without_overlap_weights_are_there_after_the_step():
    for seen in run_ranks(2, look_at_gathers, False):
        assert all(names == [] for _, names in seen)


def load_and_publish(rank, world_size, stage):
    """Fill the shards as a checkpoint does."""
    net, groups = Net(torch.bfloat16), grid(rank, dp=world_size)
    engine = NativeZero([net], groups, settings_of(ADAMW, zero_stage=stage))

    def fill(boxes):
        for box in boxes:
            full = torch.arange(float(torch.Size(box.global_shape).numel())).view(box.global_shape)
            box.tensor.copy_(full[box.box.slices()])

    engine.load(fill)
    engine.optimizer_steps = 12
    expected = {n: torch.arange(float(p.numel())).view(p.shape).bfloat16() for n, p in net.named().items()}
    return all(torch.equal(p, expected[n]) for n, p in net.named().items()), engine.optimizer_steps


@pytest.mark.parametrize("stage", [0, 1])
def test_loaded_shards_become_the_models_weights_on_every_rank(stage):
    assert run_ranks(2, load_and_publish, stage) == [(True, 12)] * 2


def test_a_parameter_that_does_not_know_its_place_is_refused():
    with pytest.raises(AssertionError, match="every parameter must know its place"):
        NativeZero([torch.nn.Linear(2, 2)], build_groups(Topology(), 0), ADAMW)
