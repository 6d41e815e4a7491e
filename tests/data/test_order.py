"""The global order: exact shares, whole epochs, O(1) seek, and the same for ever."""

import functools
import itertools
import time

import grain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_8 import TABLE

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
        ({"a": 2**32}, {"a": 1}, "rows['a']=4294967296 is too many"),
    ],
)
def test_bad_orders(rows, rates, words):
    """Red if grain's assertion is what the user sees."""
    with pytest.raises(ConfigError) as error:
        Order(0, rows, rates)
    assert words in str(error.value)


def test_table_8_of_lemur_at_its_real_size():
    """Red if rates are rounded (grain's mix rounds them to a hundredth of the least), or a seek
    walks: 21,458 steps of 1,024 rows of 4,096 tokens are 90B."""
    started = time.perf_counter()
    rows = {name: int(22e6 * rate / 100) for name, rate in TABLE.items()}
    order = Order(0, rows, TABLE)
    last = 21_457 * 1024
    assert len({order[last + row] for row in range(1024)}) == 1024
    assert time.perf_counter() - started < 1.0  # 20 ms measured; the last step of the run
    used, total = order.used(last), sum(TABLE.values())
    assert sum(used.values()) == last
    for name, rate in TABLE.items():
        assert abs(used[name] - last * rate / total) < len(TABLE)
    # A few of everything: 9,990 rows are exactly the table's hundredths.
    assert order.used(9990) == {name: round(rate * 100) for name, rate in sorted(TABLE.items())}


def test_interleaving_and_shuffle_are_grains():
    """Red if `_next` differs from grain's mix where its rounding of rates is exact, or the shuffle
    from MapDataset.shuffle: two implementations, one order."""
    rows, rates = {"a": 300, "b": 41, "c": 7}, {"a": 10.0, "b": 1.0, "c": 3.0}
    order = Order(3, rows, rates)
    sources = [
        grain.MapDataset.range(n).shuffle(seed=order._seeds[name]).repeat(None).map(
            lambda row, name=name: (name, row)
        )
        for name, n in rows.items()
    ]  # fmt: skip
    mixed = grain.MapDataset.mix(sources, weights=list(rates.values()))
    for position in (*range(1000), *range(10**9, 10**9 + 50)):
        source, row = mixed[position]
        assert order[position][:2] == (source, row % rows[source])


names = st.sampled_from(["a", "b", "c", "d"])


@st.composite
def mixtures(draw):
    """(seed, rows, rates, changes): sources of 1 to 90 rows, rates with decimals, any changes."""
    rows = draw(st.dictionaries(names, st.integers(1, 90), min_size=1))
    rate = st.decimals("0.01", 100, places=2).map(float)
    rates = {name: draw(rate) for name in rows}
    positions = sorted(draw(st.lists(st.integers(0, 100), max_size=3, unique=True)))
    changes, now = [], dict(rates)
    for position in positions:
        for name in draw(st.lists(st.sampled_from(sorted(rows)), min_size=1, unique=True)):
            changed = draw(st.one_of(st.just(0.0), rate))
            if any((now | {name: changed}).values()):
                now[name] = changed
                changes.append((position, name, changed))
    return draw(st.integers(0, 2**63)), rows, rates, changes


@settings(max_examples=30, deadline=None, derandomize=True)
@given(mixtures())
def test_each_source_goes_on_where_it_was(mixture):
    """Red if a phase counts its sources from 0 (`phase.used` dropped from `_place`): rows repeat;
    or if a change touches positions before it (`p.start < position` in `_phase`)."""
    seed, rows, rates, changes = mixture
    order, plain = Order(seed, rows, rates, changes), Order(seed, rows, rates)
    # Tiny sources are slow to shuffle, and a row is asked for three times here.
    order.shuffled = plain.shuffled = functools.cache(order.shuffled)
    places = [order[position] for position in range(150)]
    before = changes[0][0] if changes else 150
    assert places[:before] == [plain[position] for position in range(before)]
    for name, n in rows.items():
        mine = [place for place in places if place.source == name]
        assert mine == [order.place(name, index) for index in range(len(mine))]
        for epoch, part in itertools.groupby(mine, key=lambda place: place.epoch):
            read = [place.row for place in part]
            assert len(set(read)) == len(read) and set(read) <= set(range(n))
            if (epoch + 1) * n <= len(mine):
                assert len(read) == n  # a whole epoch is every row once
    for position in (0, 1, before, 137, 150):
        counted = {name: 0 for name in rows}
        for place in places[:position]:
            counted[place.source] += 1
        assert order.used(position) == counted


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mixtures())
def test_rates_hold_from_the_change_on(mixture):
    """Red if a change is applied one position late, or forgets what an earlier one set."""
    seed, rows, rates, changes = mixture
    order, now = Order(seed, rows, rates, changes), dict(rates)
    edges = [0, *sorted({change[0] for change in changes}), 2000]
    for start, stop in itertools.pairwise(edges):
        now |= {name: rate for at, name, rate in changes if at == start}
        used, after = order.used(start), order.used(stop)
        for name, rate in now.items():
            share = rate / sum(now.values())
            taken = after[name] - used[name]
            # Nested floors: one off for each source at most.
            assert abs(taken - (stop - start) * share) <= len(rows)
            assert rate or not taken
            if stop > start:
                assert order.share(start)[name] == pytest.approx(share)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(1, 3000), seed=st.integers(0, 2**31), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(rows, seed, epoch):
    """Red if `shuffled` uses max_index=rows, or the row number as it is plus one."""
    order = Order(seed, {"a": rows}, {"a": 1})
    assert sorted(order.shuffled("a", epoch, i) for i in range(rows)) == list(range(rows))


def test_the_digest_is_of_what_cannot_change(order):
    """Red if `digest` follows declared changes: declaring one for the future would then make every
    checkpoint another order's."""
    changed = Order(0, ROWS, RATES, [(5, "text", 3.0)])
    assert changed.digest() == order.digest()
    assert [changed[p] for p in range(40)] != [order[p] for p in range(40)]
    assert Order(0, ROWS, {"code": 10.0, "text": 1.5}).digest() != order.digest()
