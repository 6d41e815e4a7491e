"""A real corpus that every Python machine carries: no network, no toy strings.

    code  the standard library's sources and the .py files of the installed packages
    text  help topics, packages' descriptions, licences and documents, prose of docstrings

Choice: files are ordered by a seeded hash of their path and taken until a byte limit, so the
same environment and seed give the same corpus, byte for byte.

Held-out split: decided for each *file* by a seeded hash of its path, and inherited by the
docstring prose cut out of it. So no validation document has its file in training, in either
source; validation paragraphs whose lines also occur in some *other* training code file (shared
docstrings) are dropped. Near-duplicates are handled where they are known (`_vendor` trees are
skipped, licences are compared without their copyright lines), not in general.
"""

import collections
import csv
import dataclasses
import importlib.metadata
import json
import os
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from lemur_jax.config import ConfigError
from lemur_jax.data import prose
from lemur_jax.data.files import check_replaceable, fraction_of, new_directory, sha256

BYTES_PER_FILE = 1_000_000  # larger .py files are generated tables
BYTES_PER_PROSE_FILE = 60_000  # larger licence files repeat other packages' licences
BYTES_PER_FILE_MINIMUM = 128  # smaller ones are empty __init__.py files
_SKIPPED_PARTS = {"_vendor", "_vendored_packages", "__pycache__", "site-packages", "pydoc_data"}
_LICENCE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)
_COPYRIGHT = re.compile(r"^.*copyright.*$", re.IGNORECASE | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class _File:
    path: str  # portable name in the corpus
    location: Path
    licence: str


@dataclasses.dataclass(frozen=True)
class _Document:
    text: str
    path: str
    licence: str
    split: str


def licence_of(metadata) -> str:
    """The licence that a package declares: SPDX expression, short field, classifier; 'unknown'."""
    if metadata is None:
        return "unknown"
    if expression := metadata.get("License-Expression"):
        return expression.strip()
    stated = (metadata.get("License") or "").strip()
    if stated and "\n" not in stated and len(stated) <= 100:
        return stated
    for classifier in metadata.get_all("Classifier") or []:
        if classifier.startswith("License ::"):
            return classifier.split("::")[-1].strip()
    return stated.splitlines()[0].strip()[:100] if stated else "unknown"


def _standard_library() -> Iterator[_File]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_PARTS)
        for name in sorted(names):
            if name.endswith(".py"):
                location = Path(folder, name)
                yield _File(f"stdlib/{location.relative_to(root).as_posix()}", location, "PSF-2.0")


def _distributions() -> list[importlib.metadata.Distribution]:
    """Installed packages by name, without this project and without second finds of one name."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "") if distribution.metadata else ""
        if name and re.sub(r"[-_.]+", "_", name).lower() != "lemur_jax":
            found.setdefault(name, distribution)
    return [found[name] for name in sorted(found)]


def _files_of(distribution: importlib.metadata.Distribution) -> list[str]:
    # RECORD read as the csv that it is: `distribution.files` takes 12 s for 48,000 entries.
    record = distribution.read_text("RECORD")
    if record is None:
        return sorted(str(name) for name in distribution.files or [])
    return sorted(row[0] for row in csv.reader(record.splitlines()) if row)


def _candidates() -> tuple[list[_File], list[_File], list[tuple[str, str, str]]]:
    """Code files, prose files, and (path, text, licence) of the prose that is in metadata."""
    code, documents, texts = list(_standard_library()), [], []
    texts += [(path, text, "PSF-2.0") for path, text in prose.topics()]
    for distribution in _distributions():
        name, licence = distribution.metadata["Name"], licence_of(distribution.metadata)
        for inside in _files_of(distribution):
            parts = inside.split("/")
            if ".." in parts or _SKIPPED_PARTS.intersection(parts):
                continue
            file = _File(f"dist/{name}/{inside}", Path(distribution.locate_file(inside)), licence)
            if inside.endswith(".py"):
                code.append(file)
            elif _LICENCE.search(inside) or inside.endswith((".md", ".rst")):
                documents.append(file)
        if text := prose.description(distribution):
            texts.append((f"dist/{name}/METADATA#description", text, licence))
    return code, documents, texts


class _Filter:
    """Counts what is left out and why; remembers what was seen."""

    def __init__(self):
        self.skipped: dict[str, list[str]] = collections.defaultdict(list)
        self.duplicates: dict[str, int] = collections.Counter()
        self._seen: set[tuple[str, str]] = set()

    def read(self, file: _File, most: int = BYTES_PER_FILE) -> str | None:
        """Text of the file, or None after noting why it is not used."""
        try:
            size = file.location.stat().st_size
            if size > most:
                return self._skip(f"larger than {most} bytes", file.path)
            if size < BYTES_PER_FILE_MINIMUM:
                return self._skip(f"smaller than {BYTES_PER_FILE_MINIMUM} bytes", file.path)
            text = file.location.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            return self._skip("not text: not UTF-8", file.path)
        except OSError as error:
            return self._skip(f"unreadable: {type(error).__name__}", file.path)
        if "\0" in text:
            return self._skip("not text: NUL byte", file.path)
        return text

    def _skip(self, reason: str, path: str) -> None:
        self.skipped[reason].append(path)

    def is_new(self, kind: str, key: str) -> bool:
        """Whether `key` (a text) is seen for the first time; otherwise counts a duplicate."""
        digest = (kind, sha256(key))
        if digest in self._seen:
            self.duplicates[kind] += 1
            return False
        self._seen.add(digest)
        return True


def collect(
    out_dir: str | Path,
    *,
    seed: int = 0,
    max_bytes_per_source: dict[str, int] | None = None,
    validation_fraction: float = 0.1,
    console: Console | None = None,
) -> dict:
    """Writes out_dir/code.jsonl, text.jsonl and manifest.json; returns the manifest.

    Each .jsonl line is {"text", "path", "sha256", "split"}; sha256 is of the text as UTF-8.

    Args:
      out_dir: a new directory, or one that an earlier `collect` wrote (it is replaced whole).
      seed: of the choice of files and of the held-out split.
      max_bytes_per_source: limits {"code": bytes, "text": bytes}; default 40 MB and 5 MB, which
        is one epoch of 10:1 with some text to spare.
      validation_fraction: of the files, held out.
      console: where progress goes; None is stderr.

    Raises ConfigError when a setting cannot work or the machine has nothing to collect.
    """
    limits = {"code": 40_000_000, "text": 5_000_000} | (max_bytes_per_source or {})
    problems = [
        f"max_bytes_per_source[{name!r}]={limit!r} must be a positive number of bytes for "
        "'code' or 'text'"
        for name, limit in limits.items()
        if name not in ("code", "text") or not isinstance(limit, int) or limit < 1
    ]
    if not 0 < validation_fraction < 1:
        problems.append(f"validation_fraction={validation_fraction} must be between 0 and 1")
    if problems:
        raise ConfigError(problems)
    check_replaceable(out_dir, "out_dir", "manifest.json")
    console = console or Console(stderr=True)
    started = time.monotonic()

    def split_of(path: str) -> str:
        # pydoc's topics share a file that is not in the code source: each is held out alone.
        group = path if "pydoc_data" in path else path.split("#")[0]
        held_out = fraction_of(f"split {seed} {group}") < validation_fraction
        return "validation" if held_out else "train"

    code_files, prose_files, texts = _candidates()
    code_files.sort(key=lambda file: fraction_of(f"choice {seed} {file.path}"))
    keep = _Filter()
    with Progress(console=console, transient=True) as progress:
        code = _code(code_files, limits["code"], keep, split_of, progress)
        text = _text(code_files, code, prose_files, texts, limits["text"], keep, split_of, progress)
    sources = {"code": code, "text": sorted(text, key=lambda d: fraction_of(f"{seed} {d.path}"))}
    for name, documents in sources.items():
        if not {d.split for d in documents} >= {"train", "validation"}:
            raise ConfigError(
                [
                    f"max_bytes_per_source[{name!r}]={limits[name]} leaves {len(documents)} "
                    "documents and an empty split: raise the limit or install more packages"
                ]
            )
    manifest = _manifest(sources, keep, seed, limits, validation_fraction, len(code_files))
    with new_directory(out_dir) as temporary:
        for name, documents in sources.items():
            with open(temporary / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as lines:
                for d in documents:
                    record = {"text": d.text, "path": d.path, "sha256": sha256(d.text)}
                    lines.write(json.dumps(record | {"split": d.split}) + "\n")
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for name, counts in manifest["sources"].items():
        console.print(
            f"corpus {name}: {counts['documents']} documents, {counts['bytes'] / 1e6:.1f} MB "
            f"(limit {limits[name] / 1e6:.1f} MB), {counts['validation_documents']} held out, "
            f"{counts['duplicates_removed']} duplicates removed",
            soft_wrap=True,
        )
    for reason, paths in keep.skipped.items():
        console.print(f"corpus skipped, {reason}: {len(paths)} files", soft_wrap=True)
    console.print(
        f"corpus written to {out_dir} in {time.monotonic() - started:.1f} s", soft_wrap=True
    )
    return manifest


def _code(files, limit, keep, split_of, progress) -> list[_Document]:
    task = progress.add_task("reading code", total=limit)
    chosen, used = [], 0
    for file in files:
        if used >= limit:
            break
        text = keep.read(file)
        if text is not None and keep.is_new("code", text):
            chosen.append(_Document(text, file.path, file.licence, split_of(file.path)))
            used += len(text.encode("utf-8"))
            progress.update(task, completed=used)
    return chosen


def _text(files, code, prose_files, texts, limit, keep, split_of, progress) -> list[_Document]:
    """Whole documents first, then docstrings of `files` in their order until the limit."""
    task = progress.add_task("reading text", total=limit)
    whole = [(path, text, licence) for path, text, licence in texts]
    for file in prose_files:
        text = keep.read(file, BYTES_PER_PROSE_FILE)
        if text is not None:
            whole.append((file.path, text.strip(), file.licence))
    chosen, used = [], 0
    for path, text, licence in sorted(whole, key=lambda item: fraction_of(f"choice {item[0]}")):
        # Hundreds of packages ship one licence with their own name in it: once is enough.
        key = " ".join(_COPYRIGHT.sub("", text).lower().split())
        if used >= limit // 2:
            break
        if len(text) >= prose.CHARACTERS_PER_DOCUMENT and keep.is_new("text", key):
            chosen.append(_Document(text, path, licence, split_of(path)))
            used += len(text.encode("utf-8"))
    have = {d.path: d.text for d in code}
    drafts = []
    for file in files:
        if used >= limit:
            break
        source = have.get(file.path)
        if source is None:
            source = keep.read(file)
        if source is None:
            continue
        paragraphs = [p for p in prose.docstring_paragraphs(source) if keep.is_new("text", p)]
        if sum(map(len, paragraphs)) >= prose.CHARACTERS_PER_DOCUMENT:
            drafts.append((file, paragraphs))
            used += sum(map(len, paragraphs))
            progress.update(task, completed=used)
    held_out = [(f, ps) for f, ps in drafts if split_of(f.path) == "validation"]
    in_training_code = _lines_in_training_code(code, held_out)
    for file, paragraphs in drafts:
        split = split_of(file.path)
        if split == "validation":
            paragraphs = [
                p for p in paragraphs if in_training_code.isdisjoint(prose.paragraph_keys(p))
            ]
        text = "\n\n".join(paragraphs)
        if len(text) >= prose.CHARACTERS_PER_DOCUMENT:
            chosen.append(_Document(text, f"{file.path}#docstrings", file.licence, split))
    return chosen


def _lines_in_training_code(code: list[_Document], held_out) -> set[str]:
    wanted = {key for _, ps in held_out for p in ps for key in prose.paragraph_keys(p)}
    found = set()
    for d in code:
        if d.split == "train":
            found.update(wanted.intersection(map(prose.line_key, d.text.splitlines())))
    return found


def _manifest(sources, keep, seed, limits, validation_fraction, candidates) -> dict:
    counts, files = {}, []
    for name, documents in sources.items():
        sizes = [len(d.text.encode("utf-8")) for d in documents]
        counts[name] = {
            "documents": len(documents),
            "bytes": sum(sizes),
            "validation_documents": sum(d.split == "validation" for d in documents),
            "duplicates_removed": keep.duplicates[name],
        }
        files += [
            {
                "path": d.path,
                "source": name,
                "split": d.split,
                "licence": d.licence,
                "bytes": size,
                "sha256": sha256(d.text),
            }
            for d, size in zip(documents, sizes, strict=True)
        ]
    return {
        "format_version": 1,
        "seed": seed,
        "max_bytes_per_source": limits,
        "validation_fraction": validation_fraction,
        "candidate_code_files": candidates,
        "sources": counts,
        "skipped": {
            reason: {"count": len(paths), "paths": sorted(paths)[:100]}
            for reason, paths in sorted(keep.skipped.items())
        },
        "licences": dict(sorted(collections.Counter(f["licence"] for f in files).items())),
        "files": files,
    }
