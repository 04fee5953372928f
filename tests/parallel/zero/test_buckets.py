"""The layout of buckets, for any list of parameters and any number of data ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.groups import Axis
from parallel.ledger import Ledger
from parallel.shards import Box, Replica, Segment, Shard
from parallel.zero.buckets import ALIGNMENT, Bucket, Sharding, make_buckets
from parallel.zero.engine import OptimizerSettings
from parallel.zero.native import NativeZero
from tests.parallel.building import coverage, grid, parameter, randn
from tests.parallel.zero.model import Net, train_step
from tests.ranks import run_ranks


def data_axis(rank, size):
    """An axis that only layouts ask: it has no process group."""
    return Axis("data", rank, size, tuple(range(size)), None, Ledger())


@st.composite
def shards(draw):
    """Shapes, decay classes, replicas and padding at random."""
    made = []
    for index in range(draw(st.integers(1, 12))):
        shape = tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=2)))
        rows = draw(st.integers(0, shape[0]))  # the others are padding
        box = Box((0,) * len(shape), (rows, *shape[1:]))
        replica = draw(st.sampled_from([None, None, None, "tp", "kv"]))
        replica = Replica(replica, 0, 2, True) if replica else None
        segments = (Segment(f"p{index}", box.shape, box, box, replica),) if rows else ()
        made.append(Shard(shape, segments, decay=draw(st.booleans()), uses=draw(st.integers(1, 2))))
    return made


def parameters_of(shards):
    full = {s.name: randn(*s.global_shape, seed=i) for i, shard in enumerate(shards) for s in shard.segments}
    return [parameter(shard, full) for shard in shards], full


def buckets_of(shards, bucket_size, size, rank=0):
    parameters, _ = parameters_of(shards)
    sharding = Sharding(data_axis(rank, size), Axis.single("copies"))
    return make_buckets(parameters, bucket_size, sharding, Bucket.start_reduction), parameters


layouts = (shards(), st.integers(1, 500), st.integers(1, 64))


@settings(deadline=None)
@given(*layouts)
def test_parameters_are_aligned_apart_and_views_of_their_bucket(shards, bucket_size, size):
    before = [p.detach().clone() for p in parameters_of(shards)[0]]
    buckets, parameters = buckets_of(shards, bucket_size, size)
    places = [(bucket, place) for bucket in buckets for place in zip(bucket.parameters, bucket.offsets, strict=True)]
    owners = {id(p): (bucket, offset) for bucket, (p, offset) in places}
    assert len(owners) == len(places) == len(parameters)
    for p, values in zip(parameters, before, strict=True):
        bucket, offset = owners[id(p)]
        assert offset % ALIGNMENT == 0
        assert torch.equal(p, values)
        assert p.data_ptr() == bucket.weights[offset:].data_ptr()
        assert p.sink.main_grad.data_ptr() == bucket.main_grad[offset:].data_ptr()
        assert p.sink.main_grad.shape == p.shape and p.sink.main_grad.dtype == torch.float32
    for bucket in buckets:
        assert bucket.size % (ALIGNMENT * size) == 0
        assert bucket.uses == sum(p.shard.uses for p in bucket.parameters)
        ends = [offset + p.numel() for p, offset in zip(bucket.parameters, bucket.offsets, strict=True)]
        assert all(end <= start for end, start in zip(ends, [*bucket.offsets[1:], bucket.size], strict=True))


@settings(deadline=None)
@given(*layouts)
def test_classes_never_mix_and_come_in_the_reverse_order_of_the_module(shards, bucket_size, size):
    buckets, parameters = buckets_of(shards, bucket_size, size)
    place = {id(p): index for index, p in enumerate(parameters)}
    classes = [bucket.bucket_class for bucket in buckets]
    for bucket, key in zip(buckets, classes, strict=True):
        assert all((p.shard.decay, p.shard.replica_axes) == (key.decay, key.replica_axes) for p in bucket.parameters)
    for key in set(classes):
        places = [place[id(p)] for bucket in buckets if bucket.bucket_class == key for p in bucket.parameters]
        assert places == sorted(places, reverse=True)
    replicated = [bool(key.replica_axes) for key in classes]
    assert replicated == sorted(replicated), "buckets with replicas come last: they wait for the end of the step"
    assert all(classes.count(key) == 1 for key in classes if key.replica_axes)


@settings(deadline=None)
@given(*layouts)
def test_a_bucket_is_closed_by_the_parameter_that_fills_it(shards, bucket_size, size):
    buckets, _ = buckets_of(shards, bucket_size, size)
    plain = [bucket for bucket in buckets if not bucket.bucket_class.replica_axes]
    last = {bucket.bucket_class: bucket for bucket in plain}
    for bucket in plain:
        sizes = [p.numel() for p in bucket.parameters]
        assert sum(sizes[:-1]) < bucket_size
        assert sum(sizes) >= bucket_size or bucket is last[bucket.bucket_class]


@settings(deadline=None, max_examples=50)
@given(shards(), st.integers(1, 500), st.integers(1, 8))
def test_the_pieces_of_all_ranks_are_every_element_once_and_where_they_say(shards, bucket_size, size):
    _, full = parameters_of(shards)
    found = []
    for rank in range(size):
        for bucket in buckets_of(shards, bucket_size, size, rank)[0]:
            assert bucket.stop - bucket.start == bucket.size // size and bucket.start == rank * (bucket.size // size)
            assert bucket.local_weights.numel() == bucket.master_grad.numel() == bucket.size // size
            for piece, place in bucket.pieces():
                values = bucket.local_weights[place].view(piece.box.shape)
                assert torch.equal(values, full[piece.segment.name][piece.box.slices()])
                found.append((piece.segment.name, piece.box, values))
    assert all((count == 1).all() for count in coverage(found, full).values())


def train_and_look_at_padding(rank, world_size):
    net, groups = Net(), grid(rank, dp=world_size)
    engine = NativeZero([net], groups, OptimizerSettings(bucket_size=100))
    for step in range(3):
        train_step(net, engine, step, rank, 0.1)
    engine.finish()
    dirty = []
    for bucket in engine.buckets:
        padding = torch.ones(bucket.size, dtype=torch.bool)
        for p, offset in zip(bucket.parameters, bucket.offsets, strict=True):
            padding[offset : offset + p.numel()] = False
        dirty += [name for name in ("weights", "main_grad") if getattr(bucket, name)[padding].any()]
    return dirty, len(engine.buckets)


@pytest.mark.parametrize("size", [1, 3])
def test_what_lies_between_parameters_stays_zero(size):
    for dirty, buckets in run_ranks(size, train_and_look_at_padding):
        assert dirty == [] and buckets > 2
