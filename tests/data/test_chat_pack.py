"""Packing: every token once, rows legal, and train.py's rules with its off-by-one."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lemur_jax.data.batch import make_batch
from lemur_jax.data.chat import pack
from lemur_jax.data.chat.formats import Rendered

CAPACITY = 24


def rendered(length: int, first: int) -> Rendered:
    """`length` distinct ids from `first` on, the second half learnt."""
    ids = tuple(range(first, first + length))
    return Rendered(ids, tuple(n >= length // 2 for n in range(length)))


def many(lengths):
    return [rendered(length, 1000 * (n + 1)) for n, length in enumerate(lengths)]


@settings(deadline=None)
@given(st.lists(st.integers(1, CAPACITY), max_size=60))
def test_best_fit_places_each_once_into_the_fullest_row(lengths):
    """Red if `enough & -enough` (the least space that suffices) becomes the most."""
    rows = pack.best_fit(lengths, CAPACITY)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    # The textbook's best fit decreasing, one item after another over all rows.
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(CAPACITY - length)
    assert sorted(CAPACITY - sum(lengths[i] for i in row) for row in rows) == sorted(free)


def test_best_fit_refuses_what_cannot_fit():
    """Red if the check of a length goes: an endless row, or an item lost."""
    with pytest.raises(ValueError, match="length 25 of item 1"):
        pack.best_fit([1, 25], CAPACITY)


@settings(deadline=None)
@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40))
def test_segmented_rows_keep_conversations_whole_and_apart(lengths):
    """Red if `row.loss[at] = 0` goes, segments repeat, or `at` is not moved."""
    talks = many(lengths)
    seen = {}
    for row in pack.segmented(talks, CAPACITY):
        batch = make_batch(row.tokens[None], row.segments[None], row.loss[None])
        for segment, index in enumerate(row.conversations, 1):
            where = row.segments == segment
            seen[index] = tuple(row.tokens[where].tolist())
            learnt = [i for i, one in zip(talks[index].ids, talks[index].learnt) if one]
            targets = batch.targets[0][(batch.weights[0] > 0) & where[1:]]
            first = talks[index].ids[0]
            assert targets.tolist() == [i for i in learnt if i != first]
            positions = batch.positions[0][where[:-1]]
            assert positions.tolist() == list(range(len(positions)))
        assert row.loss[row.segments == 0].sum() == 0
    assert seen == {n: one.ids for n, one in enumerate(talks)}


def as_train_py(lengths, most, group):
    """train.py's `data_packing` on lengths: (conversation, start, stop) or "end" in each row."""
    result = []
    for start in range(0, len(lengths), group):
        packed, sizes = [], []
        for index in range(start, min(start + group, len(lengths))):
            length = lengths[index]
            if packed and sizes[-1] + length <= most:
                packed[-1] += [(index, 0, length), "end"]
                sizes[-1] += length + 1
            elif length > most:
                for at in range(0, length, most):
                    stop = min(at + most, length)
                    packed.append([(index, at, stop)])
                    sizes.append(stop - at)
            else:
                packed.append([(index, 0, length), "end"])
                sizes.append(length + 1)
        result += packed
    return result


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=50), st.integers(1, 9))
def test_next_fit_is_train_pys(lengths, group):
    """Red if the check counts the end token, the groups go, or a chunk is closed."""
    rows = pack.next_fit(lengths, CAPACITY, group)
    spelled = [
        [part for piece in row for part in ([piece[:3], "end"] if piece.closed else [piece[:3]])]
        for row in rows
    ]
    assert spelled == as_train_py(lengths, CAPACITY, group)


def test_a_row_may_exceed_max_seq_length_by_one():
    """The original's off-by-one, which a row of T+1 tokens takes whole: max_seq_length is T.

    Red if `filled + length <= most` becomes `<`, or `columns - 1` becomes `columns`."""
    talks = many([9, 14])  # 9 and its end token, 14: 24, exactly max_seq_length; then one more end
    [row] = pack.lemur_compat(talks, CAPACITY + 1, end_id=2)
    assert np.count_nonzero(row.segments) == CAPACITY + 1
    assert row.tokens.tolist() == [*talks[0].ids, 2, *talks[1].ids, 2]
    batch = make_batch(row.tokens[None], row.segments[None], row.loss[None])
    assert batch.weights[0, -1] == 0  # the extra token is a target only, and not learnt
    two = list(pack.lemur_compat(many([9, 15]), CAPACITY + 1, end_id=2))
    assert len(two) == 2


def test_compat_rows_attend_across_and_do_not_learn_the_end():
    """Red if segments count up, the end token is learnt, or positions restart."""
    talks = many([4, 4])
    [row] = pack.lemur_compat(talks, CAPACITY + 1, end_id=2)
    assert set(row.segments[:10]) == {1} and set(row.segments[10:]) == {0}
    assert row.loss.tolist()[:10] == [0, 0, 1, 1, 0, 0, 0, 1, 1, 0]
    batch = make_batch(row.tokens[None], row.segments[None], row.loss[None])
    assert batch.positions[0, :10].tolist() == list(range(10))


def test_fill_of_realistic_lengths():
    """Red if best fit becomes next fit (84 %): lengths as Lemur-Chat's table 1 gives them."""
    draw = np.random.default_rng(0)
    lengths = np.clip(np.exp(draw.normal(5.9, 1.0, 8000)), 16, 4097).astype(int).tolist()
    rows = pack.best_fit(lengths, 4097)
    assert sum(lengths) / (len(rows) * 4097) > 0.95
