"""Messages between stages: which there are, and that they arrive."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.layout import Placement
from parallel.pipeline.p2p import Mailbox, Message, received, sent
from parallel.pipeline.schedules import SCHEDULES, Action
from tests.parallel.building import CPU, grid
from tests.ranks import run_ranks

placements = st.builds(Placement, st.integers(1, 16), st.integers(1, 4), st.sampled_from(["loop", "v"]))


@given(placements, st.sampled_from("FBI"))
def test_what_one_stage_sends_its_neighbour_receives(placement, kind):
    made, needed = {}, {}
    for rank in range(placement.pp):
        for chunk in range(placement.chunks):
            action = Action(kind, 7, chunk)
            message, outgoing = received(action, rank, placement), sent(action, rank, placement)
            if message is not None:
                needed[message] = rank
            if outgoing is not None:
                made[outgoing[0]] = outgoing[1]
    assert made == needed
    assert len(made) == placement.num_stages - 1
    assert {message.kind for message in made} <= {"F" if kind == "F" else "B"}


@given(placements)
def test_weight_gradients_need_and_send_nothing(placement):
    for rank in range(placement.pp):
        assert received(Action("W", 0), rank, placement) is None and sent(Action("W", 0), rank, placement) is None


@settings(max_examples=30)
@given(placements, st.integers(1, 32))
def test_no_two_messages_share_a_tag_in_one_direction(placement, micro_batches):
    mailbox = Mailbox.__new__(Mailbox)
    mailbox.placement = placement
    messages = [Message("F", m, s) for m in range(micro_batches) for s in range(placement.num_stages)]
    assert len({mailbox._tag(message) for message in messages}) == len(messages)


def mailbox_of(rank, actions, placement, pp_size):
    groups = grid(rank, pp=pp_size)
    return Mailbox(actions, placement, groups.pp_forward, groups.pp_backward, (3,), torch.float32, CPU), groups


def value(message):
    """A tensor that names its message."""
    return torch.tensor([float(ord(message.kind)), message.micro_batch, message.stage])


def pass_all_messages(rank, world_size, name, chunks, kind):
    """Run a schedule's messages without any stage. Returns those that did not arrive as sent, and how many were awaited."""
    placement = Placement(world_size, chunks, kind)
    if name == "forward":
        actions = [Action("F", m, chunk) for chunk in range(chunks) for m in range(3)]
    else:
        actions = SCHEDULES[name](placement, 3)[rank]
    mailbox, groups = mailbox_of(rank, actions, placement, world_size)
    wrong, waiting = [], []
    mailbox.post_receives(1)
    for action in actions:
        message = received(action, rank, placement)
        if message is not None and not torch.equal(mailbox.take(message), value(message)):
            wrong.append(str(action))
        waiting.append(len(mailbox.posted))
        outgoing = sent(action, rank, placement)
        if outgoing is not None:
            mailbox.put(*outgoing, value(outgoing[0]))
    mailbox.finish()
    return wrong, max(waiting), sum(groups.ledger.calls.values()), len(mailbox.sending)


@pytest.mark.parametrize(
    ("name", "size", "chunks", "kind", "calls"),
    [
        ("1f1b", 3, 1, "loop", [6, 12, 6]),  # 3 micro-batches, to and fro, with one neighbour or two
        ("gpipe", 2, 1, "loop", [6, 6]),
        ("forward", 2, 2, "loop", [9, 9]),  # edges 0-1, 1-2, 2-3 all between the two ranks
        ("forward", 2, 2, "v", [6, 6]),  # edge 1-2 stays on rank 1
        ("1f1b", 1, 1, "loop", [0]),
    ],
)
def test_every_message_of_a_schedule_arrives(name, size, chunks, kind, calls):
    results = run_ranks(size, pass_all_messages, name, chunks, kind)
    assert [wrong for wrong, *_ in results] == [[]] * size
    assert [ledger_calls for _, _, ledger_calls, _ in results] == calls  # a receive counts as a call too
    assert all(waiting <= 1 for _, waiting, _, _ in results), "one receive is posted ahead of its need, not more"
    assert all(sending == 0 for *_, sending in results)


def put_before_the_receiver_is_there(rank, world_size):
    """Rank 0 sends two messages and only then does rank 1, told by a message back, post its receives."""
    placement = Placement(2)
    actions = [Action("F", 0), Action("F", 1)]
    mailbox, groups = mailbox_of(rank, actions, placement, 2)
    if rank == 0:
        column = torch.arange(6.0).view(3, 2)[:, 1]  # not contiguous
        for m in range(2):
            mailbox.put(Message("F", m, 0), 1, column + 10 * m if m else column)
    torch.distributed.barrier()
    taken = [mailbox.take(Message("F", m, 0)).tolist() for m in range(2)] if rank == 1 else []
    mailbox.finish()
    return taken


def test_a_send_does_not_wait_for_its_receiver():
    assert run_ranks(2, put_before_the_receiver_is_there) == [[], [[1.0, 3.0, 5.0], [11.0, 13.0, 15.0]]]


def leave_a_message(rank, world_size):
    mailbox, _ = mailbox_of(rank, [Action("F", 0, 1)], Placement(1, 2), 1)
    mailbox.put(Message("F", 0, 0), 0, torch.zeros(3))
    mailbox.finish()


def test_a_message_that_nobody_took_is_noticed():
    with pytest.raises(AssertionError, match="messages left over"):
        leave_a_message(0, 1)
