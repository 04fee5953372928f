"""Who runs where: slots and nodes that fail repeatedly, or are lost, give way to spare ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_llama.supervision.roster import Outcome, Plan, Roster

LOST = 69


def died(slot: int | None) -> Outcome:
    return Outcome(LOST, "death", slot)


def test_the_first_nodes_and_slots_begin_and_the_others_stand_by() -> None:
    assert Roster(nodes=3, needed=2, slots=3, ranks=2).deal() == ((0, (0, 1)), (1, (0, 1)))


def test_a_slot_that_fails_twice_in_a_row_gives_way() -> None:
    roster = Roster(nodes=1, needed=1, slots=3, ranks=2)
    roster.hear({0: died(0)}, progress=False)
    assert roster.deal() == ((0, (0, 1)),)
    roster.hear({0: died(0)}, progress=False)
    assert roster.deal() == ((0, (1, 2)),)


def test_failures_with_a_new_checkpoint_in_between_are_not_in_a_row() -> None:
    roster = Roster(nodes=1, needed=1, slots=2, ranks=1)
    for _ in range(5):
        roster.hear({0: died(0)}, progress=True)
    assert roster.deal() == ((0, (0,)),)


def test_a_node_whose_slots_give_way_gives_way_to_a_spare_node() -> None:
    roster = Roster(nodes=3, needed=2, slots=2, ranks=2)
    roster.hear({0: Outcome(LOST, "elsewhere"), 1: died(0)}, progress=False)
    roster.hear({0: Outcome(LOST, "elsewhere"), 1: died(1)}, progress=False)
    assert roster.deal() == ((0, (0, 1)), (2, (0, 1)))


def test_failures_on_several_nodes_are_counted_apart() -> None:
    roster = Roster(nodes=3, needed=2, slots=1, ranks=1)
    roster.hear({0: died(0), 1: died(None)}, progress=False)
    roster.hear({0: died(None), 1: died(0)}, progress=False)
    assert roster.deal() == ((0, (0,)), (1, (0,)))


def test_who_dies_is_to_blame_and_not_who_stands_still_meanwhile() -> None:
    roster = Roster(nodes=2, needed=1, slots=1, ranks=1)
    for _ in range(2):
        roster.hear({0: Outcome(LOST, "hang", 0), 1: died(0)}, progress=False)
    assert roster.deal() == ((0, (0,)),)


def test_what_was_set_aside_is_used_again_where_there_is_nothing_else() -> None:
    roster = Roster(nodes=1, needed=1, slots=2, ranks=2)
    for _ in range(4):
        roster.hear({0: died(1)}, progress=False)
    assert roster.deal() == ((0, (0, 1)),)


def test_without_enough_nodes_there_is_nothing_to_deal() -> None:
    roster = Roster(nodes=3, needed=2, slots=1, ranks=1)
    roster.lose(0)
    assert roster.deal() == ((1, (0,)), (2, (0,)))
    roster.lose(2)
    assert roster.deal() == ()


@given(st.data())
def test_every_deal_has_room_for_all_ranks_on_nodes_that_are_there(data: st.DataObject) -> None:
    nodes, slots = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    needed, ranks = data.draw(st.integers(1, nodes)), data.draw(st.integers(1, slots))
    roster, lost = Roster(nodes, needed, slots, ranks), set()
    for _ in range(data.draw(st.integers(0, 8))):
        shares = roster.deal()
        assert bool(shares) == (nodes - len(lost) >= needed)
        if not shares:
            return
        assert [node for node, _ in shares] == sorted({node for node, _ in shares} - lost) and len(shares) == needed
        assert all(sorted(set(mine)) == list(mine) and len(mine) == ranks and mine[-1] < slots for _, mine in shares)
        assert Plan.from_json(Plan(shares).to_json()) == Plan(shares)
        node, mine = data.draw(st.sampled_from(shares))
        if data.draw(st.booleans()):
            lost.add(node)
            roster.lose(node)
        else:
            roster.hear({node: died(data.draw(st.sampled_from(mine)))}, progress=data.draw(st.booleans()))
