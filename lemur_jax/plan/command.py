"""`lemur plan`: compiles a run's programs for a slice that nobody holds, and reports."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lemur_jax import sharding
from lemur_jax.config import ConfigError, MeshConfig, TrainConfig
from lemur_jax.errors import LemurError
from lemur_jax.plan import cache, fit, libtpu, programs, report, search
from lemur_jax.plan.analysis import analyse
from lemur_jax.plan.programs import PROGRAMS, Compiled, CompileRefused
from lemur_jax.plan.serving import Serving, default_serving
from lemur_jax.plan.slices import Slice, slice_named
from lemur_jax.train import ahead

# Fields that no program depends on: a recipe may leave them to the run.
UNUSED = dict.fromkeys(("TrainConfig.run_dir", "DataConfig.path", "TrainConfig.init_from"), "-")
SAVED = ("train", "evaluate")  # what `lemur train --compiled` can run


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of `lemur plan`.

    Attributes:
      topology: name of the slice.
      program: names in PROGRAMS.
      json: file for the figures; None: none.
      save: directory for the executables; None: none.
      cache: directory of compiled programs; None: cache.default_directory().
      rows, prompt_tokens, cache_tokens: shapes of prefill and decode; None: default_serving.
      search: look for the fastest configuration instead of compiling the given one.
      search_minutes: no compilation starts after these. jobs: compilers at a time.
      host_gib_per_s: that offloading may use of a device's link to its host, each way; 0: none.
      output: gin file of the winner; None: hardware_<slice>.gin.
    """

    topology: str
    program: tuple[str, ...] = ("train",)
    json: Path | None = None
    save: Path | None = None
    cache: Path | None = None
    rows: int | None = None
    prompt_tokens: int | None = None
    cache_tokens: int | None = None
    search: bool = False
    search_minutes: float = 12.0
    jobs: int = 3
    host_gib_per_s: float = 8.0
    output: Path | None = None

    def __post_init__(self):
        problems = [
            f"--program={name!r} is unknown; legal: {', '.join(PROGRAMS)}"
            for name in self.program
            if name not in PROGRAMS
        ]
        if not self.program:
            problems.append(f"--program is empty: name some of {', '.join(PROGRAMS)}")
        if self.save is not None and not set(self.program) <= set(SAVED):
            problems.append(
                f"--save keeps {' and '.join(SAVED)} only (`lemur train --compiled` runs them): "
                "leave the others out of --program"
            )
        if self.json is not None and (
            self.json.is_dir() or not self.json.absolute().parent.is_dir()
        ):
            problems.append(f"--json={self.json} must be a file in an existing directory")
        for flag in ("rows", "prompt_tokens", "cache_tokens"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                problems.append(f"--{flag}={value} must be a positive integer")
        if self.jobs < 1:
            problems.append(f"--jobs={self.jobs} must be a positive integer")
        for flag in ("search_minutes", "host_gib_per_s"):
            if getattr(self, flag) < 0:
                problems.append(f"--{flag}={getattr(self, flag)} must not be negative")
        if self.search and (self.program != ("train",) or self.save is not None):
            problems.append("--search is of the train step alone: leave --program and --save out")
        if problems:
            raise ConfigError(problems)


def plan(config: TrainConfig, options: Options, console: Console | None = None) -> bool:
    """Compiles, prints, writes what was asked for.

    Returns:
      Whether every program fits.

    Raises:
      ConfigError, CompilerMissing: bad input, before anything is compiled.
      CompileRefused: for another reason than memory.
    """
    # A file or a pipe has no width, and rich would cut tables at 80 columns.
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    where = slice_named(options.topology)
    if options.save is not None and options.save.exists() and any(options.save.iterdir()):
        raise LemurError(f"--save={options.save} is not empty: give a new directory")
    libtpu.prepare()
    if options.search:
        return _search(config, where, options, console)
    config = programs.resolve(config, where)
    console.print(where.description(), highlight=False)
    serving = _serving(config, where, options)
    results = []
    for name in options.program:
        shapes = serving if name in ("prefill", "decode") else None
        results.append(_one(config, where, name, shapes, options, console))
    _write_json(results, options, console)
    return all(result["fits"] for result in results)


def _write_json(results: list[dict[str, Any]], options: Options, console: Console) -> None:
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"wrote {options.json}", highlight=False)


def _search(config: TrainConfig, where: Slice, options: Options, console: Console) -> bool:
    """Finds the fastest configuration that fits, writes its gin file and reports on it."""
    output = options.output or Path(f"hardware_{where.name}.gin")
    if output.exists():
        raise LemurError(f"--output={output} exists: give a new file")
    whole = MeshConfig(fsdp=where.devices // where.slices, dcn_data=where.slices)
    config = programs.resolve(dataclasses.replace(config, mesh=whole), where)
    console.print(where.description(), highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    started = time.monotonic()
    results = search.search(
        config,
        where,
        minutes=options.search_minutes,
        jobs=options.jobs,
        host_gib_per_s=options.host_gib_per_s,
        cache=options.cache,
        report=say,
    )
    minutes = (time.monotonic() - started) / 60
    output.write_text(search.gin_text(results, where, minutes))
    say(f"fastest: {search.line(results[0], where)}")
    say(f"wrote {output} after {minutes:.1f} minutes")
    page = _one(results[0].candidate.config, where, "train", None, options, console)
    _write_json([page], options, console)
    return True


def _serving(config: TrainConfig, where: Slice, options: Options) -> Serving | None:
    if not {"prefill", "decode"} & set(options.program):
        return None
    made = default_serving(config)
    flags = {"batch": options.rows, "prompt": options.prompt_tokens, "cache": options.cache_tokens}
    given = {field: value for field, value in flags.items() if value is not None}
    made = dataclasses.replace(made, **given)
    ways = sharding.batch_ways(config.mesh)
    if made.batch % ways:
        raise ConfigError(
            [
                f"--rows={made.batch} must divide by MeshConfig "
                f"data*fsdp_outer*fsdp*dcn_data={ways}: e.g. "
                f"{ways * max(1, round(made.batch / ways))}"
            ]
        )
    return made


def _one(
    config: TrainConfig,
    where: Slice,
    name: str,
    serving: Serving | None,
    options: Options,
    console: Console,
) -> dict[str, Any]:
    """One program: its page, and its figures for JSON."""

    def compiled(config, where, name, serving, *, executable=False) -> Compiled:
        return cache.compile_cached(
            config, where, name, serving, options.cache, executable=executable
        )

    keep = options.save is not None and name in SAVED
    started = time.monotonic()
    try:
        with console.status(f"compiling {name} for {where.name}"):
            made = compiled(config, where, name, serving, executable=keep)
    except CompileRefused as refusal:
        if refusal.exceeded_bytes is None:
            raise
        console.print(f"[bold]{name}[/bold]: does not fit: {refusal.reason()}", highlight=False)
        return {
            "program": name,
            "topology": where.name,
            "fits": False,
            "needed_bytes": refusal.needed_bytes,
            "usable_bytes": refusal.usable_bytes,
            "words": refusal.words,
            "fix": _fix(config, where, name, serving, compiled, console),
        }
    found = analyse(made, serving)
    report.show(console, found)
    console.print(
        f"{name}: {time.monotonic() - started:.0f} s, of which the compiler "
        f"{made.seconds:.0f} s" + (" (kept from before)" if made.executable is None else ""),
        highlight=False,
    )
    if keep:
        _save(options.save / name, made)
        console.print(f"wrote {options.save / name}", highlight=False)
    return report.as_json(found)


def _fix(config, where, name, serving, compile_program, console: Console) -> str | None:
    """Looks for the smallest change that fits, and says it."""

    def tried(change: str, verdict: str) -> None:
        console.print(f"  with {change}: {verdict}", markup=False, highlight=False)

    with console.status("looking for the smallest change that fits"):
        found = fit.smallest_fix(config, where, name, serving, compile_program, tried)
    if found is None:
        console.print("No change that was tried fits: take a larger slice or a smaller model.")
        return None
    change, _ = found
    console.print(f"The smallest change that fits: {change.text}", markup=False, highlight=False)
    return change.text


def _save(directory: Path, made: Compiled) -> None:
    mesh = programs.make_mesh(made.config, made.where)
    program = programs.program(made.config, mesh, made.name)
    facts = ahead.facts(made.name, made.config, mesh, program)
    ahead.save(directory, made.executable, facts)


def program_names(text: str) -> Sequence[str]:
    """`train,decode` as names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
