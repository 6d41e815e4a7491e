"""The `lemur` command: flags to calls, errors to one clear message.

Nothing heavy is imported before a sub-command runs: `lemur --help` answers at once, and `sample`
and `convert` never see TensorFlow.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lemur_jax import cli_convert, cli_data
from lemur_jax.errors import LemurError, UsageError

EXIT_FAILED_CHECK = 1  # of check
EXIT_BAD_INPUT = 2
EXIT_DOES_NOT_FIT = 3  # lemur plan
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_TERMINATED = 143  # 128 + SIGTERM: saved and stopped as asked


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command; the exit status: 0 done, 1 two models differ or a check failed, 2 bad
    input, 3 a plan does not fit, 130 Ctrl-C, 143 stopped by SIGTERM."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        options, bindings = _parse(argv)
        return options.run(options, bindings) or 0
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print("lemur: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (LemurError, OSError) as error:  # OSError: disk full, no permission; names its file
        print(f"lemur: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and the NAME=VALUE of each --gin.NAME=VALUE."""
    bindings = [flag.removeprefix("--gin.") for flag in argv if flag.startswith("--gin.")]
    rest = [flag for flag in argv if not flag.startswith("--gin.")]
    for binding in bindings:
        if "=" not in binding:
            raise UsageError(f"--gin.{binding} has no value: write --gin.{binding}=VALUE")
    if rest[:2] == ["convert", "parity"]:  # two words, one command
        rest = ["convert parity", *rest[2:]]
    parser = _parser()
    options, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = [flag for action in options.parser._actions for flag in action.option_strings]
        problems = []
        for word in unknown:
            close = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; flags: {', '.join(flags)}"
            problems.append(f"unknown argument {word}{hint}")
        raise UsageError("\n".join(problems))
    if bindings and "gin_file" not in options:
        raise UsageError(f"--gin.{bindings[0]}: this command takes no gin settings")
    return options, bindings


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lemur",
        description="Train, convert and sample Llama-class models in JAX.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, summary: str, into=commands) -> argparse.ArgumentParser:
        made = into.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        made.set_defaults(run=run, parser=made)
        return made

    def gin(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--gin_file", action="append", default=[], metavar="F", help="may repeat; later wins"
        )
        made.epilog = "--gin.NAME=VALUE overrides any setting, e.g. --gin.TrainConfig.steps=100"

    train = command("train", _train, "train or resume a run described by gin files")
    gin(train)
    train.add_argument(
        "--dry_run", action="store_true", help="print config, sizes, mesh and memory, then stop"
    )
    train.add_argument(
        "--compiled", metavar="DIR", help="run the programs that `lemur plan --save=DIR` compiled"
    )
    train.add_argument(
        "--coordinator", help="HOST:PORT of process 0, or 'auto' on a TPU pod or SLURM"
    )
    train.add_argument("--processes", type=int, help="number of processes, with HOST:PORT")
    train.add_argument("--process", type=int, help="number of this one, from 0, with HOST:PORT")

    check = command("check", _check, "certify a run's data, masks and gradients before it starts")
    gin(check)
    check.add_argument(
        "--layers", type=int, help="of the model that is run; default: as many as fit in memory"
    )
    check.add_argument("--rows", type=int, default=64, help="of data that are looked at (64)")

    plan = command("plan", _plan, "compile a run for a TPU slice that nobody holds, and report")
    gin(plan)
    plan.add_argument(
        "--topology", required=True, metavar="NAME", help="e.g. v4-512, v5e-256, 2xv4-256"
    )
    plan.add_argument(
        "--program", default="train", help="of train,evaluate,prefill,decode; default: train"
    )
    plan.add_argument("--json", metavar="F", help="where the figures go")
    plan.add_argument("--save", metavar="DIR", help="keep the executables, for train --compiled")
    plan.add_argument("--cache", metavar="DIR", help="default: ~/.cache/lemur_jax/plan")
    plan.add_argument("--rows", type=int, help="of a batch of prefill and decode")
    plan.add_argument("--prompt_tokens", type=int, help="of prefill")
    plan.add_argument("--cache_tokens", type=int, help="of decode")
    plan.add_argument(
        "--search", action="store_true", help="find mesh, micro-batches, remat and flags"
    )
    plan.add_argument("--output", metavar="F.gin", help="of --search: the winner")
    plan.add_argument("--search_minutes", type=float, default=12.0)
    plan.add_argument("--jobs", type=int, default=3, help="of --search: compilers at a time")
    plan.add_argument(
        "--host_gib_per_s", type=float, default=8.0, help="of --search: for offloading; 0: none"
    )

    cli_convert.add(command)

    sample = command("sample", _sample, "generate text from a run, checkpoint or HF directory")
    sample.add_argument("path", metavar="PATH")
    sample.add_argument("--prompt", help="text to continue")
    sample.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message; ends with the answer"
    )
    sample.add_argument("--system", metavar="TEXT", help="message of the system, with --chat")
    sample.add_argument("--input", metavar="F.jsonl", help='one {"prompt": ...} a line')
    sample.add_argument("--output", metavar="G.jsonl", help="where the answers to --input go")
    sample.add_argument("--max_new_tokens", type=int, default=128)
    sample.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    sample.add_argument("--top_k", type=int, default=0, help="0: off")
    sample.add_argument("--top_p", type=float, default=1.0)
    sample.add_argument("--min_p", type=float, default=0.0)
    sample.add_argument("--repetition_penalty", type=float, default=1.0)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--n", type=int, default=1, help="samples of the prompt")
    sample.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may repeat")
    sample.add_argument("--dtype", help="compute dtype; default: the model's")
    sample.add_argument("--no_stream", action="store_true", help="print only when done")

    cli_data.add(command, gin)
    return parser


# ---------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------


def config_classes() -> list[type]:
    from lemur_jax import config

    return [
        kind
        for kind in vars(config).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    ]


def _train(options: argparse.Namespace, bindings: list[str]) -> int:
    from lemur_jax import config, settings

    _check_process_flags(options)
    run, text = settings.load(config.TrainConfig, options.gin_file, bindings, config_classes())
    _join_processes(options)
    if options.dry_run:
        _dry_run(run, text)
        return 0
    import jax

    if jax.process_index() == 0:
        from lemur_jax.check import certificate
        from lemur_jax.data.pipeline import read_manifest

        print(certificate.found_for(run.run_dir, text, read_manifest(run.data.path)))
    from lemur_jax.train import loop

    result = loop.train(run, text, options.compiled and Path(options.compiled))
    return 0 if result.finished else EXIT_TERMINATED


def _check(options: argparse.Namespace, bindings: list[str]) -> int:
    from lemur_jax import config, settings

    if options.rows < 1:
        raise UsageError(f"--rows={options.rows} must be positive")
    run, text = settings.load(config.TrainConfig, options.gin_file, bindings, config_classes())
    from lemur_jax.check.run import check

    def say(line: str) -> None:
        print(line, flush=True)

    found = check(run, text, layers=options.layers, rows=options.rows, say=say)
    return 0 if found.passed else EXIT_FAILED_CHECK


def _check_process_flags(options: argparse.Namespace) -> None:
    counted = options.processes is not None and options.process is not None
    if options.coordinator is None:
        if options.processes is not None or options.process is not None:
            raise UsageError("--processes and --process need --coordinator=HOST:PORT")
    elif options.coordinator != "auto" and not counted:
        raise UsageError(
            f"--coordinator={options.coordinator} needs --processes=N and --process=I, "
            "or use --coordinator=auto"
        )


def _join_processes(options: argparse.Namespace) -> None:
    if options.coordinator is None:
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for CPU devices only
    if options.coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)


def _dry_run(run, text: str) -> None:
    import jax
    from rich.console import Console
    from rich.table import Table

    from lemur_jax import sharding
    from lemur_jax.train import programs
    from lemur_jax.train.epochs import with_steps
    from lemur_jax.train.estimate import estimate

    console, run = Console(), with_steps(run)
    console.print(text, markup=False, highlight=False)
    free = -1 in dataclasses.astuple(run.mesh)
    mesh = sharding.resolve_mesh(run.mesh, jax.device_count()) if free else run.mesh
    sharding.check(
        run.model,
        mesh,
        rows=run.data.batch_size // run.micro_batches,
        sequence_length=run.data.sequence_length,
    )
    backend = jax.default_backend()
    run = dataclasses.replace(run, mesh=mesh)
    attention = programs.describe_attention(run, jax.devices()[0])
    run = programs.resolve(run, jax.devices()[0])
    sizes = estimate(run, mesh)
    table = Table("what", "value", title="dry run: nothing was allocated, compiled or written")
    gib = 2**30
    for name, value in {
        "parameters": f"{sizes.parameters:,}",
        "trained of them, or beside them": f"{sizes.trained:,}",
        "tokens of the run": f"{sizes.tokens:,}",
        "model FLOPs of a step": f"{sizes.flops_per_step:.3e}",
        "mesh": ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(mesh).items()),
        "devices of the mesh / here": f"{sizes.devices} / {jax.device_count()} ({backend})",
        "attention": attention,
        "loss": run.loss.implementation,
        "parameters, GiB a device": f"{sizes.parameter_bytes / gib:.3f}",
        "optimizer state, GiB a device": f"{sizes.optimizer_bytes / gib:.3f}",
        "gradients, GiB a device": f"{sizes.gradient_bytes / gib:.3f}",
        "saved activations, GiB a device (traced)": f"{sizes.activation_bytes / gib:.3f}",
        "logits of a chunk, GiB a device": f"{sizes.logits_bytes / gib:.3f}",
        "sum, GiB a device (estimate)": f"{sizes.total_bytes / gib:.3f}",
    }.items():
        table.add_row(name, value)
    console.print(table)


# ---------------------------------------------------------------------------------------------
# plan
# ---------------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace, bindings: list[str]) -> int:
    from lemur_jax import config, settings
    from lemur_jax.plan import libtpu

    libtpu.prepare()  # before jax looks for its backends
    from lemur_jax.plan import command

    run, _ = settings.load(
        config.TrainConfig, options.gin_file, bindings, config_classes(), command.UNUSED
    )
    if run.epochs is not None:  # of a data set that need not be there; days scale with the steps
        print(f"lemur: note: epochs={run.epochs} planned as 1000 steps", file=sys.stderr)
        run = dataclasses.replace(run, steps=1000, epochs=None)
    paths = {name: getattr(options, name) for name in ("json", "save", "cache", "output")}
    looking = ("search", "search_minutes", "jobs", "host_gib_per_s")
    asked = command.Options(
        topology=options.topology,
        program=command.program_names(options.program),
        rows=options.rows,
        prompt_tokens=options.prompt_tokens,
        cache_tokens=options.cache_tokens,
        **{name: getattr(options, name) for name in looking},
        **{name: Path(path) if path else None for name, path in paths.items()},
    )
    return 0 if command.plan(run, asked) else EXIT_DOES_NOT_FIT


# ---------------------------------------------------------------------------------------------
# sample
# ---------------------------------------------------------------------------------------------


def _sample(options: argparse.Namespace, _: list[str]) -> int:
    if (options.prompt is None) == (options.input is None):
        raise UsageError("give --prompt=TEXT or --input=F.jsonl, one of them")
    if (options.input is None) != (options.output is None):
        raise UsageError("--input and --output go together")
    if options.system is not None and not options.chat:
        raise UsageError("--system needs --chat")
    from lemur_jax.sample.request import Request
    from lemur_jax.sample.sampler import Sampler

    fields = {
        name: getattr(options, name)
        for name in (
            *("max_new_tokens", "temperature", "top_k", "top_p", "min_p"),
            *("repetition_penalty", "seed", "n"),
        )
    } | {"stop": tuple(options.stop)}
    first = Request(prompt=options.prompt or "", **fields)  # bad flags, before the weights load
    sampler = Sampler.load(options.path, dtype=options.dtype)
    prepare = None
    if options.chat:
        from lemur_jax.sample.chat import as_chat

        prepare = as_chat(sampler.tokenizer, options.system)
    if options.input is not None:
        from lemur_jax.sample.batch import sample_file

        def show(done: int, total: int) -> None:
            print(f"lemur: {done} of {total} lines", file=sys.stderr)

        made = sample_file(sampler, options.input, options.output, fields, show, prepare)
        print(
            f"wrote {options.output}: {made.sampled} lines, {made.new_tokens} new tokens"
            + (f"; {made.kept} lines were there already" if made.kept else "")
        )
        return 0
    shown = options.prompt
    if prepare is not None:
        first, shown = prepare(first), ""  # an answer stands alone
    start = time.perf_counter()
    completions = []
    if options.no_stream or options.n > 1:
        completions = sampler.generate([first])
        for done in completions:
            if options.n > 1:
                print(f"--- sample {done.sample}")
            print(shown + done.text)
    else:
        print(shown, end="", flush=True)
        for piece in sampler.stream(first):
            print(piece.text, end="", flush=True)
            if piece.completion is not None:
                completions.append(piece.completion)
        print()
    seconds, tokens = time.perf_counter() - start, sum(len(done.ids) for done in completions)
    for note in {done.note for done in completions if done.note}:
        print(f"lemur: note: {note}", file=sys.stderr)
    print(
        f"lemur: {tokens} tokens in {seconds:.2f} s, compilation included; "
        f"ended by: {', '.join(done.finish_reason for done in completions)}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
