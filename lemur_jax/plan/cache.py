"""Compiled programs kept between calls of `lemur plan`: a minute of compilation is paid once.

    DIR/<fingerprint>/program.json      what was asked, sizes and seconds; or the refusal
    DIR/<fingerprint>/program.hlo.gz    the scheduled HLO
    DIR/<fingerprint>/dump/             the compiler's buffer assignment

An entry is found by everything that decides the compiler's answer: the config, the slice, the
serving shapes, options, versions of jax and libtpu, and the source of lemur_jax and its kernels.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from lemur_jax.config import TrainConfig
from lemur_jax.plan import libtpu, programs
from lemur_jax.plan.programs import Compiled, CompileRefused
from lemur_jax.plan.serving import Serving
from lemur_jax.plan.slices import Slice
from lemur_jax.train import ahead
from lemur_jax.train import programs as training

_KEPT = ("*after_optimizations-buffer-assignment*.txt", "*live-range*.txt")  # of a dump
_SIZES = (
    "argument_bytes",
    "output_bytes",
    "alias_bytes",
    "temp_bytes",
    "code_bytes",
    "peak_bytes",
    "host_temp_bytes",
    "seconds",
)


def default_directory() -> Path:
    """$XDG_CACHE_HOME/lemur_jax/plan, or ~/.cache/lemur_jax/plan."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lemur_jax" / "plan"


def fingerprint(
    config: TrainConfig, where: Slice, name: str, serving: Serving | None = None
) -> str:
    """Of a question to the compiler; `config` is resolved."""
    asked = {
        "program": name,
        "slice": [where.chip.name, where.shape, where.slices],
        "mesh": dataclasses.asdict(config.mesh),
        "config": ahead.configured(config),
        "options": training.options(config),
        "serving": serving and dataclasses.asdict(serving),
        "versions": ahead.versions(),
        "code": ahead.code_fingerprint(),
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:20]


def compile_cached(
    config: TrainConfig,
    where: Slice,
    name: str = "train",
    serving: Serving | None = None,
    directory: Path | None = None,
    *,
    executable: bool = False,
) -> Compiled:
    """`programs.compile_program`, or what it answered before; with the buffer assignment.

    Args:
      directory: of the cache; `default_directory()` when None.
      executable: the executable itself is needed, which no cache keeps: compile.

    Raises:
      as compile_program: a refusal is kept too.
    """
    libtpu.prepare()
    config = programs.resolve(config, where)
    root = directory or default_directory()
    entry = root / fingerprint(config, where, name, serving)
    if not executable and (entry / "program.json").is_file():
        try:
            return _read(entry, config, where, name)
        except (ValueError, KeyError, EOFError, OSError):  # damaged: compiled again, and replaced
            shutil.rmtree(entry)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="new_") as made:
        work = Path(made) / "entry"
        dump = work / "dump"
        dump.mkdir(parents=True)
        try:
            compiled = programs.compile_program(config, where, name, serving, dump)
        except CompileRefused as refusal:
            _write(entry, work, {"refused": refusal.words})
            raise
        with gzip.open(work / "program.hlo.gz", "wt", compresslevel=4) as file:
            file.write(compiled.hlo)
        sizes = {field: getattr(compiled, field) for field in _SIZES}
        _write(entry, work, {"mesh": compiled.mesh, **sizes})
    return dataclasses.replace(compiled, dump=entry / "dump")


def _write(entry: Path, work: Path, about: dict) -> None:
    """Puts a finished entry in place in one move: two processes may make the same one at once."""
    for path in (work / "dump").iterdir():
        if not any(path.match(kept) for kept in _KEPT):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (work / "program.json").write_text(json.dumps(about, indent=1) + "\n")
    if entry.exists():
        shutil.rmtree(entry)
    try:
        work.rename(entry)
    except OSError:
        if not (entry / "program.json").is_file():  # else another process was first: the same
            raise


def _read(entry: Path, config: TrainConfig, where: Slice, name: str) -> Compiled:
    about = json.loads((entry / "program.json").read_text())
    if "refused" in about:
        raise CompileRefused(name, where, about["refused"])
    with gzip.open(entry / "program.hlo.gz", "rt") as file:
        hlo = file.read()
    return Compiled(
        name=name,
        config=config,
        where=where,
        mesh=about["mesh"],
        hlo=hlo,
        dump=entry / "dump",
        **{field: about[field] for field in _SIZES},
    )
