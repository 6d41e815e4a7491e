"""The whole of a conversion: what `lemur convert SRC DST` does."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from lemur_jax import checkpoint
from lemur_jax.convert import engine, targets
from lemur_jax.convert.adapted import adapted_in
from lemur_jax.convert.chunks import ChunksTarget
from lemur_jax.convert.destination import check_new, journal_of, partial_of, put_in_place, real
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf_config import config_to_hf
from lemur_jax.convert.hf_output import write_small_files
from lemur_jax.convert.journal import Journal, UnfinishedError, identity
from lemur_jax.convert.model import Source, check_max_positions, open_source
from lemur_jax.convert.options import Options
from lemur_jax.convert.ours import PREFIX, OurSource
from lemur_jax.convert.plan import Plan, check_space, describe, make_plan, show_bytes
from lemur_jax.convert.report import REPORT, report_text
from lemur_jax.convert.safetensors import numpy_dtype
from lemur_jax.convert.targets import FilesTarget, Leaf
from lemur_jax.convert.vocabulary import Resized, lost_rows, resize
from lemur_jax.convert.wrapped import origin
from lemur_jax.errors import LemurError

_OTHERS_SECONDS = 60.0  # that other processes have to see a failure: a few blocks


def convert(
    source_path: str | Path,
    destination: str | Path,
    options: Options,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> os.PathLike:
    """Converts a model of any format that we read.

    The destination appears under its name only when it is complete. Until then it lies beside it
    as `.NAME.partial`, where the same call goes on after a kill, a full disk or Ctrl-C; what
    cannot be converted at all leaves nothing.

    Args:
      source_path: see model.open_source.
      destination: must not exist or be empty; local, or gs://, s3:// for --to=lemur.
      options: how.
      dry_run: stop after the plan.
      say: takes the plan and the outcome, line by line.

    Returns:
      The destination; of a checkpoint its step directory.

    Raises:
      ConversionError: anything wrong with the source, the flags or the destination.
      CheckpointError: a checkpoint of ours is incomplete or damaged.
      OSError: the disk. Free some space and call again: it goes on.
    """
    if "://" in str(destination) and options.to != "lemur":
        raise ConversionError(
            [f"{destination} is not local: convert to a local directory, then copy"]
        )
    destination = real(destination)
    check_new(destination)
    source: Source = open_source(
        source_path,
        mixed=options.dtype,
        max_positions=options.max_positions,
        base=options.base,
    )
    check_max_positions(options.max_positions, source)
    if options.add_tokens or options.vocab_size is not None:
        original = source
        source = resize(
            source,
            options.add_tokens,
            vocab_size=options.vocab_size,
            new_rows=options.new_rows or "mean",
        )
        note = lost_rows(original, source)
        if note is not None:
            say(note)
    job = _Job(source, destination, options)
    say(describe(job.plan, engine.guess_rate(source, job.plan)))
    if dry_run:
        return Path(destination)
    return job.run(say)


class _Job:
    """One conversion: its plan, and what is written besides weights."""

    def __init__(self, source: Source, destination: str | Path, options: Options):
        self.source, self.options = source, options
        self.destination = destination
        self.remote = "://" in str(destination)
        if self.remote:
            self.partial = checkpoint.absolute(destination)
            self.journal = self.partial / "convert.journal"
        else:
            self.partial = partial_of(Path(destination))
            self.journal = journal_of(Path(destination))
        self.origin = origin(source)
        self.step = self.origin.manifest.step if isinstance(self.origin, OurSource) else 0
        self.leaves = [
            Leaf(
                name,
                source.shape(name),
                numpy_dtype(options.dtype) if options.dtype else source.dtype(name),
                source.grain(name),
            )
            for name in source.names
        ]
        dtypes = {leaf.name: leaf.dtype for leaf in self.leaves}
        self.weights = dtypes["table"].name
        self.config = dataclasses.replace(source.config, param_dtype=self.weights)
        if options.dtype:
            self.config = dataclasses.replace(self.config, dtype=options.dtype)
        self.index: dict[str, bytes] = {}
        if options.to == "lemur":
            self.target: FilesTarget | ChunksTarget = ChunksTarget(
                self.partial / str(self.step), self.config, self.leaves, options.mesh
            )
        elif options.to == "easylm":
            self.target = targets.easylm_target(Path(self.partial), self.config, dtypes)
        else:
            config_to_hf(self.config, (source.extras or {}).get("config"))  # refuses early
            self.target, self.index = targets.safetensors_target(
                Path(self.partial),
                self.config,
                dtypes,
                source.extras or {},
                options.max_shard_bytes or targets.MAX_SHARD_BYTES,
            )
        self.plan: Plan = make_plan(source, self.leaves, self.target, options.max_ram)

    def run(self, say: Callable[[str], None]) -> os.PathLike:
        started = time.monotonic()
        options = self.options
        first = options.process == 0
        journal = Journal(self.journal, options.process, options.processes)
        if first and not self.partial.exists():
            journal.remove()  # of a destination that was finished, or removed by hand
            if not self.remote:
                Path(self.partial).parent.mkdir(parents=True, exist_ok=True)
                check_space(Path(self.partial).parent, self.target.total_bytes)
        try:
            before = journal.begin(self._header(), self._prepare, options.timeout_seconds)
            done = engine.still_there(self.target, self.plan, before)
            journal.append(list(done.values()))
            if before:
                say(f"going on: {len(done)} of {len(self.plan.blocks)} blocks are there")
            if len(done) < len(before):
                say(
                    f"done again: {len(before) - len(done)} blocks, whose bytes in {self.partial} "
                    "are no longer those that were written"
                )
            engine.run(
                self.source, self.leaves, self.target, self.plan, journal, done,
                options.process, options.processes, f"{self.source.path} -> {self.destination}",
            )  # fmt: skip
            if not first:
                journal.wait_until_gone(options.timeout_seconds)
                if not os.path.exists(self._result()) and not self.remote:
                    raise UnfinishedError([f"process 0 has given up {self.destination}: see there"])
                return self._result()
            journal.all_done(len(self.plan.blocks), options.timeout_seconds)
            self._check_absent(journal)
            lines = journal.all_done(len(self.plan.blocks), options.timeout_seconds)
            found = engine.tally(self.plan, lines)
            engine.check_digests(self.source, found)
            self._finish(found)
            journal.remove()
        except UnfinishedError:
            raise
        except (OSError, KeyboardInterrupt):
            say(f"stopped: what is written stays in {self.partial}; the same command goes on")
            raise
        except LemurError as error:  # trying again would not help
            journal.fail(str(error))
            if first and not self.remote:
                journal.wait_until_alone(_OTHERS_SECONDS)
                shutil.rmtree(self.partial, ignore_errors=True)
                journal.remove()
            raise
        finally:
            journal.close()
            self.target.close()
        self._say_outcome(found, time.monotonic() - started, say)
        return self._result()

    def _check_absent(self, journal: Journal) -> None:
        lines = journal.of_absent()
        wrong = sorted(set(lines) - set(engine.still_there(self.target, self.plan, lines)))
        if wrong:
            processes = sorted({number % self.options.processes for number in wrong})
            raise UnfinishedError(
                [
                    f"{len(wrong)} blocks in {self.partial} are no longer those that were written: "
                    f"start the processes {processes} again (--process), and this one"
                ]
            )

    def _prepare(self) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        self.target.prepare()

    def _result(self) -> os.PathLike:
        if self.options.to == "lemur":
            where = self.destination if self.remote else os.path.abspath(self.destination)
            return (epath.Path if self.remote else Path)(where) / str(self.step)
        return Path(self.destination)

    def _header(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.options)
        for name in ("process", "timeout_seconds"):
            del options[name]
        below, adapted = self.origin, adapted_in(self.source)
        where = below.step_dir if isinstance(below, OurSource) else below.path
        content = {
            "source": os.path.abspath(below.path) if "://" not in below.path else below.path,
            "adapters": adapted and [adapted.adapters_path, identity(adapted.adapters_path)],
            "source_files": identity(where),
            "plan": self.plan.digest(),
            **{f"--{name}": value for name, value in options.items()},
        }
        content["--add_tokens"] = list(options["add_tokens"])
        return content

    def _finish(self, found: dict[str, engine.Tally]) -> None:
        digests = {name: tally.written.hexdigest() for name, tally in found.items()}
        if self.options.to == "lemur":
            self._write_checkpoint(digests)
            if self.remote:
                return
        else:
            directory = Path(self.partial)
            for name, data in self.index.items():
                (directory / name).write_bytes(data)
            write_small_files(
                directory, self.config, self.source.extras, self.source.files(), self.weights
            )
            leaves = {
                leaf.name: {
                    "shape": list(leaf.shape),
                    "dtype": leaf.dtype.name,
                    "digest": digests[leaf.name],
                }
                for leaf in self.leaves
            }
            about = {"source_format": self.source.format, "cast": self._casts(found)}
            (directory / REPORT).write_text(report_text(self.config, leaves, about))
        self.target.close()
        put_in_place(Path(self.partial), Path(self.destination))

    def _write_checkpoint(self, digests: dict[str, str]) -> None:
        entries = {
            PREFIX + leaf.name: checkpoint.ArrayEntry(
                shape=leaf.shape, dtype=leaf.dtype.name, digest=digests[leaf.name],
                item=PREFIX.rstrip("/"),
            )
            for leaf in self.leaves
        }  # fmt: skip
        about: dict[str, Any] = {"kind": "params", "model": dataclasses.asdict(self.config)}
        extras = self.source.extras
        if extras is not None:
            about["hf_extras"] = extras | {"weights_dtype": self.weights}
            if self.options.dtype is not None or isinstance(self.source, Resized):
                about["hf_extras"]["config"] = config_to_hf(
                    self.config, extras["config"], self.options.dtype
                )
        if isinstance(self.origin, OurSource):
            fingerprint = self.origin.manifest.about.get("tokenizer_fingerprint")
            about |= {"tokenizer_fingerprint": fingerprint} if fingerprint else {}
        checkpoint.finish_step(
            self.partial / str(self.step), self.step, entries, about, self.source.files()
        )

    def _casts(self, found: dict[str, engine.Tally]) -> dict[str, dict[str, Any]]:
        """What a cast cost, of each leaf that it changed."""
        before = {leaf.name: self.source.dtype(leaf.name).name for leaf in self.leaves}
        return {
            leaf.name: {
                "from": before[leaf.name],
                "to": leaf.dtype.name,
                **dataclasses.asdict(found[leaf.name].error),
            }
            for leaf in self.leaves
            if before[leaf.name] != leaf.dtype.name
        }

    def _say_outcome(
        self, found: dict[str, engine.Tally], seconds: float, say: Callable[[str], None]
    ) -> None:
        for name, cost in self._casts(found).items():
            say(
                f"cast {name}: {cost['from']} -> {cost['to']}, {cost['changed']} values changed, "
                f"at most by {cost['absolute']:.3g} (relative {cost['relative']:.3g})"
                + (f"; {odd} are NaN or infinite, as before" if (odd := cost["not_finite"]) else "")
            )
        peak = engine.peak_resident_bytes()
        say(
            f"{show_bytes(self.plan.bytes_in)} in {seconds:.1f} s, "
            f"{show_bytes(self.plan.bytes_in / seconds)}/s; peak memory {show_bytes(peak)} of "
            f"--max_ram={show_bytes(self.options.max_ram)}"
        )
