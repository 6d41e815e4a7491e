"""audit, why and exclude: what a run has read, proved from its directory."""

import dataclasses
import io
import itertools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import small_data
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from simulated_run import Session, simulate

from lemur_jax import cli
from lemur_jax.config import ConfigError
from lemur_jax.data import ledger
from lemur_jax.data.audit import audit, print_audit
from lemur_jax.data.exclude import exclude
from lemur_jax.data.order import Order
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.data.why import list_steps, why

RATES = {"code": 10.0, "text": 1.0}
LENGTHS = {"code": [1, 160, 5, 33, 2, 17, 16, 1, 1, 70], "text": [40, 3, 9, 25]}
B = 12


def hosts(*cuts):
    return tuple(itertools.pairwise(cuts))


ONE, TWO, THREE = hosts(0, 12), hosts(0, 5, 12), hosts(0, 3, 4, 12)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    documents = {name: small_data.texts(lengths) for name, lengths in LENGTHS.items()}
    return small_data.make(tmp_path_factory.mktemp("audit"), documents, tokenizer, RATES)


@pytest.fixture(scope="module")
def config(data):
    return small_data.config(data, B)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """(run directory, checkpoints) of a run on one, two and three hosts that went back once."""
    run = tmp_path_factory.mktemp("runs") / "run"
    sessions = [Session(0, (2, 4, 6), ONE), Session(4, (6, 8), TWO), Session(8, (9,), THREE)]
    return run, simulate(run, config, sessions)


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def printed(call, *arguments, **fields) -> str:
    out = io.StringIO()
    call(*arguments, **fields, console=Console(file=out, width=200))
    return out.getvalue()


# ----- audit -----------------------------------------------------------------------------------


@st.composite
def histories(draw):
    """Sessions of 1 to 8 hosts, uneven, that stop anywhere and go on from any checkpoint."""
    sessions, saved, micro_batches = [], [0], draw(st.sampled_from([1, 2, 3]))
    rows = B // micro_batches
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.sampled_from(saved))
        steps = draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
        saves = [start + sum(steps[: n + 1]) for n in range(len(steps))]
        cuts = draw(st.sets(st.integers(1, rows - 1), max_size=7))
        parts = hosts(0, *sorted(cuts), rows)
        sessions.append(Session(start, saves, parts, rows, micro_batches))
        saved = [step for step in saved if step <= start] + saves
    return sessions


@settings(max_examples=8, deadline=None, derandomize=True)
@given(histories(), st.integers(0, 2**40), st.lists(st.integers(0, 12), max_size=2, unique=True))
def test_any_honest_history_is_proved(data, sessions, seed, steps):
    """Red if a host's rows count from 0, an interval keeps the old start after going back, or the
    sum depends on who read what."""
    changes = tuple((step, "text", 1.0 + step) for step in sorted(steps))
    of_run = small_data.config(data, B, seed=seed, weight_changes=changes)
    with tempfile.TemporaryDirectory() as root:
        checkpoints = simulate(Path(root) / "run", of_run, sessions)
        result = audit(Path(root) / "run", checkpoints, full=True)
        assert result.violations == []
        assert result.step == result.read_again == sessions[-1].saves[-1]
        assert sum(use.used for use in result.sources.values()) == result.step * B
        assert {use.repeated for use in result.sources.values()} == {0}


def test_sums_do_not_depend_on_hosts(config, tmp_path):
    """Red if `hash_rows` hashes rows from 0 on each host, or a row that two hosts read counts
    twice (`earlier` empty)."""
    sums = set()
    overlapping = ((0, 8), (0, 8), (3, 12))  # what meshes that interleave hosts read
    for name, parts, micro_batches in (
        ("a", hosts(0, 12), 1),
        ("b", hosts(0, 3, 4, 12), 1),
        ("c", hosts(0, 1, 6), 2),
        ("d", overlapping, 1),
    ):
        checkpoints = simulate(
            tmp_path / name, config, [Session(0, (3,), parts, 12 // micro_batches, micro_batches)]
        )
        assert audit(tmp_path / name, checkpoints).violations == []
        entries = ledger.read(tmp_path / name / ledger.LEDGER).entries
        sums |= {entry["reads"] for entry in entries if entry.event == "saved"}
    assert len(sums) == 1


def test_a_run_that_went_back(finished):
    """Red if steps that were thrown away count as read, or are not mentioned."""
    result = audit(*finished)
    assert result.violations == [] and result.step == 9 and result.read_again == 1
    assert [i[:2] for i in result.lineage.intervals] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    assert [i.processes for i in result.lineage.intervals] == [1, 1, 2, 2, 3]
    assert "steps 5 to 6 were read twice" in result.notes[0]
    shown = printed(print_audit, result)
    assert "proved: each of steps 1 to 9 was read once" in shown


def rewrite(run: Path, edit) -> None:
    """Edits the lines of a ledger and chains them anew, as a clever forger would."""
    found = [{"event": e.event, **e.facts} for e in ledger.read(run / ledger.LEDGER).entries]
    edit(found)
    (run / ledger.LEDGER).unlink()
    for line in found:
        event = line.pop("event")
        ledger.append(run / ledger.LEDGER, event, **line)


def drop(*numbers):
    def edit(lines):
        for number in sorted(numbers, reverse=True):
            del lines[number - 1]

    return edit


def put(number, **facts):
    return lambda lines: lines[number - 1].update(facts)


# Lines: 1 begun 0; 2 3 4 saved 2 4 6; 5 resumed 4; 6 7 saved 6 8; 8 resumed 8; 9 saved 9.
FORGERIES = {
    "a missing checkpoint line": (drop(6), "gap: checkpoint 8 counts from step 6"),
    "a missing session": (drop(5, 6, 7), "gap: resumed at step 8, but the last checkpoint is 6"),
    "a missing beginning": (drop(1, 2, 3, 4), "the ledger begins at step 4: steps 1 to 4 were"),
    "a doubled checkpoint": (
        lambda lines: lines.insert(3, lines[2].copy()),
        "overlap: checkpoint 4 counts from step 2, but the line before ends at 4",
    ),
    "a resume between checkpoints": (put(5, step=3), "overlap: resumed at step 3"),
    "a second beginning": (put(5, event="begun"), "begin a second time"),
    "another seed": (put(5, seed=1), "line 5 (resumed at step 4): data position: seed=0 but"),
    "another data set": (put(8, manifest="0"), "line 8 (resumed at step 8): data position: manif"),
    "other rows used": (put(8, rows_used="code=1,text=95"), "rows_used='code="),
    "a hole between hosts": (put(5, ranges=[[0, 5], [6, 12]]), "12: that is not all of them"),
    "rows that nobody read": (put(8, ranges=[[0, 3], [2, 11]]), "12: that is not all of them"),
    "another batch": (put(5, micro_batches=2), "2 micro-batches of 12 rows are not 12 rows"),
    "other content": (put(9, reads="00"), "steps 9 to 9 were fed other rows than the order"),
    "a change in the past": (put(8, weight_changes="3:text=2.0"), "weight_changes="),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_every_forgery_is_named(run, finished, name):
    """Red if the check of that name is dropped from lineage.py, audit.py or position.py."""
    edit, words = FORGERIES[name]
    rewrite(run, edit)
    result = audit(run, finished[1])
    assert any(words in violation for violation in result.violations), result.violations
    assert f"VIOLATION: {result.violations[0][:20]}" in printed(print_audit, result)


def test_an_edit_without_a_new_chain_is_named(run, finished):
    """Red if `ledger.problems` is left out of the violations."""
    text = (run / ledger.LEDGER).read_text()
    (run / ledger.LEDGER).write_text(text.replace('"processes": 2', '"processes": 4'))
    assert "line 5 (resumed) does not follow" in audit(run, finished[1]).violations[0]


def test_checkpoints_that_disagree_are_named(run, finished):
    """Red if checkpoints are not compared, or one that the ledger lacks is passed over."""
    checkpoints = finished[1]
    for change, words in (
        ({8: checkpoints[8] | {"seed": 5}}, "checkpoint 8: data position: seed=0 but the checkp"),
        ({8: checkpoints[8] | {"step": 7}}, "checkpoint 8: its data position says step 7"),
        ({8: checkpoints[8] | {"rows_used": "x"}}, "checkpoint 8: data position: rows_used"),
        ({7: checkpoints[8] | {"step": 7}}, "checkpoint 7 is not in the ledger"),
    ):
        assert any(words in v for v in audit(run, checkpoints | change).violations), words


def test_a_checkpoint_that_was_not_finished_is_noted(finished):
    """Red if the ledger's last line is taken for a checkpoint that is there."""
    older = {step: position for step, position in finished[1].items() if step < 9}
    result = audit(finished[0], older)
    assert result.violations == [] and "checkpoint 9 is not there" in result.notes[-1]


def test_a_host_that_fed_another_row_is_found(config, tmp_path, monkeypatch):
    """Red if only what a row contains is hashed and not where it stands: rows 0 and 1 swapped."""
    original = Pipeline.places

    def swapped(self, step, start=0, stop=None):
        places = original(self, step, start, stop)
        return [places[1], places[0], *places[2:]] if step == 2 else places

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "places", swapped)
        checkpoints = simulate(tmp_path / "run", config, [Session(0, (2, 4), ONE)])
    (violation,) = audit(tmp_path / "run", checkpoints).violations
    assert "steps 3 to 4 were fed other rows" in violation


def test_a_shuffle_that_is_no_permutation_is_found(finished, monkeypatch):
    """Red if epochs are not enumerated (`_repeated` returns 0)."""
    original = Order.shuffled
    monkeypatch.setattr(Order, "shuffled", lambda s, n, e, i: original(s, n, e, i // 2))
    violations = audit(*finished).violations
    assert any("rows come twice within an epoch" in violation for violation in violations)


def test_a_run_without_a_ledger(tmp_path):
    """Red if an older run looks like a directory that is no run, or like a proved one."""
    with pytest.raises(ConfigError, match=r"is not a directory"):
        audit(tmp_path / "none", {})
    with pytest.raises(ConfigError, match=r"no data_ledger.jsonl: it is not the directory of a ru"):
        audit(tmp_path, {})
    (tmp_path / "config.gin").touch()
    with pytest.raises(ConfigError, match="older version.*resume it with this version"):
        audit(tmp_path, {})


def test_a_run_that_began_before_there_were_ledgers(config, tmp_path):
    """Red if the steps before the first line count as proved."""
    checkpoints = simulate(tmp_path / "run", config, [Session(4, (6,), ONE)])
    (violation,) = audit(tmp_path / "run", checkpoints).violations
    assert "steps 1 to 4 were read before there was a ledger" in violation


def test_data_that_moved_or_changed(run, finished, data, tmp_path):
    """Red if --data is ignored, or a missing part is not named."""
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    entries = ledger.read(run / ledger.LEDGER).entries
    assert {Path(e["path"]) for e in entries if e.event in ledger.STARTS} == {Path(data)}
    rewrite(run, lambda lines: [line.update(path="/gone") for line in lines if "path" in line])
    with pytest.raises(ConfigError, match=r"'/gone' holds no data set.*\n.*give .* with --data"):
        audit(run, finished[1])
    assert audit(run, finished[1], data=str(moved)).violations == []
    shutil.rmtree(moved / "code" / "train" / "part-00000")
    with pytest.raises(ConfigError, match=r"code/train/part-00000' is missing"):
        audit(run, finished[1], data=str(moved))


# ----- why -------------------------------------------------------------------------------------


def test_why_names_rows_documents_and_offsets(finished, config):
    """Red if STEP counts from 0 while metrics count from 1, or offsets are of the row."""
    shown = printed(why, finished[0], 3)
    pipeline = Pipeline(config)
    assert "read by 1 process(es), begun at step 0" in shown
    assert f"{B} rows, positions {2 * B} to {3 * B - 1} of the order; mixture: code 90.91%" in shown
    for number, place in enumerate(pipeline.places(2)):
        head = f"row {number}: {place.source} row {place.row}, epoch {place.epoch + 1}"
        piece = pipeline.store(place.source).pieces(place.row)[-1]
        end = piece.start_in_document + piece.length - 1
        assert f"{head}\n" in shown
        assert f"  {piece.path}  tokens {piece.start_in_document} to {end}, columns" in shown
    assert "[excluded" not in shown
    assert "read by 2 process(es)" in printed(why, finished[0], 5)
    assert "not saved in any checkpoint yet (the last is 9)" in printed(why, finished[0], 10)
    first = pipeline.stored_rows(2, pipeline.places(2)[:1]).tokens[0, :3]
    assert printed(why, finished[0], 3, text=True).count("'") >= len(first)
    with pytest.raises(ConfigError, match="STEP=0 must be at least 1"):
        why(finished[0], 0)


def test_the_list_of_steps(finished, config, tmp_path):
    """Red if the list begins at step 0, or leaves rows out."""
    assert list_steps(finished[0], tmp_path / "f.jsonl") == 9
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    pipeline = Pipeline(config)
    for line in lines:
        assert [tuple(row[:3]) for row in line["rows"]] == pipeline.places(line["step"] - 1)
        source, row, _, pieces = line["rows"][0]
        expected = pipeline.store(source).pieces(row)
        assert [[p.path, p.start_in_document] for p in expected] == [p[:2] for p in pieces]


# ----- exclude ---------------------------------------------------------------------------------


def test_excluded_documents_are_gone_from_the_next_start(run, finished, config):
    """Red if the exclusion reaches back, is not recorded, or audit forgets that it began at 9."""
    found = exclude(str(run), documents=["code/1.py"], patterns=["text/[23].py"])
    assert found == {"code": {1: "code/1.py"}, "text": {2: "text/2.py", 3: "text/3.py"}}
    assert exclude(str(run), documents=["code/1.py"]) == {}
    assert "code/1.py" in printed(why, run, 9) and "[excluded" not in printed(why, run, 9)
    assert "[excluded: padding]" in printed(why, run, 10)
    checkpoints = finished[1] | simulate(run, config, [Session(9, (11,), TWO)])
    assert checkpoints[11]["exclusions"].startswith("9:3 documents")
    result = audit(run, checkpoints, full=True)
    assert result.violations == [] and result.step == 11
    assert result.events == ["after step 9: 3 document(s) excluded"]
    # The list is the ledger's: without the line, what was fed afterwards is not explained.
    rewrite(run, lambda lines: lines.remove(next(x for x in lines if x["event"] == "exclude")))
    words = ["exclusions=", "steps 10 to 11 were fed other rows"]
    violations = audit(run, checkpoints).violations
    assert all(any(word in v for v in violations) for word in words), violations


def test_exclusions_of_a_data_set_reach_new_starts_once(data, config, tmp_path):
    """Red if a run does not take them over, or takes them over again at each start."""
    own = str(shutil.copytree(data, tmp_path / "data"))
    moved = dataclasses.replace(config, path=own)
    simulate(tmp_path / "run", moved, [Session(0, (2,), ONE)])
    assert exclude(own, documents=["text/0.py"]) == {"text": {0: "text/0.py"}}
    assert exclude(own, documents=["text/0.py"]) == {}
    checkpoints = simulate(
        tmp_path / "run", moved, [Session(2, (4,), ONE), Session(4, (5,), THREE)]
    )
    assert checkpoints[5]["exclusions"].startswith("2:1 documents")
    lines = [e for e in ledger.read(tmp_path / "run" / ledger.LEDGER).entries]
    assert [e.event for e in lines].count("exclude") == 1
    assert audit(tmp_path / "run", checkpoints, full=True).violations == []


def test_bad_exclusions(run):
    """Red if an unknown path is passed over, a step behind the last checkpoint accepted, or a
    source emptied: steps of padding would follow."""
    for arguments, words in (
        ({"documents": ["code/11.py"]}, "'code/11.py': no document has this path; did you mean 'c"),
        ({"patterns": ["*.rs"]}, r"--pattern='\*.rs': no document's path matches"),
        ({}, "give --document=PATH or --pattern=GLOB"),
        ({"patterns": ["text/*"]}, "source 'text' has 4 documents, and none would be left: give i"),
        ({"documents": ["code/1.py"], "step": 8}, "--step=8 lies behind .* checkpoint 9"),
    ):
        with pytest.raises(ConfigError, match=words):
            exclude(str(run), **arguments)
    assert all(e.event != "exclude" for e in ledger.read(run / ledger.LEDGER).entries)


# ----- the commands ----------------------------------------------------------------------------


def test_commands(run, finished, capsys):
    """Red if the exit status of a violation is 0, or a flag does not arrive."""
    for step, position in finished[1].items():
        assert position["step"] == step
    assert cli.main(["data", "audit", str(run), "--full"]) == 0
    assert "9 of 9 steps" in capsys.readouterr().out
    assert cli.main(["data", "why", str(run), "2", "--text"]) == 0
    assert "step 2 of" in capsys.readouterr().out
    assert cli.main(["data", "exclude", str(run), "--pattern=code/[0-2].py", "--step=20"]) == 0
    assert capsys.readouterr().out.count("excluded code document") == 3
    lines = (run / ledger.LEDGER).read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 20
    (run / ledger.LEDGER).write_text("\n".join(lines[1:]) + "\n")
    assert cli.main(["data", "audit", str(run)]) == 1
    assert cli.main(["data", "audit", str(run.parent)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err
