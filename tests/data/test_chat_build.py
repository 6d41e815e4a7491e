"""`lemur data chat` end to end: what is stored, what is counted, what is refused."""

import io
import json

import pytest
from rich.console import Console

from lemur_jax import cli, settings
from lemur_jax.config import ConfigError, DataConfig
from lemur_jax.data.chat import build as chat_build
from lemur_jax.data.chat import clean, docstrings, formats, template
from lemur_jax.data.chat.config import ChatBuildConfig, ChatSourceConfig
from lemur_jax.data.chat.conversation import Conversation, Message
from lemur_jax.data.pipeline import Pipeline, read_manifest
from lemur_jax.data.store import RowStore
from tests.data import chat_tokenizer

T = 160


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("chat_build")


@pytest.fixture(scope="module")
def tokenizer(root):
    return chat_tokenizer.make(root / "tokenizer")


@pytest.fixture(scope="module")
def talks(root):
    """60 conversations of 1 to 3 rounds; every tenth is longer than a row."""
    records = []
    for number in range(60):
        rounds = 20 if number % 10 == 9 else 1 + number % 3
        messages = []
        for turn in range(rounds):
            messages.append({"role": "user", "content": f"Question {number}, part {turn}?"})
            messages.append({"role": "assistant", "content": f"Answer {number} {turn}."})
        records.append({"messages": messages})
    path = root / "talks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(root, path, name, **fields):
    source = ChatSourceConfig(
        name="talks", files=(str(path),), format="messages", validation_fraction=0.2
    )
    fields = {"sources": (source,), "tokenizer": str(root / "tokenizer")} | fields
    return ChatBuildConfig(path=str(root / name), sequence_length=T, **fields)


def quiet():
    return Console(quiet=True)


def stored(root, name, split):
    """(path, ids, learnt ids) of every conversation, from the store."""
    store = RowStore(root / name / "chat" / split)
    found = {}
    for row in range(store.rows):
        tokens, segments, loss = (x[0] for x in store.read([row]))
        for segment, document in enumerate(store.documents_of(row), 1):
            where = segments == segment
            learnt = tokens[where & (loss == 1)].tolist()
            found[store.path(document)] = (tokens[where].tolist(), learnt)
    return found


@pytest.fixture(scope="module")
def built(root, tokenizer, talks):
    return chat_build.build(config(root, talks, "data", rows_multiple=4), quiet())


def test_stored_rows_are_the_rendered_conversations(root, tokenizer, talks, built):
    """Red if rows mix up conversations, the mask moves, or one is lost."""
    records = [json.loads(line) for line in talks.read_text().splitlines()]
    expected = {}
    for number, record in enumerate(records, 1):
        turns = tuple(Message(**message) for message in record["messages"])
        made = formats.render([Conversation(turns, "x")], formats.FORMATS["chatml"], tokenizer)[0]
        made = made.cut(T + 1)
        learnt = [i for i, one in zip(made.ids, made.learnt) if one]
        expected[f"talks/talks.jsonl:{number}"] = (list(made.ids), learnt)
    train, held_out = stored(root, "data", "train"), stored(root, "data", "validation")
    assert train | held_out == expected and not train.keys() & held_out.keys()
    counts = built["chat"]["splits"]
    assert counts["train"]["truncated"] + counts["validation"]["truncated"] == 6
    learnt = sum(len(learnt) for _, learnt in train.values())
    assert counts["train"]["learnt_tokens"] == learnt
    assert counts["train"]["tokens"] == sum(len(ids) for ids, _ in train.values())


def test_training_reads_it_and_an_epoch_is_each_row_once(root, built):
    """Red if `_append_empty` miscounts, loss is not stored, or empty rows have documents."""
    rows = built["sources"]["chat"]["splits"]["train"]["rows"]
    assert rows % 4 == 0
    empty = built["chat"]["splits"]["train"]["empty_rows"]
    assert built["chat"]["splits"]["train"]["rows"] + empty == rows and empty < 4
    pipeline = Pipeline(DataConfig(path=str(root / "data"), batch_size=4, sequence_length=T))
    places = [place.row for step in range(rows // 4) for place in pipeline.places(step)]
    assert sorted(places) == list(range(rows))
    batches = [pipeline.batch(step) for step in range(rows // 4)]
    weight = sum(float(batch.weights.sum()) for batch in batches)
    assert weight == built["chat"]["splits"]["train"]["learnt_tokens"]
    assert pipeline.unigram_entropy("chat") > 1


def test_an_identical_build_is_returned_and_another_refused(root, talks, built):
    """Red if `_identity` forgets steps, or `_existing` compares nothing."""
    same = config(root, talks, "data", rows_multiple=4)
    assert chat_build.build(same, quiet()) == built
    other = config(root, talks, "data", rows_multiple=4, steps=(clean.DropExactDuplicates(),))
    with pytest.raises(ConfigError, match="was built with other settings"):
        chat_build.build(other, quiet())


def test_the_order_of_packing_is_the_seeds(root, tokenizer, talks, built):
    """Red if `shuffle` is ignored, or the order depends on anything but the seed."""
    digests = {}
    for name, fields in {
        "again": {},
        "seed": {"seed": 1},
        "plain": {"shuffle": False},
    }.items():
        made = chat_build.build(config(root, talks, name, rows_multiple=4, **fields), quiet())
        digests[name] = made["sources"]["chat"]["splits"]["train"]["digest"]
    assert digests["again"] == built["sources"]["chat"]["splits"]["train"]["digest"]
    assert len(set(digests.values())) == 3


def test_lemur_compat(root, tokenizer, talks):
    """Red if the end token is missing or learnt, or a row's conversations are isolated."""
    made = chat_build.build(
        config(root, talks, "compat", packing="lemur_compat", shuffle=False), quiet()
    )
    store = RowStore(root / "compat" / "chat" / "train")
    tokens, segments, loss = store.read(range(store.rows))
    assert segments.max() == 1
    ends = tokens == tokenizer.eos_id
    assert ends.sum() == made["chat"]["splits"]["train"]["conversations"]
    assert loss[ends].sum() == 0 and loss.sum() > 0
    assert made["chat"]["packing"] == "lemur_compat"


def test_long_conversations_can_be_dropped(root, tokenizer, talks):
    """Red if "drop" truncates, or is not counted."""
    made = chat_build.build(config(root, talks, "drop", long_conversations="drop"), quiet())
    counts = made["chat"]["splits"].values()
    assert sum(c["dropped"] for c in counts) == 6
    assert sum(c["conversations"] for c in counts) == 54


def bad_file(root):
    good = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    records = [
        good | {"split": "train"},
        good | {"split": "validation"},
        {"messages": good["messages"][:1], "split": "train"},
        {"messages": [{"role": "tool", "content": "x"}], "split": "train"},
    ]
    path = root / "bad.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "{\n")
    return ChatSourceConfig(name="b", files=(str(path),), format="messages", split_key="split")


def test_bad_records_stop_the_build_by_default(root, tokenizer):
    """Red if `refused.check` is not called, or stops at the first; nothing may be left behind."""
    with pytest.raises(ConfigError) as caught:
        chat_build.build(config(root, None, "bad", sources=(bad_file(root),)), quiet())
    text = str(caught.value)
    for said in ("bad.jsonl:3: no assistant turn", "bad.jsonl:4: unknown role 'tool'",
                 "bad.jsonl:5: not JSON", "3 records", "bad_records='count'"):  # fmt: skip
        assert said in text
    assert not (root / "bad").exists()


def test_bad_records_can_be_counted(root, tokenizer):
    """Red if `bad_records` is ignored, or the manifest and the table lose a reason."""
    console = Console(record=True, width=200, file=io.StringIO())
    made = chat_build.build(
        config(root, None, "counted", sources=(bad_file(root),), bad_records="count"), console
    )
    assert made["chat"]["refused"]["b"] == {
        "no assistant turn": 1,
        "unknown role 'tool'": 1,
        "not JSON": 1,
    }
    shown = console.export_text()
    assert "refused, b: 1 x unknown role 'tool'" in shown and "b: bad.jsonl:5: not JSON" in shown


def test_masks_of_everything_are_bad_records(root, tokenizer):
    """Red if `SplitWriter` does not ask `Rendered.fault`."""
    path = root / "all.jsonl"
    path.write_text(json.dumps({"prompt": "", "completion": "x"}) + "\n")
    source = ChatSourceConfig(name="all", files=(str(path),), format="prompt_completion")
    with pytest.raises(ConfigError, match="all.jsonl:1: mask of 100 %"):
        chat_build.build(config(root, None, "all", sources=(source,)), quiet())


def test_an_empty_split_is_named(root, tokenizer, talks):
    """Red if `_check_splits` goes: training would divide by no held-out token."""
    source = ChatSourceConfig(name="talks", files=(str(talks),), format="messages")
    with pytest.raises(ConfigError, match="split 'validation'"):
        chat_build.build(config(root, None, "empty", sources=(source,)), quiet())
    assert not (root / "empty").exists()


def test_one_question_is_on_one_side(root, tokenizer):
    """Red if the split hashes the place and not the question."""
    path = root / "same.jsonl"
    records = [
        {"messages": [{"role": "user", "content": f"Question {n // 4}"},
                      {"role": "assistant", "content": f"Answer {n}"}]}
        for n in range(80)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    chat_build.build(config(root, path, "sides"), quiet())
    questions = {
        split: {tokenizer.decode(ids).split("Answer")[0] for ids, _ in found.values()}
        for split in ("train", "validation")
        for found in [stored(root, "sides", split)]
    }
    assert not questions["train"] & questions["validation"]
    assert len(questions["train"]) + len(questions["validation"]) == 20


def test_a_held_out_copy_goes_and_the_training_one_stays(root, tokenizer):
    """Red if cleaning sees conversations in the order of the file: held-out text would train."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    other = [turns[0], {"role": "assistant", "content": "B"}]
    records = [
        {"messages": turns, "split": "validation"},
        {"messages": turns, "split": "train"},
        {"messages": other, "split": "validation"},
    ]
    path = root / "copies.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = ChatSourceConfig(name="c", files=(str(path),), format="messages", split_key="split")
    steps = (clean.DropExactDuplicates(),)
    chat_build.build(config(root, None, "copies", sources=(source,), steps=steps), quiet())
    assert list(stored(root, "copies", "train")) == ["c/copies.jsonl:2"]
    assert list(stored(root, "copies", "validation")) == ["c/copies.jsonl:3"]


def test_most_takes_a_seeded_choice(root, tokenizer, talks):
    """Red if `most` takes the first ones, or is ignored."""
    source = ChatSourceConfig(
        name="talks", files=(str(talks),), format="messages", validation_fraction=0.2, most=20
    )
    made = chat_build.build(config(root, None, "most", sources=(source,)), quiet())
    assert made["chat"]["read"] == {"talks": 20}
    found = stored(root, "most", "train") | stored(root, "most", "validation")
    assert max(int(path.rsplit(":", 1)[1]) for path in found) > 20


def test_all_settings_that_are_wrong_are_named_at_once():
    """Red if a check of ChatBuildConfig or ChatSourceConfig goes."""
    with pytest.raises(ConfigError) as caught:
        ChatSourceConfig(
            name="a/b", files=(), format="x", paths="y", most=0,
            validation_fraction=0.5, split_key="split",
        )  # fmt: skip
    assert len(caught.value.problems) == 6
    good = ChatSourceConfig(name="a", files=("x",), format="messages")
    with pytest.raises(ConfigError) as caught:
        ChatBuildConfig(
            path="", tokenizer="", sources=(good, good), sequence_length=1, chat_format="x",
            packing="lemur_compat", long_conversations="x", bad_records="x", rows_multiple=0,
            window=500, threads=-1,
            steps=("x", clean.DropExactDuplicates(sources=("nobody",))),
        )  # fmt: skip
    assert len(caught.value.problems) == 12


def test_the_command_and_its_presets(root, tokenizer, talks, capsys):
    """Red if cli_data forgets a class, or a preset names a field that is gone."""
    binding = [f'--gin.ChatBuildConfig.path="{root / "cli"}"']
    binding += [f'--gin.ChatBuildConfig.tokenizer="{root / "tokenizer"}"']
    binding += ["--gin.ChatBuildConfig.sequence_length=160"]
    binding += ["--gin.ChatBuildConfig.sources=(@s/ChatSourceConfig(),)"]
    binding += ["--gin.ChatBuildConfig.steps=(@DropExactDuplicates(),)"]
    binding += [f'--gin.s/ChatSourceConfig.files=("{talks}",)', '--gin.s/ChatSourceConfig.name="s"']
    binding += ['--gin.s/ChatSourceConfig.format="messages"']
    binding += ["--gin.s/ChatSourceConfig.validation_fraction=0.2"]
    assert cli.main(["data", "chat", *binding]) == 0
    assert read_manifest(str(root / "cli"))["chat"]["removed"][0]["seen"] == 60
    assert cli.main(["data", "inspect", str(root / "cli"), "--rows=1"]) == 0
    assert "<|im_end|>" in capsys.readouterr().out
    assert cli.main(["data", "chat", *binding, '--gin.ChatBuildConfig.packing="x"']) == 2
    names = ("DATA", "TOKENIZER", "OASST", "OPENORCA", "SHAREGPT", "EVOL_CODE")
    classes = [ChatBuildConfig, ChatSourceConfig, *clean.STEPS]
    loaded, _ = settings.load(
        ChatBuildConfig, ["data/lemur_chat.gin"], [f'{name}="/x"' for name in names], classes
    )
    assert [source.name for source in loaded.sources] == [
        "oasst", "openorca", "sharegpt", "evol_code"
    ]  # fmt: skip
    assert loaded.rows_multiple == 128 and len(loaded.steps) == 4


def test_the_format_travels_and_transformers_template_agrees(root, tokenizer, built):
    """Red if write_format is not called, or the template differs from the renderer."""
    import jinja2

    found = template.Tokenizer.load(root / "data" / "tokenizer")
    assert template.format_of(found).name == "chatml"
    text = (root / "data" / "tokenizer" / template.JINJA).read_text()
    turns = [Message("system", " S "), Message("user", "Q\n"), Message("assistant", "A")]
    spelled = (
        jinja2.Environment()
        .from_string(text)
        .render(
            bos_token="<s>", messages=[turn._asdict() for turn in turns], add_generation_prompt=True
        )
    )
    parts = formats.parts_of(Conversation(tuple(turns), "x"), formats.FORMATS["chatml"], answer="")
    expected = "".join(
        part.text if isinstance(part, formats.Text) else {"bos": "<s>"}.get(part.token, part.token)
        for part in parts
    )
    assert spelled == expected


@pytest.mark.slow
def test_transformers_makes_the_same_ids(root, tokenizer, built):
    """Red if the template has other text, or transformers reads other specials from our files."""
    import transformers

    directory = root / "data" / "tokenizer"
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    turns = (Message("system", "S"), Message("user", " Q\n"), Message("assistant", "A"))
    talk = Conversation((*turns, Message("user", "More")), "x")
    ours = formats.render([talk], formats.FORMATS["chatml"], tokenizer, answer="")[0]
    made = theirs.apply_chat_template(
        [message._asdict() for message in talk.messages],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert made == list(ours.ids)


def test_docstring_conversations(tmp_path):
    """Red if the body or the docstring is cut wrongly, or a held-out file trains."""
    source = (
        "def add(a, b=1):\n"
        '    """Return the sum of the two numbers, which must not be negative."""\n'
        "    total = a + b\n"
        "    return check_that_it_is_fine(total)\n"
    )
    what, write = docstrings.conversations(source)
    summary = "Return the sum of the two numbers, which must not be negative."
    assert what == ("what", "add", "What does this function do?\n\ndef add(a, b=1):", summary)
    assert write[3] == "total = a + b\nreturn check_that_it_is_fine(total)"
    assert list(docstrings.conversations("def broken(:")) == []
    records = [{"text": source.replace("add", name), "path": f"{name}.py", "split": split}
               for name, split in (("add", "train"), ("sum_up", "validation"))]  # fmt: skip
    code = tmp_path / "code.jsonl"
    code.write_text("".join(json.dumps(record) + "\n" for record in records))
    counts = docstrings.write(code, tmp_path / "out.jsonl")
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(made) == sum(counts.values()) == 2  # the same answers again are left out
    assert all(r["split"] == {"add.py": "train", "sum_up.py": "validation"}[r["path"].split(":")[0]]
               for r in made)  # fmt: skip


def test_windows_do_not_change_what_is_stored(root, tokenizer, talks):
    """Red if the last window, or the one before it, is forgotten."""
    chat_build.build(config(root, talks, "windows", window=7), quiet())
    one, many = stored(root, "data", "train"), stored(root, "windows", "train")
    assert one == many


def test_what_was_refused_is_said_before_an_empty_split(root, tokenizer, tmp_path):
    """Red if a build without conversations ends before `show_left_out`."""
    (tmp_path / "x.jsonl").write_text('{"messages": 5}\n{"messages": []}\n')
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(ConfigError, match="no conversation for split 'train'"):
        chat_build.build(config(root, tmp_path / "x.jsonl", "none", bad_records="count"), console)
    said = console.file.getvalue()
    assert said.count("refused, talks: 1 x") == 2 and "x.jsonl:1" in said
