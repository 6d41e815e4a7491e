"""The pipeline: batch(step) is one function, whoever asks and whenever."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_data
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.config import ConfigError, DataConfig
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.data.sources import documents
from lemur_jax.data.store import RowStore, RowsWriter

B, T = 11, 128


@pytest.fixture(scope="module")
def pipeline(data_dir):
    return Pipeline(DataConfig(path=data_dir, batch_size=B, sequence_length=T))


def open_with(data_dir, **fields):
    return Pipeline(
        DataConfig(**{"path": data_dir, "batch_size": B, "sequence_length": T} | fields)
    )


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_ten_to_one_in_tokens(pipeline):
    """Red if rates are taken as shares of documents, or of rows of unequal length."""
    tokens = {"code": 0, "text": 0}
    for step in range(100):
        batch = pipeline.batch(step)
        for row, (source, _, _) in enumerate(pipeline.places(step)):
            tokens[source] += int((batch.segment_ids[row] != 0).sum())
    # Only the last row of a store is not full: far below 1 % of 1,100 rows.
    assert tokens["code"] / tokens["text"] == pytest.approx(10, rel=0.01)


def test_hosts_read_parts_of_one_global_batch(pipeline):
    """Red if `rows` counts its positions from 0 on each host."""
    for step in (0, 7, 10**9):
        whole = pipeline.batch(step)
        assert whole.inputs.shape == (B, T) and whole.inputs.dtype == np.int32
        parts = [pipeline.rows(step, start, stop) for start, stop in ((0, 4), (4, 4), (4, 11))]
        for n, array in enumerate(whole):
            assert np.array_equal(array, np.concatenate([part[n] for part in parts]))
    with pytest.raises(ValueError, match=r"rows \[4, 12\).*batch_size=11"):
        pipeline.rows(0, 4, 12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    hosts=st.sampled_from([1, 2, 3, 4, 8]), step=st.integers(0, 10**9), seed=st.integers(0, 2**31)
)
def test_any_hosts_read_one_global_batch(data_dir, hosts, step, seed):
    """Red if a host's rows depend on how many hosts there are: uneven splits, any seed and step."""
    pipeline = open_with(data_dir, seed=seed)
    cuts = [host * B // hosts for host in range(hosts + 1)]
    parts = [pipeline.rows(step, *part) for part in itertools.pairwise(cuts)]
    together = [np.concatenate(arrays) for arrays in zip(*parts)]
    assert all(map(np.array_equal, together, pipeline.batch(step)))


def test_a_loss_mask_is_honoured(tmp_path, tokenizer):
    """Red if `loss` is dropped between store and batch, or shifted against the targets; and with
    one segment for a whole row (lemur_compat) positions must run on."""
    rng = np.random.default_rng(0)
    path = small_data.make(tmp_path, {"chat": small_data.texts([40, 30])}, tokenizer, {"chat": 1.0})
    part = Path(path) / "chat" / "train" / "part-00000"
    shutil.rmtree(part)
    writer = RowsWriter(part, small_data.T, tokenizer.vocab_size, loss=True)
    tokens = rng.integers(1, 1000, (5, small_data.T + 1))
    segments, loss = np.ones_like(tokens), rng.integers(0, 2, tokens.shape)
    segments[3, 12:], tokens[3, 12:] = 0, 0
    for name in ("a", "b"):
        writer.add_document(name)
    writer.append_rows(tokens, segments, np.array([[0, 1]] * 5), loss)
    about = writer.close() | {"name": "part-00000"}
    manifest = json.loads((Path(path) / "manifest.json").read_text())
    manifest["sources"]["chat"]["splits"]["train"] |= {"rows": 5, "parts": [about]}
    (Path(path) / "manifest.json").write_text(json.dumps(manifest))
    pipeline = Pipeline(small_data.config(path, 5))
    batch = pipeline.batch(0)
    for row, place in enumerate(pipeline.places(0)):
        counts = loss[place.row, 1:] * (segments[place.row, 1:] != 0)
        assert batch.weights[row].tolist() == counts.tolist()
        real = segments[place.row, :-1] != 0
        assert batch.positions[row][real].tolist() == list(range(real.sum()))


def test_unknown_tokens_are_tokens(tmp_path, tokenizer):
    """Red if id 0 counts as padding: a document of only <unk> would vanish."""
    path = small_data.make(tmp_path, {"code": [[0] * 33, [0]]}, tokenizer, {"code": 1.0})
    batch = Pipeline(small_data.config(path, 3)).batch(0)  # one epoch: three rows
    assert batch.weights.sum() == 32 and (batch.segment_ids != 0).sum() == 33


def test_one_epoch_is_every_row_once(pipeline, data_dir):
    """Red if a batch skips or repeats positions: e.g. step * (batch_size - 1)."""
    store = RowStore(Path(data_dir) / "text" / "train")
    seen = []
    step = 0
    while len(seen) < store.rows:
        seen += [row for source, row, _ in pipeline.places(step) if source == "text"]
        step += 1
    assert sorted(seen[: store.rows]) == list(range(store.rows))


def test_provenance_is_true(pipeline, build_config, tokenizer):
    """Red if `documents_of` or `path` is off by one: the row's tokens are then not the file's."""
    texts = {
        (config.name, d.path): tokenizer.encode(d.text, bos=True, eos=True)
        for config in build_config.sources
        for d in documents(config)
        if d.split == "train"
    }
    batch = pipeline.batch(2)
    for row, (source, _, paths) in enumerate(pipeline.provenance(2)):
        # The last token of a row is no input: one more document may begin there.
        assert len(paths) - batch.segment_ids[row].max() in (0, 1)
        for segment, path in enumerate(paths, 1):
            part = batch.inputs[row][batch.segment_ids[row] == segment]
            whole = np.array(texts[source, path], np.int32)
            windows = np.lib.stride_tricks.sliding_window_view(whole, len(part))
            assert len(part) == 0 or (windows == part).all(axis=1).any()


def test_new_pipeline_gives_the_same_batches(pipeline, data_dir):
    """Red if a batch depends on what was read before, or on dict order in the manifest."""
    pipeline.batch(0)
    assert same(open_with(data_dir).batch(41), pipeline.batch(41))
    assert not same(open_with(data_dir, seed=1).batch(41), pipeline.batch(41))


def test_evaluation_counts_every_held_out_target_once(pipeline, data_dir):
    """Red if the last batch repeats rows instead of padding, or is left out."""
    manifest = json.loads((Path(data_dir) / "manifest.json").read_text())
    for source in pipeline.sources:
        counts = manifest["sources"][source]["splits"]["validation"]
        n = pipeline.evaluation_batches(source)
        batches = [pipeline.evaluation(source, index) for index in range(n)]
        assert all(batch.inputs.shape == (B, T) for batch in batches)
        weight = sum(batch.weights.sum() for batch in batches)
        assert weight == counts["tokens"] - counts["documents"]
        padding = (batches[-1].segment_ids == 0).all(axis=1).sum()
        assert padding == n * B - counts["rows"]
        assert same(batches[0], pipeline.evaluation(source, 0))
        assert pipeline.unigram_entropy(source) == counts["unigram_entropy"] > 3
        with pytest.raises(IndexError, match=f"there are {n}"):
            pipeline.evaluation(source, n)
    with pytest.raises(ConfigError, match=r"source='music'.*legal.*code"):
        pipeline.evaluation_batches("music")


def test_position_round_trip(pipeline, data_dir):
    """Red if `position` holds anything that JSON changes, or `check_position` raises on its own."""
    saved = json.loads(json.dumps(pipeline.position(123)))
    assert open_with(data_dir).check_position(saved) == 123
    assert all(isinstance(value, (int, str)) for value in saved.values())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seed": 1}, ["seed=1", "has 0", "set DataConfig.seed back"]),
        ({"batch_size": 4}, ["batch_size=4", "has 11", "set DataConfig.batch_size back"]),
    ],
)
def test_position_of_another_order(pipeline, data_dir, fields, words):
    """Red if a field is left out of the comparison in `check_position`."""
    with pytest.raises(ConfigError) as error:
        open_with(data_dir, **fields).check_position(pipeline.position(3))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("field", ["manifest", "order", "rates", "sequence_length"])
def test_position_of_other_data(pipeline, field):
    """Red if a field is left out of the comparison in `check_position`."""
    with pytest.raises(
        ConfigError, match=f"{field}=.*the checkpoint has 'old'.*or start a new run"
    ):
        pipeline.check_position(pipeline.position(3) | {field: "old"})
    with pytest.raises(ConfigError, match="has no step"):
        pipeline.check_position({})


@pytest.fixture
def copy(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "copy")
    return tmp_path / "copy"


def test_wrong_sequence_length(data_dir):
    """Red if the rows are silently cut to DataConfig.sequence_length."""
    with pytest.raises(ConfigError, match=r"sequence_length=64 .*built with 128: set it to 128"):
        open_with(data_dir, sequence_length=64)


def test_tokenizer_does_not_match(copy, pipeline):
    """Red if the copy's fingerprint is not compared with the manifest's."""
    pipeline.check_tokenizer(pipeline.tokenizer_fingerprint, "the model")
    with pytest.raises(ConfigError, match=r"fingerprint=abc of the model does not match.*build"):
        pipeline.check_tokenizer("abc", "the model")
    config = json.loads((copy / "tokenizer" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["2048"] = {"content": "<|im_end|>"}
    (copy / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"tokenizer.*does not match; restore.*build"):
        open_with(str(copy))


def test_not_a_data_set(copy, tmp_path):
    """Red if a missing or foreign manifest surfaces as KeyError or FileNotFoundError."""
    with pytest.raises(ConfigError, match=r"DataConfig.path=.*holds no data set.*lemur data build"):
        open_with(str(tmp_path))
    with pytest.raises(ConfigError, match=r"\(its manifest.json is missing\)"):
        open_with(str(tmp_path))
    manifest = json.loads((copy / "manifest.json").read_text())
    for content, fault in (("{", "is not JSON: "), ("{}", "has no format_version")):
        (copy / "manifest.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"\(its manifest.json {fault}.*lemur data build"):
            open_with(str(copy))
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ConfigError, match=r"format_version=99.*version 1 or 2: .*build it again"):
        open_with(str(copy))


def test_damaged_store(copy):
    """Red if the sizes of a part's files are not compared with the manifest."""
    shutil.rmtree(copy / "text" / "train")
    shutil.copytree(copy / "text" / "validation", copy / "text" / "train")
    with pytest.raises(ConfigError, match=r"text/train/part-00000' is damaged.*build"):
        open_with(str(copy))


def test_config_is_kept(pipeline):
    """Red if Pipeline changes its config."""
    assert dataclasses.asdict(pipeline.config)["batch_size"] == B
