"""The executor on real ranks, with stages of one small linear each, against the same linears on one process."""

import weakref

import pytest
import torch
from torch import nn

from parallel.groups import Axis, build_groups
from parallel.kernels.table import resolve_kernels
from parallel.pipeline.check import check_schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.layout import Placement
from parallel.pipeline.p2p import both_ways
from parallel.pipeline.schedules import SCHEDULES, Action, forward_only, gpipe, one_forward_one_backward
from parallel.tensor.deferred import WeightGradient, WeightGradientQueue
from parallel.tensor.linear import ColumnParallelLinear
from parallel.topology import Topology
from parallel.zero.buckets import Bucket
from parallel.zero.engine import OptimizerSettings
from parallel.zero.native import NativeZero
from tests.parallel.building import CPU, grid, parameter, randn, whole
from tests.parallel.pipeline.lists import all_forward_all_backward, split_backward
from tests.ranks import run_ranks

WIDTH = 4


class Stage(nn.Module):
    """tanh(x W^T): the first one makes x from the micro-batch, the last one a loss of y."""

    def __init__(self, stage, placement):
        super().__init__()
        self.weight_gradients = WeightGradientQueue()
        weight = parameter(whole("w", (WIDTH, WIDTH)), {"w": randn(WIDTH, WIDTH, seed=stage)})
        self.linear = ColumnParallelLinear(weight, Axis.single("tp"), False, resolve_kernels(), self.weight_gradients)
        self.first, self.last = stage == 0, stage == placement.num_stages - 1

    def forward(self, x, micro_batch):
        assert (x is None) == self.first
        y = self.linear(micro_batch if self.first else x).tanh()
        return (y * micro_batch).sum() if self.last else y


class Listener:
    """Notes what an engine is told."""

    def __init__(self):
        self.told = []

    def expect_passes(self, count):
        self.told.append(count)


def micro_batches(count):
    return [randn(3, WIDTH, seed=50 + m) for m in range(count)]


def executor_of(groups, placement, stages=None):
    rank = groups.place.pp
    stages = stages or [Stage(placement.stage(rank, chunk), placement) for chunk in range(placement.chunks)]
    return Executor(stages, placement, groups, (3, WIDTH), torch.float32, CPU)


def on_one_process(num_stages, count):
    """Losses, and the weights' gradients, by plain calls."""
    stages = [Stage(stage, Placement(num_stages)) for stage in range(num_stages)]
    losses = []
    for batch in micro_batches(count):
        x = None
        for stage in stages:
            x = stage(x, batch)
        x.backward()
        losses.append(x.detach())
    return losses, [stage.linear.weight.grad for stage in stages]


def train(rank, world_size, name, placement, count):
    groups = build_groups(Topology(pp=world_size), rank, both_ways=both_ways(placement))
    executor, listener = executor_of(groups, placement), Listener()
    schedule = SCHEDULES[name](placement, count)
    runs = []
    for _ in range(2):  # nothing of one run is left over for the next
        for chunk in executor.chunks:
            chunk.zero_grad()
        outputs = executor.run(schedule[rank], micro_batches(count), listener)
        gradients = {placement.stage(rank, c): chunk.linear.weight.grad.clone() for c, chunk in enumerate(executor.chunks)}
        runs.append((outputs, gradients, executor.peak_in_flight))
    predicted = check_schedule(schedule, placement, count).peak_activations[rank]
    return runs, predicted, listener.told, all(not output.requires_grad for output in outputs)


EVERY_SCHEDULE = [
    pytest.param(name, kind.placement(pp, kind.min_chunks), count, id=f"{name}-{pp}-{count}")
    for name, kind in SCHEDULES.items()
    for pp, count in ((1, 3), (2, 5), (3, 2), (4, 8))
    if kind.allows(pp, kind.min_chunks, count) and (count != 2 or name == "1f1b")
]


@pytest.mark.parametrize(("name", "placement", "count"), EVERY_SCHEDULE)
def test_losses_gradients_and_peak_are_those_of_one_process_and_of_the_checker(name, placement, count):
    """No tolerance: the same operations in the same order."""
    losses, gradients = on_one_process(placement.num_stages, count)
    owner = placement.embedding_ranks[1]
    for rank, (runs, predicted, told, detached) in enumerate(run_ranks(placement.pp, train, name, placement, count)):
        for outputs, found, peak in runs:
            assert outputs == (losses if rank == owner else [])
            assert all(torch.equal(gradient, gradients[stage]) for stage, gradient in found.items())
            assert peak == predicted
        assert detached
        assert told == [count] * 2


def train_split(rank, world_size, placement, count, delay):
    groups = build_groups(Topology(pp=world_size), rank, both_ways=both_ways(placement))
    executor, listener = executor_of(groups, placement), Listener()
    whole_backward = all_forward_all_backward if placement.chunks > 1 else one_forward_one_backward
    schedule = split_backward(whole_backward(placement, count), delay)
    check_schedule(schedule, placement, count)
    outputs = executor.run(schedule[rank], micro_batches(count), listener)
    gradients = {placement.stage(rank, c): chunk.linear.weight.grad for c, chunk in enumerate(executor.chunks)}
    left = [len(chunk.weight_gradients) for chunk in executor.chunks]
    return outputs, gradients, executor.peak_waiting, left, listener.told


@pytest.mark.parametrize(
    ("placement", "count", "delay"),
    [
        (Placement(1), 3, 0),
        (Placement(1), 5, 2),
        (Placement(2), 5, 1),
        (Placement(3), 4, 9),  # all weight gradients wait until the end
        (Placement(1, 3), 3, 1),
        (Placement(2, 2), 5, 2),
        (Placement(2, 4), 3, 1),
        (Placement(3, 2), 4, 3),
        (Placement(2, 2, "v"), 5, 2),
        (Placement(2, 4, "v"), 3, 1),
        (Placement(4, 2, "v"), 3, 9),
    ],
    ids=str,
)
def test_a_split_backward_pass_gives_the_same_bits_as_a_whole_one(placement, count, delay):
    """Whatever the placement and however late the weight gradients: no tolerance."""
    losses, gradients = on_one_process(placement.num_stages, count)
    owner = placement.embedding_ranks[1]
    for rank, (outputs, found, waiting, left, told) in enumerate(run_ranks(placement.pp, train_split, placement, count, delay)):
        assert outputs == (losses if rank == owner else [])
        assert sorted(found) == [stage for stage in range(placement.num_stages) if placement.rank(stage) == rank]
        for stage, gradient in found.items():
            assert torch.equal(gradient, gradients[stage])
        assert waiting == min(delay + 1, count * placement.chunks)
        assert left == [0] * placement.chunks
        assert told == [count]


class LastInFirstOut(WeightGradientQueue):
    """What must not be."""

    def drain(self, micro_batch):
        self._passes.reverse()
        super().drain(self._passes[0][0])
        self._passes.reverse()


def test_weight_gradients_in_another_order_have_other_bits():
    """The comparison above would notice."""
    _, gradients = on_one_process(1, 8)
    stage = Stage(0, Placement(1))
    stage.weight_gradients = stage.linear.queue = LastInFirstOut()
    (actions,) = split_backward(one_forward_one_backward(Placement(1), 8), 3)
    executor_of(build_groups(Topology(), 0), Placement(1), [stage]).run(actions, micro_batches(8), Listener())
    torch.testing.assert_close(stage.linear.weight.grad, gradients[0])
    assert not torch.equal(stage.linear.weight.grad, gradients[0])


def test_a_list_that_takes_weight_gradients_out_of_order_is_refused():
    executor = executor_of(build_groups(Topology(), 0), Placement(1))
    actions = [Action("F", 0), Action("F", 1), Action("I", 0), Action("I", 1), Action("W", 1)]
    with pytest.raises(AssertionError, match="the weight gradients of micro-batch 0 come before those of 1"):
        executor.run(actions, micro_batches(2), Listener())


class SlowWeight(WeightGradient):
    """A weight gradient of no parameter at all."""

    def __init__(self, done):
        self.done = done

    def compute(self):
        self.done.append("W")


class OwnSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stage):
        ctx.stage = stage
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.stage.done.append("I")
        ctx.stage.weight_gradients.put(SlowWeight(ctx.stage.done))
        return dy, None


class ForeignStage(nn.Module):
    """Any module takes part in the split by a queue of its own."""

    def __init__(self):
        super().__init__()
        self.weight_gradients, self.done = WeightGradientQueue(), []

    def forward(self, x, micro_batch):
        return OwnSplit.apply(micro_batch.clone().requires_grad_(), self).sum()


def test_a_stage_of_any_kind_takes_part_in_the_split_by_its_queue():
    stage = ForeignStage()
    (actions,) = split_backward(one_forward_one_backward(Placement(1), 3), 1)
    executor_of(build_groups(Topology(), 0), Placement(1), [stage]).run(actions, micro_batches(3), Listener())
    assert "".join(stage.done) == "IIWIWW"


def test_a_stage_without_a_queue_runs_whole_backward_passes_only():
    stage = nn.Module()
    stage.linear = nn.Linear(WIDTH, 1)
    stage.forward = lambda x, micro_batch: stage.linear(micro_batch).sum()
    executor = executor_of(build_groups(Topology(), 0), Placement(1), [stage])
    (actions,) = one_forward_one_backward(Placement(1), 2)
    executor.run(actions, micro_batches(2), Listener())
    with pytest.raises(AssertionError, match="chunk 0 has no weight_gradients: its backward pass cannot be split"):
        executor.run(split_backward([actions], 0)[0], micro_batches(2), Listener())


def note_when_buckets_leave(rank, world_size):
    """The actions of one rank with two chunks, and the chunk whose bucket leaves."""
    placement, groups = Placement(1, 2), grid(rank, dp=world_size)
    executor = executor_of(groups, placement)
    engine = NativeZero(executor.chunks, groups, OptimizerSettings())
    events, compute = [], executor._compute
    for chunk, (bucket,) in enumerate(engine.chunk_buckets):

        def start(chunk=chunk, bucket=bucket):
            events.append(f"leaves {chunk}")
            Bucket.start_reduction(bucket)

        bucket.start_reduction = start

    def noting(action, *arguments):
        events.append(str(action))
        return compute(action, *arguments)

    executor._compute = noting
    engine.begin_step()
    (actions,) = split_backward(all_forward_all_backward(placement, 2), 1)
    executor.run(actions, micro_batches(2), engine)
    return events


def test_a_chunks_gradients_leave_with_its_last_weight_gradient_while_the_others_work():
    for events in run_ranks(2, note_when_buckets_leave):
        assert " ".join(events) == "F0 F1 F0.1 F1.1 I0.1 I1.1 W0.1 I0 W1.1 leaves 1 I1 W0 W1 leaves 0"


def evaluate(rank, world_size, chunks, kind):
    placement = Placement(world_size, chunks, kind)
    executor = executor_of(grid(rank, pp=world_size), placement)
    outputs = executor.run(forward_only(placement, 3)[rank], micro_batches(3))
    return outputs, executor.peak_in_flight, all(p.grad is None for chunk in executor.chunks for p in chunk.parameters())


@pytest.mark.parametrize(("chunks", "kind"), [(1, "loop"), (2, "loop"), (2, "v")])
def test_forward_passes_alone_give_the_losses_where_the_last_stage_is_and_keep_nothing(chunks, kind):
    losses, _ = on_one_process(2 * chunks, 3)
    owner = Placement(2, chunks, kind).embedding_ranks[1]
    for rank, (outputs, peak, no_gradients) in enumerate(run_ranks(2, evaluate, chunks, kind)):
        assert outputs == (losses if rank == owner else [])
        assert peak == 0 and no_gradients


class WatchedStage(Stage):
    """Keeps weak references to what it returns."""

    def __init__(self, stage, placement):
        super().__init__(stage, placement)
        self.outputs = []

    def forward(self, x, micro_batch):
        y = super().forward(x, micro_batch) * 1.0  # its own storage: tanh would save its output
        self.outputs.append(weakref.ref(y.untyped_storage()))
        return y


def watch_outputs(rank, world_size):
    placement = Placement(world_size)
    groups = grid(rank, pp=world_size)
    stage = WatchedStage(rank, placement)
    executor = executor_of(groups, placement, [stage])
    alive_in_flight = []
    act = executor._act

    def look(action, micro_batch, mailbox, outputs, train):
        if action == Action("B", 0):  # all forward passes have run, no backward pass has
            torch.distributed.barrier()
            for lane in mailbox.sending.values():  # all are through, as the gradients that come back would tell
                while lane:
                    lane.popleft().work.wait()
            alive_in_flight.append(sum(output() is not None for output in stage.outputs))
        act(action, micro_batch, mailbox, outputs, train)

    executor._act = look
    executor.run(gpipe(placement, 6)[rank], micro_batches(6), Listener())
    return executor.peak_in_flight, alive_in_flight


def test_an_output_that_was_sent_dies_while_its_micro_batch_is_in_flight():
    """The graph's edge is kept, not the tensor; so does Megatron's `deallocate_output_tensor`."""
    for rank, (peak, alive) in enumerate(run_ranks(2, watch_outputs)):
        assert peak == 6
        if rank == 0:
            assert alive == [0]


def watch_sends(rank, world_size, placement):
    """After each action: how many activations and how many gradients are kept because they may not be through."""
    groups = build_groups(Topology(pp=world_size), rank, both_ways=both_ways(placement))
    executor = executor_of(groups, placement)
    kept = []
    act = executor._act

    def look(action, micro_batch, mailbox, outputs, train):
        act(action, micro_batch, mailbox, outputs, train)
        messages = [transfer.message for lane in mailbox.sending.values() for transfer in lane]
        kept.append((action, messages))

    executor._act = look
    schedule = one_forward_one_backward if placement.chunks == 1 else all_forward_all_backward
    executor.run(schedule(placement, 8)[rank], micro_batches(8), Listener())
    return kept


def test_a_sent_activation_is_let_go_when_its_gradient_has_come_back():
    """gloo never says that a send is complete: without it, every activation of a step would stay to its end."""
    first, last = run_ranks(2, watch_sends, Placement(2))
    assert max(sum(message.kind == "F" for message in messages) for _, messages in first) <= 2
    assert all(not messages for action, messages in first if action == Action("B", 7))
    assert all(message.kind == "B" for _, messages in last for message in messages)


@pytest.mark.parametrize("placement", [Placement(2, 2), Placement(2, 2, "v"), Placement(3, 2)], ids=str)
def test_what_a_later_message_proves_through_is_let_go(placement):
    """Of what a rank has sent, only the last gradients of each micro-batch stay: nothing that arrives tells of them."""
    for rank, kept in enumerate(run_ranks(placement.pp, watch_sends, placement)):
        lowest = min(stage for stage in range(placement.num_stages) if placement.rank(stage) == rank)
        _, at_the_end = kept[-1]
        assert all(message.kind == "B" and message.stage == lowest for message in at_the_end)


def hand_over_inside_a_rank(rank, world_size):
    """Two chunks on one rank: the edge between them needs no message."""
    placement = Placement(1, 2)
    groups = grid(rank)
    executor = executor_of(groups, placement)
    outputs = executor.run(forward_only(placement, 3)[0], micro_batches(3))
    return outputs, sum(groups.ledger.calls.values())


def test_stages_on_one_rank_hand_their_tensors_over():
    losses, _ = on_one_process(2, 3)
    outputs, calls = hand_over_inside_a_rank(0, 1)
    assert outputs == losses and calls == 0


class FailingStage(Stage):
    def forward(self, x, micro_batch):
        if micro_batch[0, 0] == micro_batches(3)[1][0, 0]:
            raise RuntimeError("out of something")
        return super().forward(x, micro_batch)


def test_a_failing_stage_is_named_with_its_action_and_place():
    groups = build_groups(Topology(), 0)
    executor = executor_of(groups, Placement(1), [FailingStage(0, Placement(1))])
    with pytest.raises(RuntimeError, match="out of something") as error:
        executor.run(gpipe(Placement(1), 3)[0], micro_batches(3), Listener())
    (note,) = error.value.__notes__
    for part in ("in action F1 of stage 0", "pp=0, dp=0, cp=0, tp=0", "pp 1 x dp 1", "last collective: none"):
        assert part in note


def test_a_run_after_a_failed_one_starts_clean():
    groups = build_groups(Topology(), 0)
    executor = executor_of(groups, Placement(1), [FailingStage(0, Placement(1))])
    with pytest.raises(RuntimeError):
        executor.run(gpipe(Placement(1), 3)[0], micro_batches(3), Listener())
    executor.run(gpipe(Placement(1), 1)[0], micro_batches(1), Listener())
    assert executor.peak_in_flight == 1
