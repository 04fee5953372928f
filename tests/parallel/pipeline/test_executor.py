"""The executor on real ranks, with stages of one small linear each, against the same linears on one process."""

import weakref

import pytest
import torch
from torch import nn

from parallel.groups import build_groups
from parallel.pipeline.check import check_schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import SCHEDULES, forward_only, gpipe, one_forward_one_backward
from parallel.topology import Topology
from tests.parallel.building import CPU, grid, randn
from tests.ranks import run_ranks

WIDTH = 4


class Stage(nn.Module):
    """tanh(x W^T): the first one makes x from the micro-batch, the last one a loss of y."""

    def __init__(self, stage, placement):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.linear.weight.data = randn(WIDTH, WIDTH, seed=stage)
        self.first, self.last = stage == 0, stage == placement.num_stages - 1

    def forward(self, x, micro_batch):
        assert (x is None) == self.first
        y = self.linear(micro_batch if self.first else x).tanh()
        return (y * micro_batch).sum() if self.last else y


class Listener:
    """Notes what an engine is told."""

    def __init__(self):
        self.told = []

    def last_use(self, chunk):
        self.told.append(f"last_use {chunk}")

    def no_more_grads(self, chunk):
        self.told.append(f"no_more_grads {chunk}")


def micro_batches(count):
    return [randn(3, WIDTH, seed=50 + m) for m in range(count)]


def executor_of(groups, placement, stages=None):
    rank = groups.pp_forward.rank
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


def train(rank, world_size, name, count):
    placement = Placement(world_size)
    groups = grid(rank, pp=world_size)
    executor, listener = executor_of(groups, placement), Listener()
    schedule = SCHEDULES[name](placement, count)
    runs = []
    for _ in range(2):  # nothing of one run is left over for the next
        executor.chunks[0].zero_grad()
        outputs = executor.run(schedule[rank], micro_batches(count), listener)
        runs.append((outputs, executor.chunks[0].linear.weight.grad.clone(), executor.peak_in_flight))
    predicted = check_schedule(schedule, placement, count).peak_activations[rank]
    return runs, predicted, listener.told, all(not output.requires_grad for output in outputs)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(("size", "count"), [(1, 3), (2, 5), (3, 2), (4, 4)])
def test_losses_gradients_and_peak_are_those_of_one_process_and_of_the_checker(name, size, count):
    """No tolerance: the same operations in the same order."""
    losses, gradients = on_one_process(size, count)
    for rank, (runs, predicted, told, detached) in enumerate(run_ranks(size, train, name, count)):
        for outputs, gradient, peak in runs:
            assert torch.equal(torch.stack(outputs), torch.stack(losses)) if rank == size - 1 else outputs == []
            assert torch.equal(gradient, gradients[rank])
            assert peak == predicted
        assert detached
        assert told == ["last_use 0", "no_more_grads 0"] * 2


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
    backward = executor._backward

    def look(action, mailbox):
        if action.micro_batch == 0:  # all forward passes have run, no backward pass has
            torch.distributed.barrier()
            for message in list(mailbox.sending):  # all are through, as the gradients that come back would tell
                mailbox._release(message)
            alive_in_flight.append(sum(output() is not None for output in stage.outputs))
        backward(action, mailbox)

    executor._backward = look
    executor.run(gpipe(placement, 6)[rank], micro_batches(6), Listener())
    return executor.peak_in_flight, alive_in_flight


def test_an_output_that_was_sent_dies_while_its_micro_batch_is_in_flight():
    """The graph's edge is kept, not the tensor; so does Megatron's `deallocate_output_tensor`."""
    for rank, (peak, alive) in enumerate(run_ranks(2, watch_outputs)):
        assert peak == 6
        if rank == 0:
            assert alive == [0]


def watch_sends(rank, world_size):
    placement = Placement(world_size)
    groups = grid(rank, pp=world_size)
    executor = executor_of(groups, placement, [Stage(rank, placement)])
    kept = []
    backward = executor._backward

    def look(action, mailbox):
        backward(action, mailbox)
        kept.append(sum(message.kind == "F" for message in mailbox.sending))

    executor._backward = look
    executor.run(one_forward_one_backward(placement, 8)[rank], micro_batches(8), Listener())
    return kept


def test_a_sent_activation_is_let_go_when_its_gradient_has_come_back():
    """gloo never says that a send is complete: without it, every activation of a step would stay to its end."""
    first, last = run_ranks(2, watch_sends)
    assert max(first) <= 1 and last == [0] * 8


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
