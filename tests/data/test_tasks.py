"""SeqIO declares what a build reads. TensorFlow takes 13 s to import, so all of it is slow."""

import json

import pytest

from lemur_jax.config import ConfigError
from lemur_jax.data import build, sources

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seqio():
    return pytest.importorskip("seqio")


@pytest.fixture(scope="module")
def tasks(seqio):
    from lemur_jax.data import tasks

    return tasks


@pytest.fixture(scope="module")
def mixture(tasks, build_config, tokenizer):
    return tasks.register_mixture("lemur_demo", build_config.sources, tokenizer.directory)


def test_mixture_declares_ten_to_one(seqio, mixture, tasks, build_config):
    """Red if a rate is lost, or `sources_of` does not give the build's sources back."""
    declared = seqio.get_mixture_or_task("lemur_demo")
    rates = {task.name: declared.get_rate(task) for task in declared.tasks}
    assert rates == {"lemur_demo_code": 10.0, "lemur_demo_text": 1.0}
    assert tasks.sources_of("lemur_demo") == build_config.sources


@pytest.mark.parametrize("split", ["train", "validation"])
def test_task_yields_the_documents_of_the_build(seqio, mixture, build_config, tokenizer, split):
    """Red if BOS or EOS is missing, the split is ignored, or tf_text gives other ids than ours."""
    for config in build_config.sources:
        task = seqio.get_mixture_or_task(f"lemur_demo_{config.name}")
        dataset = task.get_dataset(None, split=split, shuffle=False)
        expected = [d for d in sources.documents(config) if d.split == split][:60]
        examples = list(dataset.take(60).as_numpy_iterator())
        assert len(examples) == len(expected) > 5
        for document, example in zip(expected, examples, strict=True):
            assert example["path"].decode() == document.path
            ids = tokenizer.encode(document.text, bos=True, eos=True)
            assert example["targets"].tolist() == ids


def test_mixture_feeds_a_run_directly(seqio, mixture):
    """Red if a Task cannot be mixed: SeqIO then asks for other features or splits."""
    dataset = seqio.get_mixture_or_task("lemur_demo").get_dataset(
        None, split="train", shuffle=False
    )
    examples = list(dataset.take(30).as_numpy_iterator())
    assert all(example["targets"][0] == 1 and example["targets"][-1] == 2 for example in examples)


def test_custom_task_can_be_built(seqio, tasks, tokenizer, tmp_path, quiet):
    """Red if a user's preprocessors are skipped, or run past the tokenizer."""
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        texts = [f"{split} {n}" for n in range(5)]
        return tf.data.Dataset.from_tensor_slices({"body": texts})

    vocabulary = seqio.SentencePieceVocabulary(str(tokenizer.directory / "tokenizer.model"))
    seqio.TaskRegistry.add(
        "users_own",
        source=seqio.FunctionDataSource(dataset, splits=("train", "validation")),
        preprocessors=[
            lambda ds: ds.map(lambda e: {"targets": tf.strings.upper(e["body"])}),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(vocabulary)},
    )
    found = [(d.text, d.split) for d in tasks.documents("users_own")]
    assert found == [(f"{s.upper()} {n}", s) for s in ("train", "validation") for n in range(5)]
    (source,) = tasks.sources_of("users_own")
    assert source.task == "users_own"
    config = build.BuildConfig(
        path=str(tmp_path / "data"),
        sources=(source,),
        tokenizer=str(tokenizer.directory),
        sequence_length=8,
    )
    manifest = build.build(config, quiet)
    counts = manifest["sources"]["users_own"]["splits"]["train"]
    expected = sum(len(tokenizer.encode(f"TRAIN {n}", True, True)) for n in range(5))
    assert (counts["documents"], counts["tokens"]) == (5, expected)


def test_jsonl_task(seqio, tasks, tokenizer, tmp_path):
    """Red if `files_by_split` is swapped."""
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"t": f"text of {split}"}))
    files = {split: [str(tmp_path / f"{split}.jsonl")] for split in ("train", "validation")}
    task = tasks.register_jsonl_task("jsonl_task", files, tokenizer.directory, text_key="t")
    (example,) = task.get_dataset(None, split="validation", shuffle=False).as_numpy_iterator()
    assert tokenizer.decode(example["targets"]) == "text of validation"
    with pytest.raises(ConfigError, match=r"files_by_split=\['train'\] must name"):
        tasks.register_jsonl_task("other", {"train": ["x"]}, tokenizer.directory)


def test_names_that_do_not_exist_or_exist_already(tasks, mixture, build_config, tokenizer):
    """Red if SeqIO's ValueError gets through."""
    with pytest.raises(ConfigError, match=r"mixture='nope' is not registered.*known: .*lemur_demo"):
        tasks.sources_of("nope")
    with pytest.raises(ConfigError, match=r"SourceConfig.task='nope' is not registered.*module"):
        list(tasks.documents("nope"))
    with pytest.raises(ConfigError, match=r"SourceConfig.task='no.module:x' is not registered"):
        list(tasks.documents("no.module:x"))
    with pytest.raises(ConfigError, match=r"'lemur_demo' is registered already: choose another"):
        tasks.register_mixture("lemur_demo", build_config.sources, tokenizer.directory)
