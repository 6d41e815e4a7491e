"""`lemur data build`: tokenise once, offline, into rows that training reads at random.

    DATA_DIR/manifest.json          what was built from what; written last (manifest.py)
    DATA_DIR/tokenizer/             a copy of the tokenizer
    DATA_DIR/<source>/<split>/      the row store (store.py) of each source and split
    DATA_DIR/journal/               which parts are finished, while building and for repairs

Input shards are grouped into parts of about `part_bytes`; worker processes tokenise and write a
part each (worker.py). Parts are cut before anybody starts, so the rows are the same for any number
of workers, and after any number of kills: the same command goes on with the parts that are missing.
DATA_DIR may be in object storage (gs://, s3://).
"""

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator, Mapping

from rich.console import Console

from lemur_jax.config import ConfigError
from lemur_jax.data import location, manifest
from lemur_jax.data.parallel import build_groups
from lemur_jax.data.rows_writer import FORMAT_VERSION, PART
from lemur_jax.data.sources import SourceConfig
from lemur_jax.data.store import check_files
from lemur_jax.data.summary import finish, report
from lemur_jax.data.tokenizer import Tokenizer

__all__ = ["FORMAT_VERSION", "BuildConfig", "build", "existing"]

SPLIT_DOCUMENTS = ("continue", "truncate")
BOS_EOS = ("both", "bos", "eos", "none")
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """One run of `lemur data build`.

    Attributes:
      path: DATA_DIR, local or gs://, s3://: new, or one that the same build wrote before.
      sources: what goes in.
      tokenizer: tokenizer directory; a copy goes into the data set.
      sequence_length: T: rows hold T+1 tokens.
      mixture: name of the mixture, for logs and messages.
      seed: of `validation_fraction` and of fill-in-the-middle.
      workers: processes; 0 takes one for each core. Decides nothing but the speed.
      part_bytes: input of one part, at least: what is built again after a kill, a worker each.
      split_documents: a document that does not fit goes on in the next row ("continue"), or is
        cut to the length of a row, which is counted ("truncate").
      bos_eos: which special ids go around a document: "both", "bos", "eos" or "none".
      fim_rate: share of the training documents that become fill-in-the-middle (see fim.py).
      fim_spm_rate: share of those in the order suffix, prefix, middle.
      fim_tokens: spelling of the tokens for prefix, suffix and middle.
    """

    path: str
    sources: tuple[SourceConfig, ...]
    tokenizer: str
    sequence_length: int
    mixture: str = "mixture"
    seed: int = 0
    workers: int = 0
    part_bytes: int = 256 * 2**20
    split_documents: str = "continue"
    bos_eos: str = "both"
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    fim_tokens: tuple[str, ...] = FIM_TOKENS

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "fim_tokens", tuple(self.fim_tokens))
        problems = [
            f"BuildConfig.{field}='' is empty: give a directory"
            for field in ("path", "tokenizer")
            if not getattr(self, field)
        ]
        names = [source.name for source in self.sources]
        if not names:
            problems.append("BuildConfig.sources=() is empty: give at least one SourceConfig")
        if len(set(names)) < len(names):
            problems.append(f"BuildConfig.sources={names} repeat a name: every name must differ")
        # Segments are uint16: at most 65535 documents in a row.
        if not isinstance(self.sequence_length, int) or not 2 <= self.sequence_length <= 65534:
            problems.append(
                f"BuildConfig.sequence_length={self.sequence_length!r} must be in [2, 65534]"
            )
        if not isinstance(self.workers, int) or self.workers < 0:
            problems.append(f"BuildConfig.workers={self.workers!r} must be >= 0 (0: every core)")
        if not isinstance(self.part_bytes, int) or self.part_bytes < 1:
            problems.append(
                f"BuildConfig.part_bytes={self.part_bytes!r} must be a positive integer"
            )
        for field, legal in (("split_documents", SPLIT_DOCUMENTS), ("bos_eos", BOS_EOS)):
            if getattr(self, field) not in legal:
                problems.append(
                    f"BuildConfig.{field}={getattr(self, field)!r} is unknown; legal: {legal}"
                )
        problems += self._fim_problems()
        if problems:
            raise ConfigError(problems)

    def _fim_problems(self) -> list[str]:
        problems = [
            f"BuildConfig.{field}={getattr(self, field)!r} must be a share in [0, 1]"
            for field in ("fim_rate", "fim_spm_rate")
            if not isinstance(getattr(self, field), (int, float))
            or not 0 <= getattr(self, field) <= 1
        ]
        if len(self.fim_tokens) != 3 or len(set(self.fim_tokens)) != 3:
            problems.append(
                f"BuildConfig.fim_tokens={self.fim_tokens} must be three different tokens: "
                "of prefix, suffix, middle"
            )
        if self.fim_rate and self.bos_eos not in ("both", "eos"):
            problems.append(
                f"BuildConfig.bos_eos={self.bos_eos!r} with fim_rate={self.fim_rate}: the model "
                "learns from EOS where the middle ends; use 'both' or 'eos'"
            )
        return problems


def existing(config: BuildConfig) -> dict | None:
    """Manifest of an identical, finished build at `config.path`; None when there is work to do.

    There is work when the place is empty, or holds an unfinished or damaged build of the same
    settings. Raises ConfigError when it holds anything else, and for whatever is wrong with the
    settings and can be known without reading all the input.
    """
    about, _ = manifest.plan(config, load_tokenizer(config))
    found = _found(config, about)
    return found if found is not None and _is_whole(config.path, found) else None


def load_tokenizer(config: BuildConfig) -> Tokenizer:
    """The tokenizer of a build. Raises ConfigError when it lacks an id that `bos_eos` wants."""
    tokenizer = Tokenizer.load(config.tokenizer)
    wanted = {"both": ("bos", "eos"), "none": ()}.get(config.bos_eos, (config.bos_eos,))
    missing = [role for role in wanted if getattr(tokenizer, f"{role}_id") is None]
    if missing:
        raise ConfigError(
            [
                f"BuildConfig.bos_eos={config.bos_eos!r} but the tokenizer {config.tokenizer!r} "
                f"has {role}_token=None: name one in its tokenizer_config.json, or set "
                f"bos_eos to one of {BOS_EOS} that it can give"
                for role in missing
            ]
        )
    if config.fim_rate:
        from lemur_jax.data.fim import FillInTheMiddle

        FillInTheMiddle(tokenizer, config.fim_tokens)
    return tokenizer


def _found(config: BuildConfig, about: Mapping) -> dict | None:
    """The manifest at `config.path`; None if there is nothing, or an unfinished build."""
    where = f"BuildConfig.path={config.path!r}"
    fix = "nothing was touched; give a new directory or remove this one"
    if not location.children(config.path):
        if location.is_local(config.path) and location.local(config.path).is_file():
            raise ConfigError([f"{where} is a file: {fix}"])
        return None
    data = location.read(config.path, manifest.MANIFEST)
    journal = location.read(config.path, f"{manifest.JOURNAL}/build.json")
    if data is None and journal is None and location.children(config.path) == [manifest.JOURNAL]:
        return None  # killed in its first moments
    try:
        stored = json.loads(data or journal or b"")
        different = [name for name in about if stored.get(name) != about[name]]
    except (ValueError, AttributeError) as error:
        raise ConfigError([f"{where} exists and is not a data set: {fix}"]) from error
    if data is None:
        # Parts of inputs that have changed are built again: the journal has their keys.
        different = [name for name in different if name not in ("inputs", "rates", "max_epochs")]
    if different:
        raise ConfigError([f"{where} was built with other {', '.join(different)}: {fix}"])
    return stored if data else None


def build(config: BuildConfig, console: Console | None = None) -> dict:
    """Builds a data set, or goes on with one, and returns its manifest.

    The manifest holds the build's identity (settings, tokenizer_fingerprint, vocab_size, bos_id,
    eos_id, inputs with their SHA-256) and, for each source, its rate, what was left out ("counts")
    and for each split: rows, tokens (with BOS and EOS), documents, fill (share of the rows that is
    not padding), digest, parts and, for the held-out split, unigram_entropy: nats per target under
    the split's own unigram distribution.

    Raises ConfigError on bad input and StorageError for what cannot be written. Finished parts are
    kept then; without any, `config.path` is as it was before.
    """
    console = console or Console(stderr=True)
    started = time.monotonic()
    tokenizer = load_tokenizer(config)
    about, planned = manifest.plan(config, tokenizer)
    found = _found(config, about)
    if found is not None and _is_whole(config.path, found):
        console.print(f"data set {config.path} is complete already", soft_wrap=True)
        return found
    with _alone(config.path):
        location.write(
            config.path, f"{manifest.JOURNAL}/build.json", (json.dumps(about) + "\n").encode()
        )
        try:
            entries = build_groups(config, planned, tokenizer.fingerprint, console)
            result = finish(config, about, entries, tokenizer)
        except BaseException:
            if found is None:
                _leave(config.path)
            raise
    report(result, console)
    console.print(
        f"data set {config.path} built in {time.monotonic() - started:.1f} s", soft_wrap=True
    )
    return result


def _is_whole(path: str, found: Mapping) -> bool:
    """Whether every file of every part is there, in its size."""
    try:
        for source, about in found["sources"].items():
            for split, counts in about["splits"].items():
                check_files(location.join(path, source, split), counts["parts"])
    except ConfigError:
        return False
    return True


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Nobody else builds here; the lock dies with its process. Object storage has none."""
    if not location.is_local(path):
        yield
        return
    folder = location.local(path) / manifest.JOURNAL
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                [f"BuildConfig.path={path!r} is being built by another process: wait for it"]
            ) from error
        yield


def _leave(path: str) -> None:
    """After an error: an unfinished build without any finished part is no use to anybody."""
    names = location.sizes(path)
    if not any(name.endswith(f"/{PART}") for name in names):
        location.remove(path)
