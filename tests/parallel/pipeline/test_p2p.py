"""Messages between stages: which there are, and that they arrive."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.groups import build_groups
from parallel.pipeline import p2p
from parallel.pipeline.layout import Placement
from parallel.pipeline.p2p import Mailbox, Message, both_ways, open_lanes, received, sent
from parallel.pipeline.schedules import SCHEDULES, Action
from parallel.topology import Topology
from tests.parallel.building import CPU
from tests.parallel.pipeline.lists import all_forward_all_backward
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


@given(placements)
def test_a_later_message_of_a_micro_batch_is_after_the_earlier_ones_and_no_other(placement):
    """Its way: up the stages as activations, down as gradients."""
    last = placement.num_stages - 1
    way = [Message("F", 0, s) for s in range(last)] + [Message("B", 0, s) for s in range(last, 0, -1)]
    for place, message in enumerate(way):
        assert [message.is_after(other) for other in way] == [other < place for other in range(len(way))]
        assert not message.is_after(Message("F", 1, 0))


@given(placements)
def test_a_lane_has_one_direction_on_its_communicator(placement):
    """Between two ranks, messages of one kind go both ways exactly where `both_ways` says so."""
    pairs = {}
    for stage in range(placement.num_stages - 1):
        source, target = placement.rank(stage), placement.rank(stage + 1)
        if source != target:
            pairs.setdefault(frozenset((source, target)), set()).add(source < target)
    assert both_ways(placement) == any(len(directions) == 2 for directions in pairs.values())


def mailbox_of(rank, actions, placement):
    groups = build_groups(Topology(pp=placement.pp), rank, both_ways=both_ways(placement))
    return Mailbox(actions, placement, groups, (3,), torch.float32, CPU), groups


def value(message):
    """A tensor that names its message."""
    return torch.tensor([float(ord(message.kind)), message.micro_batch, message.stage])


def pass_all_messages(rank, world_size, name, chunks, kind):
    """Run a schedule's messages without any stage. Returns those that did not arrive as sent, and how many were awaited."""
    placement = Placement(world_size, chunks, kind)
    if name == "forward":
        actions = [Action("F", m, chunk) for chunk in range(chunks) for m in range(3)]
    elif name == "forward and back":
        actions = all_forward_all_backward(placement, 3)[rank]
    else:
        actions = SCHEDULES[name](placement, 3)[rank]
    mailbox, groups = mailbox_of(rank, actions, placement)
    wrong, waiting = [], []
    mailbox.start()
    for action in actions:
        message = received(action, rank, placement)
        if message is not None and not torch.equal(mailbox.take(message), value(message)):
            wrong.append(str(action))
        waiting += [len(lane) for lane in mailbox.posted.values()]
        outgoing = sent(action, rank, placement)
        if outgoing is not None:
            mailbox.put(*outgoing, value(outgoing[0]))
    mailbox.finish()
    sending = sum(map(len, mailbox.sending.values()))
    return wrong, max(waiting, default=0), sum(groups.ledger.calls.values()), sending


@pytest.mark.parametrize(
    ("name", "size", "chunks", "kind", "calls"),
    [
        ("1f1b", 3, 1, "loop", [6, 12, 6]),  # 3 micro-batches, to and fro, with one neighbour or two
        ("gpipe", 2, 1, "loop", [6, 6]),
        ("forward", 2, 2, "loop", [9, 9]),  # edges 0-1, 1-2, 2-3 all between the two ranks
        ("forward", 2, 2, "v", [6, 6]),  # edge 1-2 stays on rank 1
        ("forward and back", 2, 2, "loop", [18, 18]),
        ("forward and back", 2, 4, "v", [24, 24]),  # edges 1-2 and 5-6 stay on rank 1, 3-4 on rank 0
        ("forward and back", 3, 2, "loop", [18, 24, 18]),
        ("1f1b", 1, 1, "loop", [0]),
    ],
)
def test_every_message_of_a_schedule_arrives(name, size, chunks, kind, calls):
    results = run_ranks(size, pass_all_messages, name, chunks, kind)
    assert [wrong for wrong, *_ in results] == [[]] * size
    assert [ledger_calls for _, _, ledger_calls, _ in results] == calls  # a receive counts as a call too
    assert all(waiting <= 1 for _, waiting, _, _ in results), "one receive of a lane is posted ahead of its need, not more"
    assert all(sending == 0 for *_, sending in results)


def put_before_the_receiver_is_there(rank, world_size):
    """Rank 0 sends two messages and only then does rank 1, told by a message back, post its receives."""
    placement = Placement(2)
    actions = [Action("F", 0), Action("F", 1)]
    mailbox, _ = mailbox_of(rank, actions, placement)
    if rank == 0:
        column = torch.arange(6.0).view(3, 2)[:, 1]  # not contiguous
        for m in range(2):
            mailbox.put(Message("F", m, 0), 1, column + 10 * m if m else column)
    torch.distributed.barrier()
    mailbox.start()
    taken = [mailbox.take(Message("F", m, 0)).tolist() for m in range(2)] if rank == 1 else []
    mailbox.finish()
    return taken


def test_a_send_does_not_wait_for_its_receiver():
    assert run_ranks(2, put_before_the_receiver_is_there) == [[], [[1.0, 3.0, 5.0], [11.0, 13.0, 15.0]]]


def leave_a_message(rank, world_size):
    mailbox, _ = mailbox_of(rank, [Action("F", 0, 1)], Placement(1, 2))
    mailbox.put(Message("F", 0, 0), 0, torch.zeros(3))
    mailbox.finish()


def test_a_message_that_nobody_took_is_noticed():
    with pytest.raises(AssertionError, match="messages left over"):
        leave_a_message(0, 1)


def take_out_of_order(rank, world_size):
    placement = Placement(2)
    mailbox, _ = mailbox_of(rank, [Action("F", 0), Action("F", 1)], placement)
    if rank == 0:
        for m in range(2):
            mailbox.put(Message("F", m, 0), 1, torch.zeros(3))
        mailbox.finish()
        return ""
    mailbox.start()
    with pytest.raises(AssertionError) as error:
        mailbox.take(Message("F", 1, 0))
    mailbox.posted[("F", 0)][0].work.wait()
    return str(error.value)


def test_a_message_that_is_taken_out_of_its_lanes_order_is_noticed():
    """NCCL has no tags: it would hand over the wrong one."""
    assert "micro_batch=1, stage=0) is needed, but Message(kind='F', micro_batch=0" in run_ranks(2, take_out_of_order)[1]


def share_a_communicator(rank, world_size):
    placement = Placement(2, 2, "loop")
    _, groups = mailbox_of(rank, [], placement)
    return groups.lane("F", 0, 1).group is groups.lane("F", 1, 0).group


def test_two_ways_between_two_ranks_have_two_communicators():
    """With one, NCCL would run a send behind the receive that was posted before it, on both ranks: a deadlock."""
    assert run_ranks(2, share_a_communicator) == [False, False]


def open_and_list(rank, world_size, placement):
    """The messages of `open_lanes` as this rank posts them: kind of lane, source, target."""
    groups = build_groups(Topology(pp=placement.pp), rank, both_ways=both_ways(placement))
    posted = []
    for name in ("start_send", "start_receive"):
        start = getattr(p2p, name)

        def noting(tensor, axis, peer, tag, start=start, sends=name == "start_send"):
            posted.append((axis.group, rank, peer) if sends else (axis.group, peer, rank))
            return start(tensor, axis, peer, tag)

        setattr(p2p, name, noting)
    open_lanes(placement, groups, CPU)
    used = [groups.lane(kind, *pair).group for kind in "FB" for pair in ((0, 1), (1, 0))]
    return [(used.index(group), source, target) for group, source, target in posted]


@pytest.mark.parametrize(
    ("placement", "lanes"), [(Placement(2), 2), (Placement(3), 4), (Placement(3, 2), 6), (Placement(2, 2, "v"), 4)], ids=str
)
def test_every_lane_is_opened_once_in_an_order_that_all_ranks_agree_on(placement, lanes):
    posted = run_ranks(placement.pp, open_and_list, placement)
    everything = {lane for mine in posted for lane in mine}
    assert len(everything) == lanes
    for rank, mine in enumerate(posted):
        assert set(mine) == {lane for lane in everything if rank in lane[1:]} and len(set(mine)) == len(mine)
    for one in posted:
        for other in posted:
            assert [lane for lane in one if lane in other] == [lane for lane in other if lane in one]
