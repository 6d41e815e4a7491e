"""Who may import whom, and what must stay out of a process: architecture as a test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = {"cli", "cli_convert", "cli_data"}  # may import anything, late
# Package or module -> what of lemur_jax it may import; and the only doors to some libraries.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "settings": {"config", "errors"},
    "sharding": {"config"},
    "checkpoint": {"errors"},
    "model": {"config", "sharding"},
    "data": {"config", "errors"},
    "convert": {"config", "sharding", "model", "checkpoint", "data", "errors"},
    "train": {"config", "sharding", "model", "data", "checkpoint", "convert", "errors"},
    "sample": {"config", "sharding", "model", "data", "checkpoint", "convert", "errors"},
    "check": {"config", "sharding", "model", "data", "convert", "train"},
    "plan": {"config", "sharding", "model", "train", "sample", "errors"},
}
DOORS = {
    "gin": {"settings"},
    "flax": {"model", "train"},  # train: optimizer states are trees of Params
    "orbax": {"checkpoint"},
    "optax": {"train"},
    "seqio": {"data"},
    "tensorflow": {"data"},
    "tensorflow_datasets": {"data"},
    "array_record": {"data"},
    "pyarrow": {"data"},
    "datasets": {"data"},
    "fsspec": {"data"},
    "zstandard": {"data"},
    "datasketch": {"data"},
    "langdetect": {"data"},
    "torch": set(),
    "transformers": set(),
    "tests": set(),
    "tools": set(),
}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "lemur_jax").rglob("*.py")), ids=str)
def test_import_directions(path):
    """Red if sharding.py imports lemur_jax.model, or cli's `import gin` moves to config.py."""
    part = path.relative_to(ROOT / "lemur_jax").parts[0].removesuffix(".py")
    if part == "__init__" or part in COMMANDS:
        return
    for name in _imports(path):
        head, *rest = name.split(".")
        if head == "lemur_jax" and rest and rest[0] != part:
            assert rest[0] in ALLOWED[part], f"{path.name} must not import {name}"
        if head in DOORS:
            assert part in DOORS[head], f"{path.name} must not import {head}"


def test_the_manifest_needs_no_jax():
    """Red if checkpoint/manifest.py imports jax, orbax or a sibling that does."""
    allowed = {"etils", "lemur_jax", *sys.stdlib_module_names}
    for name in _imports(ROOT / "lemur_jax" / "checkpoint" / "manifest.py"):
        assert name.split(".")[0] in allowed, f"manifest.py must not import {name}"
        assert not name.startswith("lemur_jax.checkpoint"), f"manifest.py must not import {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=str)
def test_kernels_stand_alone(path):
    """Red if a kernel imports lemur_jax or flax."""
    allowed = {"jax", "numpy", "lemur_kernels", *sys.stdlib_module_names}
    for name in _imports(path):
        assert name.split(".")[0] in allowed, f"{path.name} must not import {name}"


def test_every_part_is_listed():
    """Red if a new top-level module appears without an entry in ALLOWED."""
    parts = {p.stem for p in (ROOT / "lemur_jax").iterdir() if not p.name.startswith("__")}
    assert parts - COMMANDS == set(ALLOWED)


@pytest.mark.parametrize(
    "module",
    [
        "lemur_jax.train.loop",
        "lemur_jax.train.metrics",
        "lemur_jax.sample.sampler",
        "lemur_jax.sample.chat",
        "lemur_jax.data.chat.build",
        "lemur_jax.convert.hf",
        "lemur_jax.plan.command",
        "lemur_jax.cli",
    ],
)
def test_no_tensorflow_no_torch(module):
    """Red if data/pipeline.py imports seqio at the top."""
    code = (
        f"import sys, {module}; "
        "bad = {'tensorflow', 'torch', 'seqio', 'transformers', 'pyarrow', 'datasketch', "
        "'langdetect'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy():
    """Red if cli.py imports jax at the top (lemur --help must answer in under half a second)."""
    code = (
        "import sys; sys.argv = ['lemur', '--help']\n"
        "from lemur_jax import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit(str({'jax', 'numpy', 'gin', 'rich'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
