"""Programs compiled ahead of time: kept with what they were compiled for, compared before they run.

    DIR/train/executable.bin    jax.experimental.serialize_executable's bytes
    DIR/train/trees.bin         structures of arguments and results
    DIR/train/meta.json         `facts`, and the digests of the two

`lemur plan --save=DIR` writes, `lemur train --compiled=DIR` reads. Both binary files are pickles,
which run code when they are read: use a directory that you wrote.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pickle
from pathlib import Path
from typing import Any

import jax
import lemur_kernels
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import lemur_jax
from lemur_jax.config import TrainConfig
from lemur_jax.errors import LemurError
from lemur_jax.model import param
from lemur_jax.train import programs

META = "meta.json"
EXECUTABLE = "executable.bin"
TREES = "trees.bin"
FORMAT = 1
SHOWN = 12  # differences in one message


class CompiledError(LemurError):
    """A saved program cannot be used here; each difference is named: saved value and own."""


def facts(name: str, config: TrainConfig, mesh: Mesh, program: programs.Program) -> dict[str, Any]:
    """All that a compiled program depends on, as JSON. Where the facts are equal it may run.

    Args:
      name: of the program: "train", "evaluate".
      config: resolved. Paths, seeds, and how often to log, save and evaluate do not enter.
    """
    device = mesh.devices.flat[0]
    return {
        "format": FORMAT,
        "program": name,
        "versions": versions(),
        "code": code_fingerprint(),
        "devices": {"kind": device.device_kind, "count": mesh.size, "order": _order(mesh)},
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "options": programs.options(config),
        "config": configured(config),
        "arguments": {
            leaf_name: f"{leaf.dtype.name}{list(leaf.shape)} over {leaf.sharding.spec}"
            for leaf_name, leaf in param.flatten(program.arguments).items()
        },
    }


def configured(config: TrainConfig) -> dict[str, Any]:
    """The part of a config that decides what the programs compute."""
    return {
        "model": dataclasses.asdict(config.model),
        "lora": None if config.lora is None else dataclasses.asdict(config.lora),
        "optimizer": dataclasses.asdict(config.optimizer),
        "loss": dataclasses.asdict(config.loss),
        "batch_size": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "micro_batches": config.micro_batches,
        "steps": config.steps,  # the schedule's end is a constant of the step
    }


def versions() -> dict[str, str]:
    """Of what compiles and runs."""
    found = {}
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache
def code_fingerprint() -> str:
    """Of the source of lemur_jax and lemur_kernels, their tables included. `lemur_jax.plan` counts
    as far as it makes programs: how they are reported changes nothing in them."""
    readers = {"plan", "cli.py"}
    digest = hashlib.sha256()
    for package in (lemur_jax, lemur_kernels):
        root = Path(next(iter(package.__path__)))
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.csv")]):
            relative = path.relative_to(root)
            if relative.parts[0] in readers and relative.name not in _PLAN_SOURCES:
                continue
            digest.update(f"{root.name}/{relative}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


_PLAN_SOURCES = ("slices.py", "chips.py", "programs.py", "serving.py")


def _order(mesh: Mesh) -> str:
    """Which chip sits where in the mesh, as a digest: where it differs the names in `devices` and
    `mesh` say why, or the devices were listed in another order."""
    places = [
        (getattr(d, "slice_index", 0) or 0, *getattr(d, "coords", (d.id,)), getattr(d, "core", 0))
        for d in mesh.devices.flat
    ]
    return hashlib.sha256(repr(places).encode()).hexdigest()[:16]


def save(directory: Path, executable: jax.stages.Compiled, about: dict[str, Any]) -> None:
    """Writes a compiled program and its facts; meta.json last.

    Args:
      directory: new or empty; of this one program.
    """
    payload, in_tree, out_tree = serialize_executable.serialize(executable)
    directory.mkdir(parents=True, exist_ok=True)
    files = {EXECUTABLE: payload, TREES: pickle.dumps((in_tree, out_tree))}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    text = json.dumps(about | {"files": digests}, indent=1)
    (directory / META).write_text(text + "\n")


def load(directory: Path, own: dict[str, Any]) -> jax.stages.Compiled:
    """A saved program, ready to run on this process's devices.

    Args:
      directory: of one program, as `save` wrote it.
      own: `facts` of the run at hand.

    Raises:
      CompiledError: not there, damaged, or compiled for something else: what, saved and own.
    """
    meta = directory / META
    if not meta.is_file():
        raise CompiledError(
            f"{directory} holds no {META}: it is not a program of `lemur plan --save`"
        )
    saved = json.loads(meta.read_text(encoding="utf-8"))
    digests = saved.pop("files", {})
    found = differences(saved, own)
    if found:
        more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise CompiledError(
            "\n  ".join(
                [
                    f"{directory} was compiled for something else (compile again with `lemur plan "
                    "--save`, or leave --compiled out):",
                    *found[:SHOWN],
                    *more,
                ]
            )
        )
    content = {}
    for name in (EXECUTABLE, TREES):
        content[name] = (directory / name).read_bytes()
        if hashlib.sha256(content[name]).hexdigest() != digests.get(name):
            raise CompiledError(f"{directory / name} is damaged: its digest is not {META}'s")
    in_tree, out_tree = pickle.loads(content[TREES])
    return serialize_executable.deserialize_and_load(content[EXECUTABLE], in_tree, out_tree)


def differences(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """One line for each fact that differs: `mesh.fsdp: saved 256, here 128`."""
    before, now = _flat(saved), _flat(own)
    lines = []
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            a, b = (_shown(side, name) for side in (before, now))
            lines.append(f"{name}: saved {a}, here {b}")
    return lines


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _shown(side: dict[str, Any], name: str) -> str:
    return repr(side[name]) if name in side else "absent"
