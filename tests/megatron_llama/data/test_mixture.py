import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.data.mixture import MixtureRow, capped_weights, format_tokens, redistribute, table_lines

amounts = st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 1000) | st.just(math.inf)), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(amounts, st.floats(1, 5000))
def test_redistribution_is_a_fair_split_within_the_room(sources, amount):
    weights, room = zip(*sources, strict=True)
    given_amounts = redistribute(weights, room, amount)
    if given_amounts is None:
        assert sum(room) <= amount * (1 + 1e-9)
        return
    assert sum(given_amounts) == pytest.approx(amount)
    assert all(found <= limit * (1 + 1e-9) for found, limit in zip(given_amounts, room, strict=True))
    rates = [found / weight for found, weight in zip(given_amounts, weights, strict=True)]
    for rate, found, limit in zip(rates, given_amounts, room, strict=True):
        assert rate == pytest.approx(max(rates)) or found == pytest.approx(limit)  # full, or as much as anybody
    integers = capped_weights(given_amounts, room)
    assert sum(integers) == 10**5
    for integer, found, limit in zip(integers, given_amounts, room, strict=True):
        if found < limit:
            assert integer >= math.floor(found / amount * 10**5 * (1 - 1e-9)) - 1
        else:
            assert integer <= found / sum(given_amounts) * 10**5


def test_the_table_of_the_paper():
    rows = [
        MixtureRow("CommonCrawl", 0.67, 852_700_000_000, 938_000_000_000),
        MixtureRow("Wikipedia", 0.045, 25_700_000_000, 63_000_000_000, max_epochs=2, sample_tokens=2048),
    ]
    assert table_lines(rows) == [
        "source       proportion  epochs    tokens    unique  max epochs",
        "CommonCrawl     67.00%     1.10     938 B     853 B",
        "Wikipedia        4.50%     2.45    63.0 B    25.7 B        2.00 exceeded",
    ]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(1.4e12, "1.40 T"), (938e9, "938 B"), (63e9, "63.0 B"), (4_194_304, "4.19 M"), (3000, "3,000"), (0, "0")],
)
def test_tokens_for_people(tokens, text):
    assert format_tokens(tokens) == text


def test_a_limit_may_be_exceeded_by_a_sample():
    row = dict(name="a", share=1.0, unique_tokens=100, max_epochs=1, sample_tokens=10)
    assert not MixtureRow(tokens=110, **row).exceeds and MixtureRow(tokens=111, **row).exceeds
