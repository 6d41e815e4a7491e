"""Other projects' own Hugging Face converters and ours, by turns, on the same 2.2 GB model.

    python tools/benchmarks/convert_peers.py --tokenizer=tokenizer.model \\
        transformers=PYTHON litgpt=PYTHON levanter=PYTHON easydel=PYTHON maxtext=PYTHON \\
        easylm=PYTHON:SOURCES llama.cpp=PYTHON:SOURCES [--repeats=3] [--dir=DIR]

PYTHON is the interpreter of an environment which has that peer; SOURCES is a checkout of a peer
that is no package. --tokenizer is any SentencePiece model of at most 32000 pieces: levanter and
llama.cpp want one. Prints one line for each run, then a table of medians.

Each run is a process of its own, started (posix_spawn) by a small one, so that the peak which the
kernel counts (getrusage) is its own. "Anonymous" is that without mapped files, read 50 times a
second. The page cache is cold before, imports are included, and so is a sync of what was written.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from convert import GIB, drop_cache, model_2gb, write_hf

LAUNCH = """
import os, sys, time
start, anonymous = time.monotonic(), 0
out = [(os.POSIX_SPAWN_DUP2, 2, 1)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=out)
while True:
    done, status, usage = os.wait4(pid, os.WNOHANG)
    if done:
        break
    with open(f"/proc/{pid}/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    anonymous = max(anonymous, int(fields.get("RssAnon", "0 kB").split()[0]))
    time.sleep(0.02)
processor = usage.ru_utime + usage.ru_stime
print(time.monotonic() - start, processor, usage.ru_maxrss, anonymous)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""

OURS = "import sys; from lemur_jax import cli; sys.exit(cli.main(sys.argv[1:]))"

# Each is run as `python -c SNIPPET SOURCE TARGET`; what a peer's defaults are, it keeps.
TRANSFORMERS = """
import sys, torch, transformers
model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""

# Writes beside its source, so TARGET gets links to it.
LITGPT = """
import os, pathlib, sys
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir()
for file in source.iterdir():
    (target / file.name).symlink_to(file)
convert_hf_checkpoint(target, model_name="tiny-llama-1.1b")
"""

# Its `main` looks for a mesh, which it forgets to set.
LEVANTER = """
import sys
from levanter.main import export_hf_to_lm
from levanter.models.llama import LlamaConfig
from levanter.utils.jax_utils import local_cpu_mesh
source, target = sys.argv[1:]
model = LlamaConfig(reference_checkpoint=source, tokenizer=source)
with local_cpu_mesh():
    export_hf_to_lm.main(export_hf_to_lm.ImportHfConfig(source, target, model))
"""

EASYDEL = """
import sys
from easydel.scripts.convert_hf_to_easydel import main
main(["--source", sys.argv[1], "--out", sys.argv[2]])
"""

# It knows published models by name only, so one of them is given this shape.
MAXTEXT = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=16"
import jax, transformers
jax.config.update("jax_default_prng_impl", "unsafe_rbg")
from maxtext.checkpoint_conversion import to_maxtext
source, target = sys.argv[1:]
shape = json.load(open(source + "/config.json"))
to_maxtext.HF_MODEL_CONFIGS["llama3.1-8b"] = transformers.LlamaConfig(**shape)
settings = dict(
    model_name="llama3.1-8b", override_model_config="true", base_emb_dim=shape["hidden_size"],
    base_num_query_heads=shape["num_attention_heads"], head_dim=shape["head_dim"],
    base_num_kv_heads=shape["num_key_value_heads"], base_mlp_dim=shape["intermediate_size"],
    base_num_decoder_layers=shape["num_hidden_layers"], vocab_size=shape["vocab_size"],
    rope_max_timescale=int(shape["rope_theta"]), scan_layers="true", use_multimodal="false",
    base_output_directory=target, hardware="cpu", skip_jax_distributed_system="true",
)
argv = ["to_maxtext"] + [f"{name}={value}" for name, value in settings.items()]
to_maxtext.main(argv, hf_model_path=source)
"""

EASYLM = """
import json, os, runpy, sys
source, target = sys.argv[1:]
shape = json.load(open(source + "/config.json"))
os.mkdir(target)
names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads"]
sys.argv = ["convert", f"--hf_model={source}", f"--output_file={target}/streaming_params",
            "--llama.base_model=llama_1b"] + [f"--llama.{name}={shape[name]}" for name in names]
runpy.run_module("EasyLM.models.llama.convert_hf_to_easylm", run_name="__main__", alter_sys=True)
"""

LLAMA_CPP = """
import os, runpy, sys
source, target = sys.argv[1:]
os.mkdir(target)
sys.argv = ["convert", source, "--outtype=bf16", f"--outfile={target}/model.gguf"]
runpy.run_module("convert_hf_to_gguf", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Peer:
    snippet: str
    packages: tuple[str, ...]
    to: str = "lemur"  # what ours is asked for
    readable: bool = False  # by `lemur convert verify`


PEERS = {
    "transformers": Peer(TRANSFORMERS, ("transformers", "torch"), readable=True),
    "litgpt": Peer(LITGPT, ("litgpt", "torch")),
    "levanter": Peer(LEVANTER, ("levanter", "jax", "tensorstore")),
    "easydel": Peer(EASYDEL, ("easydel", "jax", "tensorstore")),
    "maxtext": Peer(MAXTEXT, ("maxtext", "jax", "orbax-checkpoint")),
    "easylm": Peer(EASYLM, ("transformers", "torch", "flax"), to="easylm", readable=True),
    "llama.cpp": Peer(LLAMA_CPP, ("transformers", "torch")),
}
ENVIRONMENT = dict(os.environ) | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Run:
    seconds: float  # with `sync`
    processor: float
    peak: float  # GiB
    anonymous: float  # GiB
    sync: float  # of files that the converter had left in the page cache
    nbytes: int
    files: int

    def __str__(self):
        return (
            f"{self.seconds:.1f} s (sync {self.sync:.1f}), processor {self.processor:.1f} s, peak "
            f"{self.peak:.2f} GiB (anonymous {self.anonymous:.2f}), "
            f"{self.nbytes / 1e9:.2f} GB in {self.files} files"
        )


def measure(argv: list[str], source: Path, target: Path, environment: dict[str, str]) -> Run:
    drop_cache(source)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCH, *argv],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{argv[0]} failed:\n{done.stderr[-4000:]}")
    seconds, processor, peak, anonymous = map(float, done.stdout.split())
    start = time.monotonic()
    files = [p for p in target.rglob("*") if p.is_file() and not p.is_symlink()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    sync = time.monotonic() - start
    return Run(
        seconds + sync, processor, peak * 1024 / GIB, anonymous * 1024 / GIB, sync,
        sum(file.stat().st_size for file in files), len(files),
    )  # fmt: skip


def versions(python: str, packages: tuple[str, ...]) -> str:
    code = "import sys; from importlib.metadata import version\n"
    code += "for package in sys.argv[1:]: print(package, version(package))"
    said = subprocess.check_output([python, "-c", code, *packages], text=True)
    return ", ".join(said.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peers", nargs="+", help=f"NAME=PYTHON[:SOURCES]; {', '.join(PEERS)}")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/lemur_convert_peers"))
    options = parser.parse_args()
    root = options.dir
    if root.exists():
        raise SystemExit(f"{root} exists: remove it")
    chosen = {}
    for argument in options.peers:
        name, _, where = argument.partition("=")
        if name not in PEERS:
            parser.error(f"{name}: one of {', '.join(PEERS)}")
        chosen[name] = where.partition(":")[::2]
    try:
        compare(options, root, chosen)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def compare(options, root: Path, chosen: dict[str, tuple[str, str]]) -> None:
    source = root / "hf"
    nbytes = write_hf(source, model_2gb(options.layers), values=True)
    shutil.copyfile(options.tokenizer, source / "tokenizer.model")
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    settings = words | {"tokenizer_class": "LlamaTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    print(f"{nbytes / 1e9:.2f} GB of bfloat16, {os.cpu_count()} cores")
    for name, (python, _) in chosen.items():
        print(f"{name}: {versions(python, PEERS[name].packages)}", flush=True)
    runs = {name: [] for name in chosen}
    for repeat in range(options.repeats):
        for name, (python, sources) in chosen.items():
            peer, theirs, ours = PEERS[name], root / "theirs", root / "ours"
            environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}
            if sources:
                environment["PYTHONPATH"] = sources
            load = os.getloadavg()[0]
            argv = ["convert", str(source), str(ours), f"--to={peer.to}"]
            b = measure([sys.executable, "-c", OURS, *argv], source, ours, ENVIRONMENT)
            argv = [python, "-c", peer.snippet, str(source), str(theirs)]
            a = measure(argv, source, theirs, environment)
            runs[name].append((a, b))
            print(f"{repeat}: {name}: {a}")
            print(f"   lemur convert --to={peer.to}: {b}; load average {load:.1f}", flush=True)
            if peer.readable and repeat == 0:
                shutil.copy(source / "config.json", theirs)
                argv = [sys.executable, "-c", OURS, "convert", "verify", str(source), str(theirs)]
                said = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True)
                print("   lemur convert verify:", (said.stdout + said.stderr).strip(), flush=True)
            shutil.rmtree(theirs)
            shutil.rmtree(ours)
    print(
        "| peer | s | processor s | peak GiB (anonymous) | written | ours: s | processor s | peak |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, pairs in runs.items():
        a, b = ({k: middle(r, k) for k in vars(r[0])} for r in zip(*pairs))
        ratio = statistics.median(x.seconds / y.seconds for x, y in pairs)
        print(
            f"| {name} | {a['seconds']:.1f} | {a['processor']:.0f} | {a['peak']:.2f} "
            f"({a['anonymous']:.2f}) | {a['nbytes'] / 1e9:.2f} GB, {a['files']:.0f} files, sync "
            f"{a['sync']:.1f} s | {b['seconds']:.1f} ({ratio:.1f} times as fast) | "
            f"{b['processor']:.0f} | {b['peak']:.2f} ({b['anonymous']:.2f}) |"
        )


def middle(runs: tuple[Run, ...], field: str) -> float:
    return statistics.median(getattr(run, field) for run in runs)


if __name__ == "__main__":
    main()
