"""Conversion at size: memory, speed, exactness, resume, and transformers on the same model.

    python tools/benchmarks/convert.py shapes --layers=80      # 70B shapes, holes for bytes
    python tools/benchmarks/convert.py real                    # 2 GB of real values, every pair
    python tools/benchmarks/convert.py kill                    # kill -9 at 20 points
    python tools/benchmarks/convert.py peers                   # against transformers load + save

Everything is written below --dir and removed. Every conversion is a process of its own, whose peak
memory the kernel counts (getrusage of the child). `shapes` reads holes: the page cache makes zeros
of them, so reading costs no disk; writing does: a process beside the converter syncs what was
written to the disk and then punches holes into it, so that 131 GiB of output fit on a small disk.
"""

import argparse
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from lemur_jax.config import ModelConfig, RopeConfig
from lemur_jax.convert import safetensors, tables
from lemur_jax.convert.hf_config import config_to_hf

GIB = 2**30
SHARD_BYTES = 10_000_000_000
# The converter asks for the space of its whole output first, of which `shapes` keeps holes only.
MAIN = """
import collections, os, shutil, sys
if os.environ.get("HOLES"):
    shutil.disk_usage = lambda _: collections.namedtuple("usage", "total used free")(0, 0, 1 << 50)
from lemur_jax import cli
sys.exit(cli.main(sys.argv[1:]))
"""
ENVIRONMENT = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}


def llama_70b(layers: int) -> ModelConfig:
    """Llama 2 70B, with some or all of its 80 layers."""
    return ModelConfig(
        vocab_size=32000, embed=8192, mlp=28672, layers=layers, heads=64, kv_heads=8, head_dim=128,
        max_positions=4096, rope=RopeConfig(theta=10000.0), norm_eps=1e-5, dtype="bfloat16",
        param_dtype="bfloat16",
    )  # fmt: skip


def model_2gb(layers: int = 22) -> ModelConfig:
    """About 1.1 B parameters: 2.2 GB of bfloat16, TinyLlama's shape."""
    return ModelConfig(
        vocab_size=32000, embed=2048, mlp=5632, layers=layers, heads=32, kv_heads=4, head_dim=64,
        max_positions=2048, rope=RopeConfig(theta=10000.0), norm_eps=1e-5, dtype="bfloat16",
        param_dtype="bfloat16",
    )  # fmt: skip


def write_hf(directory: Path, config: ModelConfig, *, values: bool, shard_bytes=SHARD_BYTES):
    """An HF directory: sparse files, or normally distributed bfloat16."""
    directory.mkdir(parents=True)
    dtype = np.dtype(ml_dtypes.bfloat16)
    planned = [
        safetensors.Planned(name, rule.their_shape(config), dtype)
        for rule in tables.hf_llama(config)
        for name in rule.source_names(config)
    ]
    files, index = safetensors.layout(directory, planned, shard_bytes)
    rng = np.random.default_rng(0)
    for file in files:
        with open(file.path, "wb") as out:
            out.write(file.header)
            for tensor in file.tensors if values else ():
                count = int(np.prod(tensor.shape))
                for first in range(0, count, 1 << 24):
                    part = rng.standard_normal(min(1 << 24, count - first), np.float32) * 0.02
                    out.write(part.astype(dtype).tobytes())
            out.truncate(file.size)
            out.flush()
            os.fsync(out.fileno())
    if index is not None:
        (directory / safetensors.INDEX).write_text(index)
    written = config_to_hf(config, None, "bfloat16")
    (directory / "config.json").write_text(json.dumps(written))
    return sum(file.size for file in files)


def run(*argv: str) -> tuple[float, float, str]:
    """Seconds, peak resident GiB and the output of a `lemur` command."""
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", MAIN, *argv], env=ENVIRONMENT, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stdout.close()
    if child.returncode:
        raise SystemExit(f"lemur {' '.join(argv)} failed ({child.returncode}): {output}")
    seconds = time.monotonic() - start
    busy = f"processor: {usage.ru_utime:.1f} s user, {usage.ru_stime:.1f} s system"
    return seconds, usage.ru_maxrss * 1024 / GIB, f"{output.strip()}\n{busy}"


def drop_cache(path: Path) -> None:
    """The next reader of these files goes to the disk."""
    for file in [path] if path.is_file() else (p for p in path.rglob("*") if p.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def tree_digest(path: Path) -> str:
    """Of all names and bytes below a directory."""
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as data:
            total.update(hashlib.file_digest(data, "sha256").digest())
    return total.hexdigest()


def size_of(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


class Puncher:
    """Syncs what grows below a directory to the disk, then makes holes of it: it is all zeros."""

    HEADER = 4 << 20  # of a safetensors file, which is not zeros
    SMALLEST = 16 << 20

    def __init__(self, directories: list[Path]):
        self.directories, self.stop = directories, threading.Event()
        self.thread = threading.Thread(target=self.work)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def work(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        while not self.stop.wait(1):
            for directory in self.directories:
                for file in sorted(directory.rglob("*")) if directory.exists() else ():
                    try:
                        found = file.stat()
                        if found.st_size < self.SMALLEST or found.st_blocks * 512 < self.SMALLEST:
                            continue
                        if file.name.endswith(".__lock"):
                            continue
                        descriptor = os.open(file, os.O_RDWR)
                    except (FileNotFoundError, NotADirectoryError):
                        continue
                    os.fdatasync(descriptor)
                    start = self.HEADER if file.suffix == ".safetensors" else 0
                    libc.fallocate(descriptor, 3, start, found.st_size - start)
                    os.close(descriptor)


def shapes(options) -> None:
    """70B shapes both ways under --max_ram."""
    root = options.dir
    config = llama_70b(options.layers)
    nbytes = write_hf(root / "hf", config, values=options.values)
    print(f"{options.layers} layers of 70B: {nbytes / GIB:.1f} GiB, max_ram {options.max_ram}")
    budget = f"--max_ram={options.max_ram}"
    if not options.values:
        ENVIRONMENT["HOLES"] = "1"
    for name, source, target, flags in (
        ("hf -> ours", "hf", "ours", []),
        ("ours -> hf", "ours", "back", ["--to=hf"]),
    ):
        if options.values:
            drop_cache(root / source)
        watched = [root / f".{target}.partial", root / target]
        guard = Puncher(watched) if not options.values else open(os.devnull)  # noqa: SIM115
        with guard:
            seconds, peak, output = run(
                "convert", str(root / source), str(root / target), budget, *flags
            )
        print(f"{name}: {seconds:.1f} s, {nbytes / 2**20 / seconds:.0f} MiB/s, peak {peak:.2f} GiB")
        print("   ", output.replace("\n", "\n    "))
    copy_speed(options)


def copy_speed(options) -> None:
    """The disk's own: `cp` of 6 GiB of random bytes out of a cold cache, with a sync."""
    root = options.dir
    root.mkdir(parents=True, exist_ok=True)
    block = os.urandom(64 << 20)
    with open(root / "copy.a", "wb") as out:
        for _ in range(96):
            out.write(block)
    drop_cache(root / "copy.a")
    start = time.monotonic()
    subprocess.run(["cp", root / "copy.a", root / "copy.b"], check=True)
    subprocess.run(["sync", root / "copy.b"], check=True)
    seconds = time.monotonic() - start
    print(f"cp of 6 GiB, cold, synced: {6 * 1024 / seconds:.0f} MiB/s")
    (root / "copy.a").unlink()
    (root / "copy.b").unlink()


def real(options) -> None:
    """Every format pair on real values: A -> B -> A is bit-identical, by verify and by bytes."""
    root = options.dir
    nbytes = write_hf(root / "hf", model_2gb(), values=True, shard_bytes=5_000_000_000)
    print(f"{nbytes / 1e9:.2f} GB of bfloat16")
    run("convert", str(root / "hf"), str(root / "lemur"))
    run("convert", str(root / "hf"), str(root / "easylm"), "--to=easylm")
    for a in ("hf", "lemur", "easylm"):
        for b in ("hf", "lemur", "easylm"):
            if a == b:
                continue
            there, back = root / "there", root / "back"
            drop_cache(root / a)
            seconds, peak, _ = run("convert", str(root / a), str(there), f"--to={b}")
            run("convert", str(there), str(back), f"--to={a}")
            _, _, said = run("convert", "verify", str(root / a), str(back))
            said = said.split("\n")[0]
            same = same_weights(root / a, back)
            print(
                f"{a} -> {b}: {seconds:.1f} s, {nbytes / 2**20 / seconds:.0f} MiB/s, peak "
                f"{peak:.2f} GiB; {a} -> {b} -> {a}: {said}; weight files "
                f"{'byte-identical' if same else 'laid out otherwise'}",
                flush=True,
            )
            shutil.rmtree(there)
            shutil.rmtree(back)


def same_weights(a: Path, b: Path) -> bool:
    """Whether all files of 1 MiB and more have the same bytes."""

    def large(path):
        return {
            str(p.relative_to(path)): hashlib.file_digest(open(p, "rb"), "sha256").digest()
            for p in path.rglob("*")
            if p.is_file() and p.stat().st_size >= 1 << 20
        }

    return large(a) == large(b)


def kill(options) -> None:
    """kill -9 at random points, again until it is done; then the digest of everything."""
    root = options.dir
    nbytes = write_hf(root / "hf", model_2gb(layers=6), values=True)
    print(f"{nbytes / 1e9:.2f} GB of bfloat16")
    run("convert", str(root / "hf"), str(root / "ours"))
    for to in options.kill_to.split(","):
        source = str(root / ("ours" if to == "hf" else "hf"))
        run("convert", source, str(root / "whole"), f"--to={to}", "--max_ram=2GiB")
        expected, longest = tree_digest(root / "whole"), 0.0
        start = time.monotonic()
        shutil.rmtree(root / "whole")
        run("convert", source, str(root / "whole"), f"--to={to}", "--max_ram=2GiB")
        longest = time.monotonic() - start
        same = tree_digest(root / "whole") == expected
        print(f"{to}: uninterrupted {longest:.1f} s, twice the same: {same}")
        shutil.rmtree(root / "whole")
        rng, identical, kills = random.Random(0), 0, 0
        for _ in range(options.points):
            while not (root / "killed").exists():
                child = subprocess.Popen(
                    [sys.executable, "-c", MAIN, "convert", source, str(root / "killed"),
                     f"--to={to}", "--max_ram=2GiB"],
                    env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                )  # fmt: skip
                try:
                    if child.wait(rng.uniform(0.4, 1.1) * longest):
                        raise SystemExit("a conversion failed")
                except subprocess.TimeoutExpired:
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    kills += 1
            identical += tree_digest(root / "killed") == expected
            left = [p.name for p in root.iterdir() if p.name.startswith(".killed")]
            if left:
                print(f"left behind: {left}")
            shutil.rmtree(root / "killed")
        print(f"{to}: {kills} kills, {identical} of {options.points} results byte-identical")


TRANSFORMERS = """
import resource, sys, time, torch, transformers
start = time.monotonic()
model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
import os
os.sync()
print(time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def peers(options) -> None:
    """transformers: load + save of the same directory; and ours both ways."""
    root = options.dir
    nbytes = write_hf(root / "hf", model_2gb(), values=True, shard_bytes=5_000_000_000)
    print(f"{nbytes / 1e9:.2f} GB of bfloat16; cold page cache, output synced")
    for repeat in range(2):
        drop_cache(root / "hf")
        done = subprocess.run(
            [sys.executable, "-c", TRANSFORMERS, str(root / "hf"), str(root / "theirs")],
            env=ENVIRONMENT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        seconds, peak = map(float, done.stdout.split()[-2:])
        print(f"{repeat}: transformers load + save: {seconds:.1f} s, peak {peak:.2f} GiB")
        drop_cache(root / "hf")
        seconds, peak, _ = run("convert", str(root / "hf"), str(root / "ours"))
        print(f"{repeat}: lemur convert hf -> ours: {seconds:.1f} s, peak {peak:.2f} GiB")
        drop_cache(root / "ours")
        seconds, peak, _ = run("convert", str(root / "ours"), str(root / "back"))
        print(f"{repeat}: lemur convert ours -> hf: {seconds:.1f} s, peak {peak:.2f} GiB")
        for name in ("theirs", "ours", "back"):
            shutil.rmtree(root / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("shapes", "real", "kill", "peers", "copy"))
    parser.add_argument("--dir", type=Path, default=Path("/tmp/lemur_convert_benchmark"))
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--values", action="store_true", help="shapes: real values, no holes")
    parser.add_argument("--max_ram", default="4GiB")
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--kill_to", default="lemur,hf")
    options = parser.parse_args()
    if options.dir.exists():
        raise SystemExit(f"{options.dir} exists: remove it")
    try:
        {"shapes": shapes, "real": real, "kill": kill, "peers": peers, "copy": copy_speed}[
            options.what
        ](options)
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)


if __name__ == "__main__":
    main()
