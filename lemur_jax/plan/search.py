"""`lemur plan --search`: the fastest configuration of a run that a slice's compiler accepts.

candidates (model) -> short list -> compiled, several at a time -> the best one with other flags
and loss chunks -> a gin file that says why.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lemur_jax.config import ConfigError, TrainConfig
from lemur_jax.errors import LemurError
from lemur_jax.plan import candidates as models
from lemur_jax.plan.apart import ProcessDied, apart
from lemur_jax.plan.candidates import Candidate
from lemur_jax.plan.slices import Slice

SPARE_BYTES = 2**30  # that the winner leaves
MODEL_ERROR = 0.25  # of the model's HBM: what lies above is compiled last
ROUND = 6  # candidates compiled before the best is looked at


@dataclasses.dataclass(frozen=True)
class Result:
    """A candidate after the compiler saw it.

    Attributes:
      candidate: with the model's figures.
      refusal: why it does not fit, in a line; None when it fits.
      hbm_bytes, host_bytes, seconds: compiler-predicted, of one device; seconds at the best and the
        worst corner of the time model. 0 when it does not fit.
    """

    candidate: Candidate
    refusal: str | None
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def score(self) -> float:
        """Middle of the interval; smaller is better."""
        return sum(self.seconds) / 2


def search(
    config: TrainConfig,
    where: Slice,
    *,
    minutes: float,
    jobs: int,
    host_gib_per_s: float,
    cache: Path | None,
    report: Callable[[str], None],
    compile_one: Callable[..., Result] | None = None,
) -> list[Result]:
    """Compiles the most promising candidates within a time; best first, refused ones last.

    Args:
      config: resolved.
      minutes: no new compilation starts after these.
      jobs: compilers at a time; each needs a core and 3 GiB.
      report: told each verdict.
      compile_one: in place of the compiler (for tests).

    Raises:
      LemurError: nothing that was compiled fits.
    """
    every = models.candidates(config, where, host_gib_per_s)
    if not every:
        raise LemurError(f"no mesh of {where.devices} devices divides this model and batch")
    report(f"{len(every)} configurations divide; compiling the most promising of them")
    results: list[Result] = []
    until = time.monotonic() + 60 * minutes
    compile_one = compile_one or compile_apart
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:

        def compile_all(chosen: Iterable[Candidate]) -> None:
            def in_time(candidate: Candidate) -> Result | None:
                late = bool(results) and time.monotonic() > until
                return None if late else compile_one(candidate, where, cache)

            running = [pool.submit(in_time, c) for c in chosen]
            for done in concurrent.futures.as_completed(running):
                if done.result() is not None:
                    results.append(done.result())
                    report(line(results[-1], where))

        waiting = short_list(every, where)
        while waiting and (not results or time.monotonic() < until):
            compile_all(waiting[:ROUND])
            waiting = waiting[ROUND:]
            best = _best(results, where)
            if best is not None and all(c.seconds > best.candidate.seconds for c in waiting):
                break
            if best is not None and len(results) >= 2 * ROUND:
                break
        best = _best(results, where)
        if best is not None and time.monotonic() < until:
            compile_all(variants(best.candidate))
    results.sort(key=lambda r: (r.refusal is not None, not _spares(r, where), r.score))
    if results[0].refusal is not None:
        raise LemurError(
            f"none of the {len(results)} configurations that were compiled fits {where.name}: take "
            "a larger slice, or allow more offloading with --host_gib_per_s"
        )
    return results


def short_list(every: list[Candidate], where: Slice) -> list[Candidate]:
    """What to compile, in order: of each remat policy the fastest that the model lets fit, with two
    that would win if the model were a little wrong about their memory; then each policy's other
    meshes."""
    usable = where.chip.hbm_bytes - SPARE_BYTES
    sure = [c for c in every if c.hbm_bytes <= usable]
    close = [c for c in every if usable < c.hbm_bytes <= usable * (1 + MODEL_ERROR)]
    first = _firsts(sure, _policy)
    others = [c for c in _firsts(sure, lambda c: (_policy(c), c.config.mesh)) if c not in first]
    best = first[0].seconds if first else float("inf")
    maybe = _firsts([c for c in close if c.seconds < best], _policy)[: ROUND // 3]
    return [*first[: ROUND - len(maybe)], *maybe, *first[ROUND - len(maybe) :], *others]


def _policy(c: Candidate) -> tuple:
    return c.config.model.remat, c.config.model.remat_saved, c.config.model.remat_offloaded


def _firsts(ranked: list[Candidate], key: Callable[[Candidate], Any]) -> list[Candidate]:
    """The first candidate of each key."""
    found: dict[Any, Candidate] = {}
    for c in ranked:
        found.setdefault(key(c), c)
    return list(found.values())


def variants(candidate: Candidate) -> list[Candidate]:
    """The same configuration with other flags and a smaller loss chunk."""
    config = candidate.config
    fused = config.compiler_options == models.FUSED
    flags = models.SEPARATE if fused else models.FUSED
    other = dataclasses.replace(config, compiler_options=flags)
    half = dataclasses.replace(config.loss, chunk_tokens=config.loss.chunk_tokens // 2)
    return [
        dataclasses.replace(candidate, config=changed)
        for changed in (other, dataclasses.replace(config, loss=half))
    ]


def compile_apart(candidate: Candidate, where: Slice, cache: Path | None) -> Result:
    """`compile_candidate` in a process of its own."""
    try:
        return apart(compile_candidate, candidate, where, cache)
    except ProcessDied as death:
        return Result(candidate, str(death))


def compile_candidate(candidate: Candidate, where: Slice, cache: Path | None) -> Result:
    """What the compiler makes of a candidate."""
    from lemur_jax.plan import libtpu

    libtpu.prepare()
    from lemur_jax.plan.analysis import analyse
    from lemur_jax.plan.cache import compile_cached
    from lemur_jax.plan.programs import CompileRefused

    try:
        found = analyse(compile_cached(candidate.config, where, "train", None, cache))
    except CompileRefused as refusal:
        return Result(candidate, refusal.reason())
    except ConfigError as error:  # the slice's sides cannot be laid out as this mesh
        return Result(candidate, error.problems[0])
    return Result(candidate, None, found.needed_bytes, found.memory.host_bytes, found.interval)


def line(result: Result, where: Slice) -> str:
    """One result for the terminal and for the gin file."""
    c, gib = result.candidate, 2**30
    extra = f"; loss chunk {c.config.loss.chunk_tokens}"
    extra += "; gathers fused" if c.config.compiler_options == models.FUSED else ""
    if result.refusal is not None:
        return f"does not fit: {c}{extra}: {result.refusal} (model {c.hbm_bytes / gib:.1f} GiB)"
    low, high = result.seconds
    host = f", host {result.host_bytes / gib:.1f} GiB" if result.host_bytes else ""
    return (
        f"fits, {low:.2f} .. {high:.2f} s, {result.hbm_bytes / gib:.2f} of "
        f"{where.chip.hbm_bytes / gib:.2f} GiB{host}: {c}{extra} "
        f"(model {c.seconds:.1f} s, {c.hbm_bytes / gib:.1f} GiB)"
    )


def gin_text(results: list[Result], where: Slice, minutes: float) -> str:
    """A hardware file of the winner, with the reasons."""
    best, c = results[0], results[0].candidate.config
    lines = [
        f"# Found by `lemur plan --search` for {where.name} in {minutes:.0f} minutes.",
        "# Compiler-predicted; seconds are a time model's best and worst corner. Compiled:",
        *(f"#   {line(r, where)}" for r in results),
    ]
    if not _spares(best, where):
        lines.append("# It leaves less than 1 GiB: nothing that was compiled leaves more.")
    if best.host_bytes:
        rate = best.candidate.host_bytes_per_s / 2**30
        lines.append(f"# Offloading needs about {rate:.1f} GiB/s a device in each direction.")
    mesh = {f: getattr(c.mesh, f) for f in ("data", "fsdp_outer", "fsdp", "sequence", "tensor")}
    lines += [f"MeshConfig.{name} = {size}" for name, size in mesh.items()]
    lines += [
        f"MeshConfig.dcn_data = {c.mesh.dcn_data}",
        f"TrainConfig.micro_batches = {c.micro_batches}",
        f"TrainConfig.explicit_gradients = {c.explicit_gradients}",
        f"TrainConfig.compiler_options = {c.compiler_options!r}",
        f"ModelConfig.remat = {c.model.remat!r}",
        f"ModelConfig.remat_saved = {c.model.remat_saved!r}",
        f"ModelConfig.remat_offloaded = {c.model.remat_offloaded!r}",
        f"LossConfig.chunk_tokens = {c.loss.chunk_tokens}",
    ]
    return "\n".join(lines) + "\n"


def _spares(result: Result, where: Slice) -> bool:
    return result.hbm_bytes <= where.chip.hbm_bytes - SPARE_BYTES


def _best(results: list[Result], where: Slice) -> Result | None:
    fitting = [r for r in results if r.refusal is None and _spares(r, where)]
    return min(fitting, key=lambda r: r.score, default=None)
