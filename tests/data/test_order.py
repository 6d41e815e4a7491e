"""The global order: exact shares, whole epochs, O(1) seek, and the same for ever."""

import time

import pytest

from lemur_jax.config import ConfigError
from lemur_jax.data.order import Order, Place

ROWS = {"code": 300, "text": 40}
RATES = {"code": 10.0, "text": 1.0}


@pytest.fixture(scope="module")
def order():
    return Order(0, ROWS, RATES)


@pytest.mark.parametrize("start", [0, 12345, 10**10])
def test_shares_are_exact_in_every_window(order, start):
    """Red if rates are normalised by rows, or sources are drawn at random."""
    sources = [order[p].source for p in range(start, start + 2200)]
    assert sources.count("text") == 200
    for first in range(0, 2200, 37):
        window = sources[first : first + 110]
        # One off at each end of a window that is not aligned.
        assert len(window) < 110 or abs(window.count("text") - 10) <= 1


def test_epochs_cover_every_row_once(order):
    """Red if shuffling draws with replacement, or `epoch` is off by one row."""
    places = [order[p] for p in range(11 * 80)]
    for source, rows in ROWS.items():
        mine = [place for place in places if place.source == source]
        for epoch in range(len(mine) // rows):
            part = mine[epoch * rows : (epoch + 1) * rows]
            assert {place.epoch for place in part} == {epoch}
            assert sorted(place.row for place in part) == list(range(rows))
    text = [place.row for place in places if place.source == "text"]
    assert text[:40] != text[40:80] and text[:40] != list(range(40))


def test_seek(order):
    """Red if the order keeps state, or reaching a position costs more the further it is."""
    again = Order(0, dict(reversed(ROWS.items())), RATES)
    positions = [10**10 + 7, 3, 10**6, 3]
    assert [order[p] for p in positions] == [again[p] for p in positions]
    started = time.perf_counter()
    for p in range(10**10, 10**10 + 100):
        order[p]
    assert time.perf_counter() - started < 0.5  # 9 ms measured; a walk would never end


def test_seed_changes_the_order_of_every_source(order):
    """Red if `seed` is not used, or used as grain's seed directly: seeds 0 and 1 then overlap."""
    other = Order(1, ROWS, RATES)
    assert order.digest() != other.digest()
    first = [order[p].row for p in range(11 * 80) if order[p].source == "text"]
    second = [other[p].row for p in range(11 * 80) if other[p].source == "text"]
    assert first[40:80] != second[:40]


def test_order_is_pinned(order):
    """Red if grain or this file changes the order: old runs could then not be resumed exactly.

    When it turns red with an upgrade of grain, say so in the change: `check_position` will refuse
    checkpoints of unfinished runs.
    """
    assert [order[p] for p in (0, 1, 10, 10**10)] == PINNED


PINNED = [
    Place("code", 250, 0),
    Place("code", 189, 0),
    Place("text", 10, 0),
    Place("code", 88, 30303030),
]


@pytest.mark.parametrize(
    ("rows", "rates", "words"),
    [
        ({"a": 0}, {"a": 1}, "rows['a']=0 must be positive"),
        ({"a": 1}, {"a": -1}, "rates['a']=-1 must be a positive number"),
        ({"a": 1}, {"b": 1}, "rows=['a'] and rates=['b'] must name one set"),
    ],
)
def test_bad_orders(rows, rates, words):
    """Red if grain's assertion is what the user sees."""
    with pytest.raises(ConfigError) as error:
        Order(0, rows, rates)
    assert words in str(error.value)


def test_table_8_of_lemur():
    """Red if rates are rounded to whole percents: Lemur's mixture (arXiv:2310.06830, table 8)."""
    rates = {"python": 72.73, "sql": 5.15, "java": 1.82, "web": 6.82, "books": 0.41}
    order = Order(0, dict.fromkeys(rates, 1000), rates)
    n = 20000
    sources = [order[p].source for p in range(n)]
    for name, rate in rates.items():
        # grain scales the smallest rate to 100: shares are exact to 1 % of the smallest.
        share = rate / sum(rates.values())
        assert abs(sources.count(name) / n - share) < 1e-4
    assert isinstance(order[0], Place)
