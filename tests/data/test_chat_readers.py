"""Published layouts of conversations, and everything that can be wrong with a record."""

import gzip
import itertools
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lemur_jax.config import ConfigError
from lemur_jax.data.chat import oasst, readers
from lemur_jax.data.chat.conversation import fault

RECORDS = {
    "messages": (
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"},
                      {"role": "assistant", "content": "A"}]},
        [("system", "S"), ("user", "Q"), ("assistant", "A")],
    ),
    "prompt_completion": (
        {"prompt": "Q", "completion": "A"},
        [("user", "Q"), ("assistant", "A")],
    ),
    "openorca": (
        {"id": "t0.1", "system_prompt": "", "question": "Q", "response": "A"},
        [("user", "Q"), ("assistant", "A")],
    ),
    "sharegpt": (
        {"id": "x", "conversations": [{"from": "system", "value": "S"},
                                      {"from": "human", "value": "Q"},
                                      {"from": "gpt", "value": "A"}]},
        [("system", "S"), ("user", "Q"), ("assistant", "A")],
    ),
    "evol_code": (
        {"instruction": "Q", "input": "I", "output": "A"},
        [("user", "Q\n\nI"), ("assistant", "A")],
    ),
}  # fmt: skip


def read(path, record_format, **options):
    refused = []
    found = list(
        readers.read(
            readers.expand([str(path)], "files"),
            record_format,
            lambda place, reason: refused.append((place, reason)),
            **options,
        )
    )
    return found, refused


def write_lines(path, *records):
    lines = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in records)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("record_format", RECORDS)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_every_layout_in_every_container(tmp_path, record_format, suffix):
    """Red if a column name or a role changes, `place` loses its number, or `_json` stops early."""
    record, turns = RECORDS[record_format]
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write_lines(path, record, record)
    elif suffix == "json":
        path.write_text(json.dumps([record, record], indent=1))
    elif suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record, record]), path)
    else:
        path.write_bytes(gzip.compress((json.dumps(record) + "\n").encode() * 2))
    found, refused = read(path, record_format)
    assert [list(map(tuple, one.messages)) for one in found] == [turns, turns]
    assert [one.path for one in found] == [f"data.{suffix}:1", f"data.{suffix}:2"]
    assert refused == []


def test_other_spellings(tmp_path):
    """Red if "response" or "chatgpt" is forgotten, or OpenOrca's system prompt is dropped."""
    path = tmp_path / "a.jsonl"
    found, _ = read(write_lines(path, {"instruction": "Q", "response": "A"}), "evol_code")
    assert found[0].messages[1].content == "A"
    turns = [{"from": "user", "value": "Q"}, {"from": "chatgpt", "value": "A"}]
    found, _ = read(write_lines(path, {"conversations": turns}), "sharegpt")
    assert [m.role for m in found[0].messages] == ["user", "assistant"]
    record = {"system_prompt": "S", "question": "Q", "response": "A"}
    found, _ = read(write_lines(path, record), "openorca")
    assert found[0].messages[0] == ("system", "S")


def turns(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    "record, reason",
    [
        (turns("user"), "no assistant turn"),
        (turns("user", "tool"), "unknown role 'tool'"),
        (turns("assistant", "user"), "not alternating"),
        (turns(), "no assistant turn"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty content"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' is NoneType"),
        ({"messages": [{"role": "user"}]}, "no field 'content' (found role)"),
        ({"messages": "hi"}, "no list of turns 'messages'"),
        ({"text": "hi"}, "no list of turns 'messages' (found text)"),
        (["hi"], "not a JSON object but list"),
        (b"{", "not JSON"),
        (b'"\xff"', "not UTF-8"),
        ({"messages": [{"role": "user", "content": "a\0b"},
                       {"role": "assistant", "content": "x"}]}, "a NUL"),
        ({"messages": [{"role": "user", "content": "\ud800"},
                       {"role": "assistant", "content": "x"}]}, "surrogate"),
    ],
)  # fmt: skip
def test_bad_records_are_named(tmp_path, record, reason):
    """Red if `read` drops the call of `refuse` for a reason, or the record is read as another."""
    good = turns("user", "assistant")
    found, refused = read(write_lines(tmp_path / "a.jsonl", good, record, good), "messages")
    assert [one.path for one in found] == ["a.jsonl:1", "a.jsonl:3"]
    [(place, said)] = refused
    assert place == "a.jsonl:2" and reason in said


def test_bad_split_is_named(tmp_path):
    """Red if `_split` lets any value through."""
    record = turns("user", "assistant")
    path = write_lines(tmp_path / "a.jsonl", record | {"split": "validation"}, record)
    found, refused = read(path, "messages", split_key="split")
    assert [one.split for one in found] == ["validation"]
    assert refused == [("a.jsonl:2", "split=None is neither 'train' nor 'validation'")]


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999)[:-20]),
        ("a.jsonl.gz", b"no gzip at all"),
        ("a.parquet", b"PAR1 no more"),
        ("a.json", b'{"a": 1}'),
        ("a.json", b'[{"a": 1}, {"b"'),
        ("a.json", b'[{"a": 1}'),
        ("a.json", b"\xff"),
    ],
)
def test_broken_files_are_errors(tmp_path, name, data):
    """Red if the except clause of `_records` loses a type: a traceback, or a silent end."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read"):
        read(tmp_path / name, "openorca")


def test_missing_files_and_suffixes_are_named(tmp_path):
    """Red if `expand` stops at its first problem."""
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ConfigError) as caught:
        readers.expand([str(tmp_path / "none.jsonl"), str(tmp_path / "a.csv")], "files")
    assert len(caught.value.problems) == 2


def test_files_of_one_name_are_told_apart(tmp_path):
    """Red if places are base names only: two records would be one document."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "x.jsonl", turns("user", "assistant"))
    found, _ = read(tmp_path / "*" / "x.jsonl", "messages")
    assert [one.path for one in found] == ["a/x.jsonl:1", "b/x.jsonl:1"]


# ---------------------------------------------------------------------------------------------
# OpenAssistant
# ---------------------------------------------------------------------------------------------


def message(identity, parent, role, rank=None, **fields):
    record = {"message_id": identity, "parent_id": parent, "role": role, "rank": rank}
    return record | {"text": identity, "lang": "en"} | fields


TREE = [
    message("q", None, "prompter"),
    message("a1", "q", "assistant", rank=1),
    message("a0", "q", "assistant", rank=0),
    message("a0q", "a0", "prompter"),
    message("a1q", "a1", "prompter"),
    message("a1qa", "a1q", "assistant"),
    message("other", None, "prompter", lang="de"),
]


def texts(conversations):
    return ["/".join(m.content for m in one.messages) for one in conversations]


def nested(records):
    """The same trees in the other published layout."""
    children = {r["message_id"]: [c for c in records if c["parent_id"] == r["message_id"]]
                for r in records}  # fmt: skip

    def grow(record):
        return record | {"replies": [grow(child) for child in children[record["message_id"]]]}

    return [{"message_tree_id": r["message_id"], "prompt": grow(r)} for r in records
            if r["parent_id"] is None]  # fmt: skip


@pytest.mark.parametrize("layout", ["messages", "reversed", "trees"])
@pytest.mark.parametrize(
    "paths, expected", [("best", ["q/a0"]), ("leaves", ["q/a1/a1q/a1qa", "q/a0"])]
)
def test_trees(tmp_path, layout, paths, expected):
    """Red if `min` becomes `max`, a trailing question stays, or one layout links differently."""
    records = {"messages": TREE, "reversed": TREE[::-1], "trees": nested(TREE)}[layout]
    found, refused = read(write_lines(tmp_path / "a.jsonl", *records), "oasst", paths=paths)
    assert sorted(texts(found)) == sorted(expected)
    assert [reason for _, reason in refused] == ["no assistant turn"]  # of the tree "other"
    assert all(one.meta == {"lang": "en"} for one in found)


def test_a_circle_of_messages_is_named(tmp_path):
    """Red if only what no parent is found for is refused: of a circle every parent is there."""
    circle = [message("a", "b", "assistant"), message("b", "a", "prompter")]
    found, refused = read(write_lines(tmp_path / "a.jsonl", *circle), "oasst")
    assert found == []
    assert [place for place, _ in refused] == ["a.jsonl:1", "a.jsonl:2"]
    assert all("circle" in reason for _, reason in refused)


def test_deleted_and_orphaned_messages_are_named(tmp_path):
    """Red if a deleted message is dropped without `refuse`, or its replies become trees."""
    gone = message("a", "q", "assistant", deleted=True)
    below = message("b", "a", "prompter")
    found, refused = read(
        write_lines(tmp_path / "a.jsonl", message("q", None, "prompter"), gone, below), "oasst"
    )
    assert found == []
    assert [place for place, _ in refused] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:1"]
    assert "deleted" in refused[0][1] and "parent" in refused[1][1]


@settings(deadline=None, max_examples=60)
@given(
    parents=st.lists(st.integers(0, 100), max_size=12),
    ranks=st.lists(st.none() | st.integers(0, 2), min_size=13, max_size=13),
)
def test_paths_against_brute_force(parents, ranks):
    """Red if `_ends` yields a beginning of another path, or `_best` goes into a dead end."""
    nodes = [message("0", None, "prompter")]
    for number, draw in enumerate(parents, 1):
        parent = nodes[draw % len(nodes)]
        role = "assistant" if parent["role"] == "prompter" else "prompter"
        nodes.append(message(str(number), parent["message_id"], role, ranks[number]))
    by_id = {node["message_id"]: node for node in nodes}

    def path_to(node):
        above = [] if node["parent_id"] is None else path_to(by_id[node["parent_id"]])
        return [*above, node["message_id"]]

    answers = [path_to(node) for node in nodes if node["role"] == "assistant"]
    ends = [a for a in answers if not any(b != a and b[: len(a)] == a for b in answers)]
    records = [(f"p:{n}", node) for n, node in enumerate(nodes)]
    found = list(oasst.conversations(records, lambda *_: None, "leaves"))
    assert sorted(texts(found)) == sorted("/".join(path) for path in ends)

    def key(path):  # of every answer's path: rank by rank, first in the file among equals
        steps = [(float("inf") if (r := by_id[i]["rank"]) is None else r, int(i)) for i in path]
        return steps

    best = list(oasst.conversations(records, lambda *_: None, "best"))
    assert texts(best) == (["/".join(min(ends, key=key))] if ends else [])
    assert all(fault(one.messages) is None for one in itertools.chain(found, best))
