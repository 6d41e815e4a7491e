"""`lemur convert`: flags to calls. Nothing heavy is imported before a command runs (see cli.py)."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from lemur_jax.errors import UsageError

EXIT_DIFFERENT = 1  # of verify and parity


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `lemur convert`, with verify, and `lemur convert parity`.

    Args:
      command: cli's: (name, run, summary) -> parser of a command.
    """
    convert = command("convert", _convert, "convert weights between formats; verify two models")
    convert.usage = "lemur convert SRC DST [flags] | lemur convert verify A B [flags]"
    convert.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="SRC: run, checkpoint, Hugging Face directory (safetensors or .bin), Meta's or "
        "EasyLM's weights; DST: new directory. Or the word verify and two models",
    )
    convert.add_argument(
        "--to", choices=("hf", "lemur", "easylm", "peft"), help="default: lemur, or hf"
    )
    convert.add_argument("--dtype", help="float32, bfloat16 or float16; default: as stored")
    convert.add_argument("--max_ram", default="4GiB", help="memory that it may take (4GiB)")
    convert.add_argument("--max_shard_bytes", type=int, help="of a safetensors file (5000000000)")
    convert.add_argument(
        "--mesh", metavar="fsdp=4,tensor=8", help="chunks of a checkpoint as this mesh reads them"
    )
    convert.add_argument(
        "--add_tokens", metavar="A,B", help="new tokens, or the word chatml for its five"
    )
    convert.add_argument("--vocab_size", type=int, help="rows of the result; default: as needed")
    convert.add_argument("--new_rows", choices=("mean", "zeros"), help="what new rows hold (mean)")
    convert.add_argument("--max_positions", type=int, help="of Meta's weights, which do not say it")
    convert.add_argument(
        "--base", metavar="MODEL", help="under PEFT's adapters; with --to=peft what they call it"
    )
    convert.add_argument("--process", type=int, default=0, help="number of this one, from 0")
    convert.add_argument("--processes", type=int, default=1, help="that share the work")
    convert.add_argument("--dry_run", action="store_true", help="print the plan, then stop")

    parity = command("convert parity", _parity, "compare two models and say what is the matter")
    parity.add_argument(
        "a", metavar="A", help="trusted model, of any format; the reference runs it"
    )
    parity.add_argument(
        "b", metavar="B", nargs="?", help="our code runs it; none: judge A by itself and by a text"
    )
    parity.add_argument("--tokens", type=int, default=16, help="of each of two rows")
    parity.add_argument("--text", metavar="FILE", help="to judge A alone; default: a passage")
    parity.add_argument("--max_positions", type=int, help="of Meta's weights, which do not say it")
    parity.add_argument(
        "--transformers", action="store_true", help="transformers' layers are compared too"
    )


def _convert(options: argparse.Namespace, _: list[str]) -> int:
    if options.paths[0] == "verify":
        return _verify(options)
    if len(options.paths) != 2:
        raise UsageError(f"convert takes SRC and DST, {len(options.paths)} paths were given")
    _leave_accelerators()
    from lemur_jax.convert.convert import convert
    from lemur_jax.convert.model import open_source
    from lemur_jax.convert.options import Options
    from lemur_jax.convert.plan import parse_bytes
    from lemur_jax.convert.recognise import recognise
    from lemur_jax.convert.vocabulary import CHATML

    source, target = options.paths
    kind = recognise(source)
    to = options.to or ("hf" if kind == "lemur" else "lemur")
    if to == "peft":
        return _export_peft(source, target, options)
    tokens = (options.add_tokens or "").split(",") if options.add_tokens else []
    tokens = CHATML if tokens == ["chatml"] else tuple(tokens)
    changed = (
        *(options.dtype, options.mesh, options.vocab_size, options.max_shard_bytes),
        *tokens,
    )
    if to == kind and not any(changed) and open_source(source).format == kind:
        raise UsageError(f"{source} is already {kind!r}; --to must be another format")
    convert(
        source,
        target,
        Options(
            to=to,
            dtype=options.dtype,
            max_ram=parse_bytes(options.max_ram),
            max_shard_bytes=options.max_shard_bytes,
            mesh=_mesh(options.mesh),
            add_tokens=tokens,
            vocab_size=options.vocab_size,
            new_rows=options.new_rows,
            max_positions=options.max_positions,
            base=options.base,
            process=options.process,
            processes=options.processes,
        ),
        dry_run=options.dry_run,
        say=lambda line: print(line, flush=True),
    )
    if options.dry_run:
        return 0
    if kind == "hf" and to == "lemur":
        _note_tokenizer(source)
    print(f"wrote {target}")
    return 0


def _export_peft(source: str, target: str, options: argparse.Namespace) -> int:
    from lemur_jax.convert.model import open_source
    from lemur_jax.convert.peft import export_peft

    refused = ("dtype", "mesh", "add_tokens", "vocab_size", "dry_run")
    if given := [f"--{name}" for name in refused if getattr(options, name)]:
        raise UsageError(f"--to=peft writes adapters as they are: remove {', '.join(given)}")
    export_peft(open_source(source), target, options.base)
    print(f"wrote {target}")
    return 0


def _parity(options: argparse.Namespace, _: list[str]) -> int:
    _leave_accelerators()
    from lemur_jax.convert.parity import parity

    report = parity(
        options.a,
        options.b,
        tokens=options.tokens,
        text=options.text,
        transformers=options.transformers,
        max_positions=options.max_positions,
        say=lambda line: print(line, flush=True),
    )
    return 0 if report.same else EXIT_DIFFERENT


def _verify(options: argparse.Namespace) -> int:
    if len(options.paths) != 3:
        raise UsageError("verify takes two models: lemur convert verify A B")
    taken = {"paths", "dtype", "max_ram", "max_positions", "run", "parser"}
    given = [
        f"--{name}"
        for name, value in vars(options).items()
        if name not in taken and value != options.parser.get_default(name)
    ]
    if given:
        raise UsageError(f"verify compares two models as they are: remove {', '.join(given)}")
    _leave_accelerators()
    from lemur_jax.convert.plan import parse_bytes
    from lemur_jax.convert.verify import verify

    found = verify(
        *options.paths[1:],
        dtype=options.dtype,
        max_ram=parse_bytes(options.max_ram),
        max_positions=options.max_positions,
        say=lambda line: print(line, flush=True),
    )
    return EXIT_DIFFERENT if found else 0


def _leave_accelerators() -> None:
    """All of this is work for the host: a run may be using the accelerators."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _mesh(text: str | None):
    """fsdp=4,tensor=8 as a MeshConfig; sizes that are not named are 1."""
    if text is None:
        return None
    from lemur_jax.config import MeshConfig

    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in {field.name for field in dataclasses.fields(MeshConfig)}:
            raise UsageError(f"--mesh={text}: {name!r} is no axis; write --mesh=fsdp=4,tensor=8")
        if name in sizes:
            raise UsageError(f"--mesh={text}: {name} is given twice")
        if not size.isdigit():
            raise UsageError(f"--mesh={text}: {name} needs a number")
        sizes[name] = int(size)
    return MeshConfig(**({"fsdp": 1} | sizes))


def _note_tokenizer(source: str) -> None:
    """Weights convert without a tokenizer, but nothing can be sampled: say so at once."""
    from lemur_jax.config import ConfigError
    from lemur_jax.convert.hf_config import config_from_hf
    from lemur_jax.convert.json_file import read_json
    from lemur_jax.data.tokenizer import Tokenizer

    vocab_size = config_from_hf(read_json(Path(source) / "config.json")).vocab_size
    try:
        found = Tokenizer.load(source).vocab_size
    except ConfigError as error:
        print(f"lemur: note: no usable tokenizer came along: {error}", file=sys.stderr)
        return
    if found > vocab_size or found < vocab_size - 1024:
        print(
            f"lemur: note: the tokenizer has {found} tokens, the model vocab_size={vocab_size}: "
            "they do not belong together",
            file=sys.stderr,
        )
