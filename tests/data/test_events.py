"""Declared events: weight changes and exclusions, what they leave as it was, and the ledger."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import small_data
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.config import ConfigError, DataConfig
from lemur_jax.data import events, ledger
from lemur_jax.data.events import Exclusion
from lemur_jax.data.pipeline import Pipeline

RATES = {"code": 10.0, "text": 1.0}
LENGTHS = {"code": [1, 160, 5, 33, 2, 17, 16, 1, 1, 70], "text": [40, 3, 9, 25]}


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    documents = {name: small_data.texts(lengths) for name, lengths in LENGTHS.items()}
    return small_data.make(tmp_path_factory.mktemp("events"), documents, tokenizer, RATES)


def open_with(data, exclusions=(), **fields):
    return Pipeline(small_data.config(data, **fields), exclusions)


# ----- weight changes --------------------------------------------------------------------------


def test_a_weight_change_leaves_earlier_steps_bitwise(data):
    """Red if changes are taken as positions instead of steps (`step * size` dropped)."""
    plain, changed = open_with(data), open_with(data, weight_changes=((7, "text", 10.0),))
    for step in range(7):
        assert all(map(np.array_equal, plain.batch(step), changed.batch(step)))
    after = [p.source for step in range(7, 17) for p in changed.places(step)]
    assert after.count("text") == 20  # 10:10 from there on, of 40 rows


def test_a_resume_accepts_a_change_of_the_future_only(data):
    """Red if `before` compares all of it, nothing of it, or the change at the step itself."""
    saved = open_with(data).position(7)
    for step in (7, 8):
        assert open_with(data, weight_changes=((step, "text", 2.0),)).check_position(saved) == 7
    late = open_with(data, weight_changes=((6, "text", 2.0),))
    with pytest.raises(ConfigError, match=r"weight_changes='6:text=2.0'.*has ''.*set back|cannot"):
        late.check_position(saved)
    recorded = late.position(9)
    assert late.check_position(recorded) == 9
    with pytest.raises(ConfigError, match=r"weight_changes=''.*has '6:text=2.0'.*cannot change"):
        open_with(data).check_position(recorded)
    with pytest.raises(ConfigError, match="weight_changes"):
        open_with(data, weight_changes=((6, "text", 3.0),)).check_position(recorded)


def test_a_checkpoint_of_before_events_is_accepted(data):
    """Red if a missing field counts as a difference: no older run could be resumed."""
    saved = open_with(data).position(7)
    for field in ("weight_changes", "exclusions", "rows_used"):
        del saved[field]
    assert open_with(data).check_position(saved) == 7
    with pytest.raises(ConfigError, match="weight_changes"):
        open_with(data, weight_changes=((3, "text", 2.0),)).check_position(saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([(3, "tekst", 2.0)], ["no source 'tekst'", "did you mean 'text'"]),
        ([(3, "text", 0), (3, "code", 0.0)], ["[1]", "leaves every source at rate 0"]),
        ([(3, "text", 1.0), (2, "code", 1.0)], ["[1]", "goes back from step 3", "order of their"]),
        ([(3, "text", 1.0), (3, "text", 2.0)], ["'text' twice at step 3"]),
        ([(3, "text", -1.0), (-3, "text", 1.0)], ["[0]", "[1]", "(step >= 0, source, rate >= 0)"]),
        ([(3, "text")], ["(step >= 0, source, rate >= 0)"]),
        ([(3, "text", float("inf"))], ["rate >= 0"]),
    ],
)
def test_bad_weight_changes(data, changes, words):
    """Red if a check is dropped; each message names the entry."""
    with pytest.raises(ConfigError) as error:
        open_with(data, weight_changes=changes)
    assert all(word in str(error.value) for word in words), error.value


def test_weight_changes_are_gin_values(data):
    """Red if settings._fits takes the first type of a fixed tuple for all of it, or any length."""
    from lemur_jax import settings as gin_settings

    fields = [f'DataConfig.path="{data}"', "DataConfig.batch_size=4"]
    fields += ["DataConfig.sequence_length=16"]
    change = 'DataConfig.weight_changes=((3, "text", 2.0), (5, "code", 0))'
    config, text = gin_settings.load(DataConfig, [], [*fields, change], [DataConfig])
    assert config.weight_changes == ((3, "text", 2.0), (5, "code", 0))
    assert "weight_changes" in text
    for bad in ('(("text", 3, 2.0),)', '((3, "text"),)'):
        with pytest.raises(ConfigError, match=r"weight_changes = .* must be tuple"):
            binding = f"DataConfig.weight_changes={bad}"
            gin_settings.load(DataConfig, [], [*fields, binding], [DataConfig])


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from("ab"), st.floats(0, 9)), max_size=6))
def test_weights_text_round_trip(changes):
    """Red if the text loses digits of a rate or the order of steps."""
    unique = {change[:2]: change for change in changes}
    changes = tuple(sorted(unique.values()))
    assert events.parse_weights(events.weights_text(changes)) == changes


# ----- exclusions ------------------------------------------------------------------------------

lengths = st.lists(
    st.one_of(st.just(1), st.integers(1, 12), st.just(small_data.T * 10)), min_size=1, max_size=9
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(code=lengths, text=lengths, pick=st.integers(0, 2**18 - 1), step=st.integers(0, 3))
def test_an_exclusion_leaves_the_rest_bitwise(tokenizer, code, text, pick, step):
    """Red if a piece is one column off, the last row of a long document is forgotten, tokens stay
    in the padding, or steps before are touched."""
    documents = {"code": small_data.texts(code), "text": small_data.texts(text)}
    chosen = {
        source: tuple(n for n in range(len(texts)) if pick >> (n + shift) & 1)
        for (source, texts), shift in zip(documents.items(), (0, 9))
    }
    chosen = {source: numbers for source, numbers in chosen.items() if numbers}
    with tempfile.TemporaryDirectory() as root:
        path = small_data.make(Path(root), documents, tokenizer, RATES)
        plain = open_with(path)
        without = open_with(path, [Exclusion(step, chosen)] if chosen else [])
        for at in range(6):
            old, new = plain.batch(at), without.batch(at)
            gone = np.zeros((4, small_data.T + 1), bool)
            for row, place in enumerate(plain.places(at)):
                if at < step:
                    break
                store = plain.store(place.source)
                segments = store.read([place.row]).segments[0]
                for segment, number in enumerate(store.documents_of(place.row), 1):
                    if number in chosen.get(place.source, ()):
                        gone[row] |= segments == segment
            kept = ~gone[:, :-1]
            for field, x, y in zip(old._fields, old, new):
                if field == "targets":
                    kept_targets = ~gone[:, 1:]
                    assert np.array_equal(x[kept_targets], y[kept_targets])
                    assert not y[~kept_targets].any()
                else:
                    assert np.array_equal(x[kept], y[kept]), field
                    assert not y[~kept].any(), field


def test_the_first_step_of_an_exclusion_counts(data):
    """Red if a later exclusion of the same document takes the place of an earlier one, or a
    document of the same row goes before its own step."""
    late, early = Exclusion(9, {"code": (1,)}), Exclusion(2, {"code": (1,)})
    for both in ([late, early], [early, late]):
        pipeline = open_with(data, both)
        place = next(
            p for p in pipeline.places(2) if 1 in pipeline.store("code").documents_of(p.row)
        )
        assert pipeline.excluded_pieces(2, "code", place.row)
        assert not pipeline.excluded_pieces(1, "code", place.row)
    pipeline = open_with(data, [Exclusion(2, {"code": (0,)}), Exclusion(9, {"code": (1,)})])
    for step, gone in ((1, []), (2, [0]), (8, [0]), (9, [0, 1])):
        assert [p.document for p in pipeline.excluded_pieces(step, "code", 0)] == gone


def test_exclusions_in_the_position(data):
    """Red if the digest ignores which documents are meant, or the step."""
    excluded = [Exclusion(5, {"code": (1, 3)})]
    saved = open_with(data, excluded).position(8)
    assert saved["exclusions"].startswith("5:2 documents ")
    assert open_with(data, excluded).check_position(saved) == 8
    for other in ([], [Exclusion(5, {"code": (1, 2)})], [Exclusion(6, {"code": (1, 3)})]):
        with pytest.raises(ConfigError, match="exclusions=.*restore the run's data_ledger"):
            open_with(data, other).check_position(saved)
    more = [*excluded, Exclusion(8, {"text": (0,)})]
    assert open_with(data, more).check_position(saved) == 8
    with pytest.raises(ConfigError, match="source 'code' has no document 99"):
        open_with(data, [Exclusion(5, {"code": (99,)})])


# ----- the ledger's file -----------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / ledger.LEDGER
    for number in range(4):
        ledger.append(path, "saved", step=number)
    return path


def test_a_ledger_is_read_as_written(file):
    """Red if the chain does not cover an event's name or its facts."""
    found = ledger.read(file)
    assert [entry["step"] for entry in found.entries] == [0, 1, 2, 3]
    assert not found.problems and not found.torn
    assert not ledger.read(file.with_name("none")).entries


@pytest.mark.parametrize("edit", ["change", "rename", "remove", "swap", "insert"])
def test_every_edit_of_a_ledger_is_found(file, edit):
    """Red if `chain` is not compared, or is the hash of the line alone (remove, swap)."""
    lines = file.read_text().splitlines()
    if edit == "change":
        lines[1] = json.dumps(json.loads(lines[1]) | {"step": 9})
    elif edit == "rename":
        lines[1] = json.dumps(json.loads(lines[1]) | {"event": "begun"})
    elif edit == "remove":
        del lines[1]
    elif edit == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        lines.insert(1, lines[0])
    file.write_text("\n".join(lines) + "\n")
    assert "does not follow the one before" in ledger.read(file).problems[0]


def test_a_torn_line_is_harmless(file):
    """Red if an append glues its line to a torn one, or the torn one breaks the chain."""
    with file.open("a") as out:
        out.write('{"event": "saved", "st')
    ledger.append(file, "saved", step=4)
    found = ledger.read(file)
    assert [entry["step"] for entry in found.entries] == [0, 1, 2, 3, 4]
    assert not found.problems and "line 5 is not whole" in found.torn[0]


def test_an_exclusion_begins_with_the_next_start(tmp_path):
    """Red if it begins with the last start, or one that was bound moves with later starts."""
    path = tmp_path / ledger.LEDGER
    ledger.append(path, "begun", step=0)
    ledger.append(path, "exclude", documents={"code": [1]})
    ledger.append(path, "exclude", documents={"code": [2]}, step=20)
    steps = lambda entries, n: [e.step for e in ledger.exclusions(entries, n)]  # noqa: E731
    assert steps(ledger.read(path).entries, 6) == [6, 20]
    ledger.append(path, "resumed", step=8)
    ledger.append(path, "resumed", step=4)  # went back: what was decided stays
    ledger.append(path, "exclude", documents={"code": [3]}, step=2)  # too late for 2
    assert steps(ledger.read(path).entries, 12) == [8, 20, 12]
