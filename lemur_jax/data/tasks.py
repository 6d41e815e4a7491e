"""SeqIO Tasks and Mixtures: where sources, preprocessors, features and rates are declared.

The only file that imports seqio and TensorFlow (13 s), so it is imported late, by those who ask
for a Task by name. Two directions:

    register_mixture    our SourceConfigs -> seqio Tasks and a Mixture
    sources_of          a registered Mixture (ours or a user's) -> SourceConfigs for a build

A SeqIO mixture draws *examples* by rate: 10:1 by document was 139:1 by token in one real mix. The
rates here are shares of tokens, and become true in `order.py`, which mixes rows of equal length.
"""

import functools
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import seqio
import tensorflow as tf

from lemur_jax.config import ConfigError
from lemur_jax.data import sources as _sources
from lemur_jax.data.files import Document
from lemur_jax.data.sources import SPLITS, SourceConfig
from lemur_jax.data.tokenizer import MODEL, Tokenizer

# What ends the part of a Task that makes text: a build tokenises by itself.
_TOKENIZERS = (seqio.preprocessors.tokenize, seqio.preprocessors.tokenize_and_append_eos)
_TEXT = tf.TensorSpec((), tf.string)


class DocumentSource(seqio.FunctionDataSource):
    """The documents of a SourceConfig as a SeqIO source of {"text", "path"} examples.

    Attributes:
      config: the SourceConfig, from which `sources_of` makes a build again.
    """

    def __init__(self, config: SourceConfig, seed: int = 0):
        self.config = config

        def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
            del shuffle_files, seed  # documents come in order; shuffling is order.py's
            read = functools.partial(self._examples, split)
            return tf.data.Dataset.from_generator(
                read, output_signature={"text": _TEXT, "path": _TEXT}
            )

        self._seed = seed
        super().__init__(dataset_fn=dataset, splits=SPLITS)

    def _examples(self, split: str) -> Iterator[dict[str, str]]:
        for document in _sources.documents(self.config, self._seed):
            if document.split == split and document.text:
                yield {"text": document.text, "path": document.path}


def prepend_bos(dataset: tf.data.Dataset, bos_id: int) -> tf.data.Dataset:
    """Puts `bos_id` in front of "targets", as the rows of a build have it."""

    def prepend(example):
        bos = tf.constant([bos_id], example["targets"].dtype)
        return example | {"targets": tf.concat([bos, example["targets"]], axis=0)}

    return dataset.map(prepend, num_parallel_calls=tf.data.AUTOTUNE)


def register_task(
    name: str, source: SourceConfig, tokenizer_dir: str | Path, seed: int = 0
) -> seqio.Task:
    """Registers a Task: text -> "targets" = BOS, ids, EOS; "path" is passed through.

    Raises ConfigError when the name is taken, or for a tokenizer directory that SeqIO cannot read.
    """
    tokenizer = Tokenizer.load(tokenizer_dir)
    model = Path(tokenizer_dir) / MODEL
    if not model.is_file() or tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise ConfigError(
            [
                f"tokenizer_dir={str(tokenizer_dir)!r}: a SeqIO Task needs {MODEL} with BOS and "
                "EOS; build from files (SourceConfig.train_files) instead"
            ]
        )
    _check_free(name, seqio.TaskRegistry.names())
    # The slow, exact tokenizer: use_fast_tokenizer gives other ids.
    vocabulary = seqio.SentencePieceVocabulary(str(model))
    return seqio.TaskRegistry.add(
        name,
        source=DocumentSource(source, seed),
        preprocessors=[
            functools.partial(
                seqio.preprocessors.rekey, key_map={"targets": "text", "path": "path"}
            ),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
            functools.partial(prepend_bos, bos_id=tokenizer.bos_id),
        ],
        output_features={"targets": seqio.Feature(vocabulary, add_eos=True)},
    )


def register_jsonl_task(
    name: str,
    files_by_split: dict[str, Iterable[str]],
    tokenizer_dir: str | Path,
    text_key: str = "text",
) -> seqio.Task:
    """Registers a Task over files: {"train": [...], "validation": [...]} of .jsonl(.gz) or .txt."""
    if set(files_by_split) != set(SPLITS):
        raise ConfigError(
            [f"files_by_split={sorted(files_by_split)} must name exactly the splits {SPLITS}"]
        )
    source = SourceConfig(
        name=name,
        rate=1.0,
        train_files=tuple(files_by_split["train"]),
        validation_files=tuple(files_by_split["validation"]),
        text_key=text_key,
    )
    return register_task(name, source, tokenizer_dir)


def register_mixture(
    mixture: str, sources: Iterable[SourceConfig], tokenizer_dir: str | Path, seed: int = 0
) -> seqio.Mixture:
    """Registers Tasks `<mixture>_<source>` and the Mixture of them with the sources' rates.

    `register_mixture("lemur_demo", corpus_sources(dir), tokenizer)` declares lemur_demo_code and
    lemur_demo_text with rates 10 and 1.
    """
    _check_free(mixture, seqio.MixtureRegistry.names())
    rates = []
    for source in sources:
        name = f"{mixture}_{source.name}"
        if source.task:
            name = source.task.split(":")[-1]
            _task(source.task)
        else:
            register_task(name, source, tokenizer_dir, seed)
        rates.append((name, source.rate))
    return seqio.MixtureRegistry.add(mixture, rates)


def sources_of(mixture: str) -> tuple[SourceConfig, ...]:
    """The SourceConfigs of a registered Mixture (or single Task): what a build reads.

    Tasks that this module registered are read from their files again, without TensorFlow; any
    other Task is read through SeqIO, up to its tokenising preprocessor.
    """
    try:
        provider = seqio.get_mixture_or_task(mixture)
    except ValueError as error:
        known = sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})
        raise ConfigError(
            [
                f"mixture={mixture!r} is not registered; import the module that registers it "
                f"(known: {', '.join(known) or 'none'})"
            ]
        ) from error
    found = []
    for task in provider.tasks if isinstance(provider, seqio.Mixture) else [provider]:
        rate = float(provider.get_rate(task)) if isinstance(provider, seqio.Mixture) else 1.0
        if isinstance(task.source, DocumentSource):
            config = task.source.config
            fields = {f: getattr(config, f) for f in config.__dataclass_fields__}
            found.append(SourceConfig(**fields | {"rate": rate}))
        else:
            found.append(SourceConfig(name=task.name, rate=rate, task=task.name))
    return tuple(found)


def documents(name: str) -> Iterator[Document]:
    """Documents of a Task (`task` or `module.path:task`), both splits, before it tokenises.

    Raises ConfigError when the Task is unknown, lacks a split or makes no text "targets".
    """
    task = _task(name)
    missing = [split for split in SPLITS if split not in task.splits]
    if missing:
        raise ConfigError(
            [f"SourceConfig.task={name!r} has splits {list(task.splits)}: add {missing} to it"]
        )
    text_steps = []
    for step in task.preprocessors:
        if getattr(step, "func", step) in _TOKENIZERS:
            break
        text_steps.append(step)
    text = seqio.Feature(
        seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=0, required=True
    )
    text_task = seqio.Task(
        task.name, source=task.source, preprocessors=text_steps, output_features={"targets": text}
    )
    for split in SPLITS:
        try:
            dataset = text_task.get_dataset(None, split=split, shuffle=False)
        except ValueError as error:
            raise ConfigError(
                [
                    f"SourceConfig.task={name!r} makes no text: its preprocessors up to "
                    f"seqio.preprocessors.tokenize must give a string 'targets' ({error})"
                ]
            ) from error
        for number, example in enumerate(dataset.as_numpy_iterator()):
            path = example.get("path", f"{name}/{split}:{number}".encode())
            yield Document(example["targets"].decode("utf-8"), path.decode("utf-8"), split)


def _task(name: str) -> seqio.Task:
    module, _, task = name.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return seqio.TaskRegistry.get(task)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            [
                f"SourceConfig.task={name!r} is not registered ({error}): write "
                "'module.path:task_name' of a module that registers it"
            ]
        ) from error


def _check_free(name: str, taken: Iterable[str]) -> None:
    if name in taken:
        raise ConfigError([f"SeqIO name {name!r} is registered already: choose another name"])
