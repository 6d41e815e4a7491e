# ruff: noqa: E402  (a clone that is not installed must find the packages first)
"""Memory and time of `lemur convert parity` on layers of a real size.

    python tools/benchmarks/parity.py DIR [--layers=2] [--tokens=16] [--sparse] [--fault]

Writes two Hugging Face checkpoints with the shapes of Llama-2-70B in bfloat16 (1.6 GiB a layer,
1 GiB besides) into DIR, unless they are there, and compares them in a process of its own, whose
largest resident memory is the kernel's (getrusage). --sparse writes files of holes, all zeros, so
that all 80 layers cost no disk; --fault permutes k_proj of B with 64 heads in place of 8.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import ml_dtypes
import numpy as np

E, F, H, K, D, V = 8192, 28672, 64, 8, 128, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": E,
    "intermediate_size": F,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "vocab_size": V,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LAYER = {
    "input_layernorm": (E,),
    "self_attn.q_proj": (H * D, E),
    "self_attn.k_proj": (K * D, E),
    "self_attn.v_proj": (K * D, E),
    "self_attn.o_proj": (E, H * D),
    "post_attention_layernorm": (E,),
    "mlp.gate_proj": (F, E),
    "mlp.up_proj": (F, E),
    "mlp.down_proj": (E, F),
}
ENDS = {"model.embed_tokens": (V, E), "model.norm": (E,), "lm_head": (V, E)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--fault", action="store_true")
    options = parser.parse_args()
    a, b = (options.directory / name for name in ("a", "b_fault" if options.fault else "b"))
    write(a, options.layers, options.sparse, fault=False)
    write(b, options.layers, options.sparse, fault=options.fault)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "JAX_PLATFORMS": "cpu"}
    begun = time.perf_counter()
    command = ["-m", "lemur_jax.cli", "convert", "parity", str(a), str(b)]
    subprocess.run([sys.executable, *command, f"--tokens={options.tokens}"], env=environment)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"measured on CPU: peak resident memory {peak:.2f} GiB, {seconds:.0f} s")


def write(directory: Path, layers: int, sparse: bool, fault: bool) -> None:
    """One file for each layer and one for the rest, with an index."""
    if (directory / "config.json").is_file():
        return
    directory.mkdir(parents=True)
    count, weight_map = layers + 1, {}
    for part in range(count):
        shapes = (
            ENDS if part == layers else {f"model.layers.{part}.{n}": s for n, s in LAYER.items()}
        )
        file = f"model-{part + 1:05d}-of-{count:05d}.safetensors"
        write_file(directory / file, shapes, part, sparse, fault)
        weight_map |= {f"{name}.weight": file for name in shapes}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


def write_file(path: Path, shapes: dict, seed: int, sparse: bool, fault: bool) -> None:
    rng = np.random.default_rng(seed)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[f"{name}.weight"] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            out.truncate(8 + len(text) + end)
            return
        for name, shape in shapes.items():
            spread = 0.1 if len(shape) == 1 else 0.02
            array = rng.standard_normal(shape, np.float32) * spread + (len(shape) == 1)
            if fault and name.endswith("k_proj"):
                halves = array.reshape(K, 2, D // 2, E).swapaxes(1, 2).reshape(shape)  # Meta's
                array = halves.reshape(H, -1, 2, E).swapaxes(1, 2).reshape(shape)
            out.write(array.astype(ml_dtypes.bfloat16).tobytes())


if __name__ == "__main__":
    main()
