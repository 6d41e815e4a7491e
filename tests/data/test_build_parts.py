"""Parts: the same data set from any number of workers, through kills, repairs and changes."""

import dataclasses
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_build import config_of, source
from test_rows import reconstruct

from lemur_jax import cli
from lemur_jax.config import ConfigError, DataConfig
from lemur_jax.data import location, manifest, worker
from lemur_jax.data.batch import make_batch
from lemur_jax.data.build import build, existing
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.data.store import RowStore
from lemur_jax.data.tokenizer import Tokenizer

SHARDS = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory, records):
    """12 files of the corpus."""
    folder = tmp_path_factory.mktemp("shards")
    for n in range(SHARDS):
        lines = [
            json.dumps(record) for record in records["code"][: len(records["code"]) // 3][n::SHARDS]
        ]
        (folder / f"{n:02d}.jsonl").write_text("\n".join(lines))
    return folder


def config_over(shards, root, tokenizer, **fields):
    fields = {"part_bytes": 1, "workers": 1, "path": str(root)} | fields
    of = source(str(shards / "*.jsonl"), validation_fraction=0.1)
    return config_of(root.parent, tokenizer, of, **fields)


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory, tokenizer, quiet):
    """The data set of an uninterrupted build in one process, and its manifest."""
    root = tmp_path_factory.mktemp("whole") / "data"
    return root, build(config_over(shards, root, tokenizer), quiet)


def same_files(a, b):
    def files(root):
        found = {p.relative_to(root): p for p in root.rglob("*") if p.is_file()}
        return {name: path.read_bytes() for name, path in found.items() if name.name != "lock"}

    return files(a) == files(b)


def test_one_part_a_shard(whole, shards, tokenizer):
    """Red if `groups` puts all shards in one part, or leaves the last shards out."""
    root, about = whole
    train = about["sources"]["code"]["splits"]["train"]
    assert [part["name"] for part in train["parts"]] == [f"part-{n:05d}" for n in range(SHARDS)]
    store = manifest.open_store(str(root), about, "code", "train")
    held = manifest.open_store(str(root), about, "code", "validation")
    paths = [store.path(n) for n in range(store.documents)]
    paths += [held.path(n) for n in range(held.documents)]
    expected = [
        json.loads(line)["path"] for f in shards.iterdir() for line in f.read_text().split("\n")
    ]
    assert sorted(paths) == sorted(expected)
    assert train["digest"] == store.digest() and train["rows"] == store.rows
    assert train["fill"] == round((store.read(range(store.rows)).segments != 0).mean(), 6) > 0.98
    larger = config_over(shards, root, tokenizer, part_bytes=10**6)
    groups = manifest.plan(larger, tokenizer)[1]["code"]
    assert 1 < len(groups) < SHARDS
    assert all(sum(s.bytes for s in group.shards) >= 10**6 for group in groups[:-1])


def test_any_number_of_workers(whole, shards, tmp_path, tokenizer, quiet):
    """Red if entries are kept in the order in which they were finished."""
    config = config_over(shards, tmp_path / "data", tokenizer, workers=3)
    assert build(config, quiet) == whole[1]
    assert same_files(whole[0], tmp_path / "data")


GIN = """
BuildConfig.path = '{root}'
BuildConfig.tokenizer = '{tokenizer}'
BuildConfig.sequence_length = 32
BuildConfig.part_bytes = 1
BuildConfig.workers = {workers}
BuildConfig.sources = (@SourceConfig(),)
SourceConfig.name = 'code'
SourceConfig.rate = 1.0
SourceConfig.train_files = ('{shards}/*.jsonl',)
SourceConfig.validation_fraction = 0.1
"""
COMMAND = (
    "import sys\n"
    "from lemur_jax import settings\n"
    "from lemur_jax.data.build import BuildConfig, build\n"
    "from lemur_jax.data.sources import SourceConfig\n"
    "if __name__ == '__main__':\n"
    "    build(settings.load(BuildConfig, sys.argv[1:], [], [BuildConfig, SourceConfig])[0])\n"
)


def test_killed_and_run_again(whole, shards, tmp_path, tokenizer):
    """Red if a part is taken for finished that has no journal entry, the entry is written before
    the part, or a worker outlives its parent (`watch`)."""
    root, script = tmp_path / "data", tmp_path / "build.py"
    script.write_text(COMMAND)
    kept = []
    for attempt, workers in enumerate((2, 1, 3)):
        text = GIN.format(root=root, tokenizer=tokenizer.directory, shards=shards, workers=workers)
        (tmp_path / "b.gin").write_text(text)
        command = [sys.executable, str(script), str(tmp_path / "b.gin")]
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen(command, start_new_session=True, stderr=said)
        if attempt < 2:
            while len(list(root.glob("journal/code/*.json"))) < 3 * (attempt + 1):
                assert process.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)  # the parent alone
            process.wait()
            wait_until_nobody(process.pid)
            kept.append(len(list(root.glob("journal/code/*.json"))))
            assert not (root / "manifest.json").exists()
        else:
            assert process.wait() == 0, (tmp_path / "said").read_text()
            said = (tmp_path / "said").read_text()
            assert f"{kept[-1]} of {SHARDS} parts are finished already" in said
    assert 3 <= kept[0] < SHARDS and 6 <= kept[1] < SHARDS
    assert same_files(whole[0], root)


def wait_until_nobody(session):
    """Waits until every process of a session is gone; workers notice that their parent is."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = subprocess.run(["ps", "-s", str(session), "-o", "pid=,stat="], capture_output=True)
        if all(" Z" in line for line in found.stdout.decode().splitlines()):
            return
        time.sleep(0.02)
    for line in found.stdout.decode().splitlines():
        os.kill(int(line.split()[0]), signal.SIGKILL)
    raise AssertionError(f"workers outlive their parent: {found.stdout}")


def test_a_removed_or_damaged_part_is_built_again(whole, shards, tmp_path, tokenizer, quiet):
    """Red if `build` returns the manifest without `_is_whole`, or `_whole_entry` trusts the
    journal."""
    root = tmp_path / "data"
    shutil.copytree(whole[0], root)
    config = config_over(shards, root, tokenizer)
    assert existing(config) == whole[1]
    shutil.rmtree(root / "code" / "train" / "part-00003")
    (root / "code" / "train" / "part-00005" / "tokens" / "c" / "0" / "0").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"part-00003' is missing(.|\n)*part-00005' is damaged"):
        manifest.open_store(str(root), whole[1], "code", "train")
    assert existing(config) is None
    console = Console(record=True, file=io.StringIO())
    assert build(config, console) == whole[1]
    assert f"{SHARDS - 2} of {SHARDS} parts are finished" in console.export_text()
    assert same_files(whole[0], root)


def test_an_input_that_changed_meanwhile(whole, shards, tmp_path, tokenizer, quiet):
    """Red if a group's key leaves out the fingerprints of its shards, or parts beyond the plan
    stay in the directory."""
    copy, root = tmp_path / "shards", tmp_path / "data"
    shutil.copytree(shards, copy)
    shutil.copytree(whole[0], root)
    (root / "manifest.json").unlink()  # as if the build had been killed
    (copy / "11.jsonl").unlink()
    with open(copy / "03.jsonl", "a") as file:
        file.write("\n" + json.dumps({"text": "one more document"}))
    about = build(config_over(copy, root, tokenizer), quiet)
    fresh = build(config_over(copy, tmp_path / "fresh", tokenizer), quiet)
    assert about == fresh and same_files(root, tmp_path / "fresh")
    old = [part["digest"] for part in whole[1]["sources"]["code"]["splits"]["train"]["parts"]]
    new = [part["digest"] for part in about["sources"]["code"]["splits"]["train"]["parts"]]
    assert [n for n in range(SHARDS - 1) if old[n] != new[n]] == [3]


def test_other_settings_are_refused(whole, shards, tmp_path, tokenizer, quiet):
    """Red if an unfinished build goes on with another tokenizer or other options."""
    root = tmp_path / "data"
    shutil.copytree(whole[0], root)
    (root / "manifest.json").unlink()
    other = tmp_path / "other"
    tokenizer.save(other)
    spec = {"added_tokens_decoder": {str(tokenizer.vocab_size): {"content": "<new>"}}}
    (other / "tokenizer_config.json").write_text(json.dumps(spec))
    (other / "tokenizer.json").unlink(missing_ok=True)
    for fields, word in (
        ({"bos_eos": "eos"}, "bos_eos"),
        ({"sequence_length": 64}, "sequence_length"),
        ({"part_bytes": 7}, "part_bytes"),
    ):
        with pytest.raises(ConfigError, match=f"was built with other {word}: nothing was touched"):
            build(config_over(shards, root, tokenizer, **fields), quiet)
    with pytest.raises(ConfigError, match="other tokenizer_fingerprint, vocab_size: nothing was"):
        build(config_over(shards, root, Tokenizer.load(other)), quiet)


def test_verify(whole, tmp_path, capsys):
    """Red if digests are not computed again, or a part of another build passes."""
    root = tmp_path / "data"
    shutil.copytree(whole[0], root)
    splits = whole[1]["sources"]["code"]["splits"]
    total = sum(len(split["parts"]) for split in splits.values()) + 1  # the tokenizer
    held = splits["validation"]["parts"][0]["name"]
    assert cli.main(["data", "verify", str(root)]) == 0
    assert f"{total} of {total} parts are as the manifest" in capsys.readouterr().out
    paths = root / "code" / "train" / "part-00002" / "path_bytes" / "c" / "0"
    paths.write_bytes(paths.read_bytes()[:-9] + b"x" + paths.read_bytes()[-8:])
    swapped = root / "code" / "train" / "part-00004"
    shutil.rmtree(swapped)
    shutil.copytree(root / "code" / "train" / "part-00006", swapped)
    (root / "code" / "validation" / held / "part.json").unlink()
    assert cli.main(["data", "verify", str(root)]) == 1
    said = capsys.readouterr().out
    assert "DAMAGED code/train/part-00002" in said and "path_bytes" in said
    assert "DAMAGED code/train/part-00004: digest of tokens" in said
    assert f"DAMAGED code/validation/{held}: part.json is missing" in said
    assert f"{total - 3} of {total} parts" in said


def test_two_at_a_time(whole, shards, tmp_path, tokenizer, quiet):
    """Red if `_alone` does not lock, or its lock alone is taken for somebody's directory."""
    root = tmp_path / "data"
    (root / "journal").mkdir(parents=True)
    with open(root / "journal" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is being built by another process: wait"):
            build(config_over(shards, root, tokenizer), quiet)
    # What a build that was killed in its first moments leaves is no obstacle.
    assert existing(config_over(shards, root, tokenizer)) is None


def test_into_object_storage(whole, shards, tokenizer, quiet):
    """Red if anything of a build goes through pathlib. memory:// stands for gs:// and s3://."""
    config = config_over(shards, Path("x"), tokenizer, path="memory://bucket/data")
    about = build(config, quiet)
    assert existing(config) == about
    for split, counts in about["sources"]["code"]["splits"].items():
        assert counts["digest"] == whole[1]["sources"]["code"]["splits"][split]["digest"]
    store = manifest.open_store(config.path, about, "code", "train")
    local = manifest.open_store(str(whole[0]), whole[1], "code", "train")
    there, here = (
        Pipeline(DataConfig(path=path, batch_size=3, sequence_length=T)).batch(5)
        for path in (config.path, str(whole[0]))
    )
    assert all(np.array_equal(a, b) for a, b in zip(there, here, strict=True))
    assert not any(wrong for _, wrong in manifest.verify(config.path))
    assert np.array_equal(store.read([5, 1000]).tokens, local.read([5, 1000]).tokens)
    location.remove("memory://bucket")


def lines_of(texts, folder, name="f.jsonl"):
    folder.mkdir(parents=True)
    (folder / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(folder / name)


T = 32
WORD = st.sampled_from(["a", "def", " ", "\n", "0", "é", "\t"])
DOCUMENT = st.one_of(st.just(""), st.just("a"), st.lists(WORD, max_size=10 * T).map("".join))


# Not shrunk: each example is a build.
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    texts=st.lists(DOCUMENT, min_size=1, max_size=8),
    bos_eos=st.sampled_from(["both", "bos", "eos", "none"]),
)
def test_every_token_but_the_first_is_a_target_once(
    tmp_path_factory, tokenizer, quiet, texts, bos_eos
):
    """Red if an empty document is packed, or BOS and EOS do not follow `bos_eos`."""
    root = tmp_path_factory.mktemp("build")
    of = source(
        lines_of([*texts, "kept"], root / "in"), validation_files=lines_of(["v"], root / "v")
    )
    about = build(config_of(root, tokenizer, of, workers=1, bos_eos=bos_eos), quiet)
    store = RowStore(root / "data" / "code" / "train")
    bos, eos = bos_eos in ("both", "bos"), bos_eos in ("both", "eos")
    kept = [text for text in [*texts, "kept"] if text]
    expected = [tokenizer.encode(text, bos=bos, eos=eos) for text in kept]
    batch = make_batch(*store.read(range(store.rows))[:2])
    targets = batch.targets[batch.weights == 1].tolist()
    assert targets == [token for ids in expected for token in ids[1:]]
    assert reconstruct(store) == expected
    assert about["sources"]["code"]["counts"]["empty"] == len(texts) + 1 - len(kept)


def test_truncate_counts_what_it_cuts(tmp_path, tokenizer, quiet):
    """Red if documents of exactly a row are cut, or the count is of documents only."""
    ids = [tokenizer.encode("a " * n, bos=True, eos=True) for n in (2, 29, 200)]
    of = source(
        lines_of(["a " * n for n in (2, 29, 200)], tmp_path / "in"),
        validation_files=lines_of(["v"], tmp_path / "v"),
    )
    config = config_of(tmp_path, tokenizer, of, workers=1, split_documents="truncate")
    counts = build(config, quiet)["sources"]["code"]["counts"]
    assert reconstruct(RowStore(tmp_path / "data/code/train")) == [i[: T + 1] for i in ids]
    assert counts["truncated"] == 1 and counts["truncated_tokens"] == len(ids[2]) - T - 1


def test_documents_of_only_unknown_tokens_are_counted(tmp_path, tokenizer, quiet, monkeypatch):
    """Red if they are dropped without a count, or a document with one known token is dropped."""
    unknown = [np.array(ids, np.int32) for ids in ([1, 0, 0, 2], [1, 0, 77, 2], [1, 5, 2])]

    def encode(_, texts, *__):
        return [unknown[int(text)] for text in texts]

    monkeypatch.setattr(worker.Tokenizer, "encode_arrays", encode)
    files = lines_of(["0", "1", "2"], tmp_path / "in")
    of = source(files, validation_files=lines_of(["2"], tmp_path / "v"))
    about = build(config_of(tmp_path, tokenizer, of, workers=1), quiet)
    assert about["sources"]["code"]["counts"]["only_unknown"] == 1
    found = reconstruct(RowStore(tmp_path / "data" / "code" / "train"))
    assert found == [unknown[1].tolist(), unknown[2].tolist()]


def test_a_tokenizer_without_bos(tmp_path, tokenizer, quiet):
    """Red if the policy is not compared with the tokenizer before anything is read."""
    bare = Tokenizer.load(tokenizer.directory)
    bare.bos_id = None
    of = source(
        lines_of(["a", "b"], tmp_path / "in"), validation_files=lines_of(["v"], tmp_path / "v")
    )
    for policy in ("both", "bos"):
        config = config_of(tmp_path, tokenizer, of, bos_eos=policy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tokenizer, "load", lambda _: bare)
            with pytest.raises(
                ConfigError, match=f"bos_eos='{policy}'.*bos_token=None.*bos_eos to"
            ):
                build(config, quiet)
    assert not (tmp_path / "data").exists()


def test_an_error_in_a_worker_keeps_finished_parts(shards, tmp_path, tokenizer, quiet):
    """Red if the ConfigError of a worker loses its words, the first one stops the other parts, or
    `_leave` removes finished parts."""
    copy, root = tmp_path / "shards", tmp_path / "data"
    shutil.copytree(shards, copy)
    (copy / "11.jsonl").write_text("not json")
    with pytest.raises(ConfigError, match=r"11.jsonl' line 1 is not JSON"):
        build(config_over(copy, root, tokenizer, workers=1), quiet)
    assert len(list(root.glob("journal/code/*.json"))) == SHARDS - 1
    (copy / "02.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"line 1 .*(.|\n)*line 1 ") as error:
        build(config_over(copy, tmp_path / "two", tokenizer, workers=2), quiet)
    said = sorted(error.value.problems)
    assert len(said) == 2 and "02.jsonl" in said[0] and "11.jsonl" in said[1]
    assert len(list((tmp_path / "two").glob("journal/code/*.json"))) == SHARDS - 2
    shutil.copytree(shards, copy, dirs_exist_ok=True)
    build(config_over(copy, root, tokenizer), quiet)
    assert (root / "manifest.json").exists()


def test_bad_and_filtered_records_are_counted(tmp_path, tokenizer):
    """Red if the report of a worker's reading is lost, or the limit is of one part only."""
    for n in range(3):
        lines = ['{"text": "kept", "stars": 9}', '{"text": "left out", "stars": 1}', "broken", "{}"]
        (tmp_path / f"{n}.jsonl").write_text("\n".join(lines))
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "v.jsonl").write_text('{"text": "held out", "stars": 7}')
    about = {"validation_files": str(tmp_path / "v" / "*"), "bad_records": "count"}
    about["where"] = "stars >= 5"
    files = str(tmp_path / "*.jsonl")
    with pytest.raises(ConfigError, match=r"6 bad records, .*max_bad_records=5"):
        of = source(files, max_bad_records=5, **about)
        build(config_of(tmp_path, tokenizer, of, part_bytes=1, workers=1), Console(quiet=True))
    console = Console(record=True, file=io.StringIO())
    config = config_of(tmp_path, tokenizer, source(files, **about), part_bytes=1, workers=1)
    config = dataclasses.replace(config, path=str(tmp_path / "again"))
    counts = build(config, console)["sources"]["code"]["counts"]
    assert (counts["filtered"], counts["bad"]) == (3, 6)
    assert "filtered 3, bad 6" in console.export_text(clear=False)
    assert "0.jsonl' line 3" in console.export_text().replace("record 3", "line 3")


def test_large_inputs_are_fingerprinted_by_windows(tmp_path, monkeypatch):
    """Red if the last bytes, the size or a change in place do not count."""
    monkeypatch.setattr(manifest, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(manifest, "WINDOW_BYTES", 50)
    file, found = tmp_path / "f", set()
    for data in (b"a" * 900, b"a" * 1100, b"a" * 1099 + b"b", b"b" + b"a" * 1099, b"a" * 1101):
        file.write_bytes(data)
        found.add(manifest.fingerprint(str(file)))
        assert manifest.fingerprint(str(file)) in found
    assert len(found) == 5 and manifest.fingerprint(str(tmp_path)) == ""


def test_a_tokenizer_that_changes_meanwhile(shards, tmp_path, tokenizer):
    """Red if `_tokenizer` does not compare: some parts would have other ids."""
    config = config_over(shards, tmp_path / "data", tokenizer)
    group = manifest.plan(config, tokenizer)[1]["code"][0]
    work = worker.Work(config, config.sources[0], group, fingerprint="of another")
    with pytest.raises(ConfigError, match=r"BuildConfig.tokenizer=.* changed while .*restore"):
        worker.build_group(work, lambda _: None)
