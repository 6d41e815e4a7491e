"""From paths, globs and directories to the files that they mean, and to their formats."""

import glob
import json
import posixpath
import re
from collections.abc import Sequence

from lemur_jax.config import ConfigError
from lemur_jax.data.reading import storage

TEXT_SUFFIXES = (
    *(".txt", ".md", ".rst", ".tex", ".html", ".xml", ".yaml", ".yml", ".toml", ".csv"),
    *(".py", ".sql", ".java", ".sh", ".ipynb", ".js", ".ts", ".c", ".h", ".php", ".cpp", ".hpp"),
    *(".cc", ".pl", ".rb", ".go", ".rs", ".lua", ".r", ".jl", ".scala", ".kt", ".cs", ".hs"),
)
_OF = r"(-\d+-of-\d+)?"  # TensorFlow's shard numbers may follow the suffix
_SUFFIXES = {
    "jsonl": re.compile(r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$"),
    "parquet": re.compile(r"\.parquet$"),
    "arrow": re.compile(r"\.arrow$"),
    "tfrecord": re.compile(rf"\.tfrecords?{_OF}(\.gz)?$"),
    "array_record": re.compile(rf"\.array_?record{_OF}$"),
    "text": re.compile(rf"({'|'.join(map(re.escape, TEXT_SUFFIXES))})(\.gz|\.zst)?$", re.I),
}
# Formats of files; "hf" and "tfds" name data sets of libraries instead.
FILE_FORMATS = tuple(_SUFFIXES)
FORMATS = (*FILE_FORMATS, "hf", "tfds")
# Those that `expand` takes without a word about the format.
SUFFIXES = (".jsonl", ".parquet", ".tfrecord", ".array_record", ".arrow", ".txt", ".md", ".py, ...")
_NUMBERED = re.compile(r"(.*?)-(\d{3,6})-of-(\d{3,6})")
_PART_MEANT = re.compile(r"-\d[^/]*-of-")  # a glob that spells digits of the shard's number


def format_of(path: str) -> str | None:
    """Format of a file by its suffix; None when it says nothing."""
    return next((name for name, suffix in _SUFFIXES.items() if suffix.search(path)), None)


def expand(
    patterns: Sequence[str], field: str, format: str | None = None, root: str = ""
) -> list[str]:
    """Files that `patterns` name, sorted and without repetition.

    Args:
      patterns: paths, globs or directories, local or URLs: a `save_to_disk` directory means its
        arrow files; any other directory, with format="text", all files below it.
      field: the setting that named them, for messages.
      format: one of FILE_FORMATS; None tells by suffix.
      root: what relative patterns are relative to.

    Raises ConfigError naming `field` with all problems: a pattern that names nothing, an unknown
    suffix, a directory of no format, numbered shards (-00003-of-00010) of which some are missing.
    """
    if not patterns:
        raise ConfigError([f"{field}={patterns!r} is empty: give paths or globs of {SUFFIXES}"])
    problems: list[str] = []
    found: set[str] = set()
    for pattern in patterns:
        if root and not pattern.startswith("/") and not storage.is_remote(pattern):
            pattern = f"{root.rstrip('/')}/{pattern}"
        names = _files(pattern, field, format, problems)
        if not _PART_MEANT.search(pattern) and names != [pattern]:
            problems += _missing_shards(names, field, pattern)
        found.update(names)
    for name in sorted(found):
        if format is None and format_of(name) is None:
            problems.append(
                f"{field}={name!r} has an unknown suffix: use one of {SUFFIXES}, or set "
                f"SourceConfig.format to one of {FORMATS}"
            )
    if problems:
        raise ConfigError(problems)
    return sorted(found)


def _files(pattern: str, field: str, format: str | None, problems: list[str]) -> list[str]:
    names, nothing = [], True
    for name in storage.matches(pattern, field):
        if not storage.is_directory(name, field):
            names.append(name)
        elif storage.exists(f"{name}/dataset_dict.json"):
            problems.append(f"{field}={name!r} holds several splits: name one, e.g. {name}/train")
            nothing = False
        elif storage.exists(f"{name}/state.json"):
            names += _arrow_files(name, field)
        elif format is not None:
            names += [n for n in storage.files_below(name, field) if _belongs(n, format)]
        elif not glob.has_magic(pattern):
            problems.append(
                f"{field}={name!r} is a directory: give a glob of its files, or "
                "SourceConfig.format='text' to make every file below it a document"
            )
            nothing = False
    if not names and nothing:
        of_corpus = posixpath.basename(pattern) in ("code.jsonl", "text.jsonl")
        corpus = ", or write the corpus there first (`lemur data corpus`)" if of_corpus else ""
        problems.append(f"{field}={pattern!r} matches no file: check the path{corpus}")
    return names


def _belongs(name: str, format: str) -> bool:
    return format == "text" or format_of(name) == format


def _arrow_files(directory: str, field: str) -> list[str]:
    """Files of a `save_to_disk` directory, as its state.json lists them."""
    place = f"{directory}/state.json"
    try:
        with storage.open_binary(place, field) as file:
            state = json.load(file)
        names = [f"{directory}/{entry['filename']}" for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            [f"{field}={place!r} is not of datasets.save_to_disk ({error!r}): save it again"]
        ) from error
    missing = [name for name in names if not storage.exists(name, field)]
    if missing:
        raise ConfigError(
            [f"{field}={place!r} lists files that are missing: {missing}; copy them there"]
        )
    return names


def _missing_shards(names: Sequence[str], field: str, pattern: str) -> list[str]:
    groups: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if numbered := _NUMBERED.match(posixpath.basename(name)):
            group = (f"{posixpath.dirname(name)}/{numbered[1]}", numbered[3])
            groups.setdefault(group, set()).add(int(numbered[2]))
    problems = []
    for (start, total), present in sorted(groups.items()):
        missing = sorted(set(range(int(total))) - present)
        if missing:
            shown = ", ".join(f"{number:0{len(total)}}" for number in missing[:8])
            problems.append(
                f"{field}={pattern!r}: of {start}-*-of-{total}, {len(missing)} shards are missing "
                f"({shown}{', ...' if len(missing) > 8 else ''}): fetch them; to read a part on "
                f"purpose, spell digits in it: {start}-{'0' * (len(total) - 1)}?-of-{total}*"
            )
    return problems
