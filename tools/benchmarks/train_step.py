"""Training step, ours beside transformers + torch: interleaved in one run, medians and their ratio.

    python tools/benchmarks/train_step.py                     # 12.6 M parameters, CPU, float32
    python tools/benchmarks/train_step.py --preset=tinyllama_1.1b --batch=4 --length=4096 \
        --dtype=bfloat16                                      # one GPU

Same architecture, batch, optimizer (AdamW) and cores on both sides; torch takes the faster of
what it offers there (CPU: foreach AdamW, sdpa; GPU: torch.compile, fused AdamW, sdpa).
MFU = (6 N + 6 L H D T) x tokens/s / peak.
"""

import argparse
import dataclasses
import os
import statistics
import time

import jax
import numpy as np

from lemur_jax import settings, sharding
from lemur_jax.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig, RopeConfig
from lemur_jax.data.pipeline import Batch
from lemur_jax.model.attention import resolve_implementation
from lemur_jax.train.metrics import flops_per_token, peak_flops
from lemur_jax.train.optimizer import optimizer, schedule
from lemur_jax.train.state import random_state
from lemur_jax.train.step import make_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="bench_12m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scan_unroll", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no_torch", action="store_true")
    options = parser.parse_args()

    classes = [RopeConfig, ModelConfig]
    model, _ = settings.load(ModelConfig, [f"models/{options.preset}.gin"], [], classes)
    model = dataclasses.replace(
        model,
        dtype=options.dtype,
        remat=options.remat,
        scan_unroll=options.scan_unroll,
        max_positions=max(model.max_positions, options.length),
    )
    attention = resolve_implementation(
        model,
        jax.default_backend(),
        device_kind=jax.devices()[0].device_kind,
        tokens=options.length,
    )
    model = dataclasses.replace(model, attention=attention)
    ids = np.random.default_rng(0).integers(
        1, model.vocab_size, (options.batch, options.length + 1), dtype=np.int32
    )
    sides = {f"lemur_jax ({attention})": ours(model, ids)}
    if not options.no_torch:
        sides["transformers + torch"] = theirs(model, ids)
    seconds = {name: [] for name in sides}
    for step in sides.values():  # compile, and fill the caches
        for _ in range(2):
            step()
    for _ in range(options.repeats):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)

    tokens = options.batch * options.length
    flops = tokens * flops_per_token(model, options.length)
    peak, source = peak_flops(jax.devices()[0])
    print(f"{options.preset}, batch {options.batch} x {options.length}, {options.dtype}; {source}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:26s} median {median * 1e3:8.1f} ms  min {min(times) * 1e3:8.1f}  "
            f"{tokens / median:9,.0f} tokens/s  MFU {flops / median / peak:.1%}"
        )
    if not options.no_torch:
        ratios = [b / a for a, b in zip(*seconds.values())]
        print(f"speed relative to torch: {statistics.median(ratios):.2f}x (median of pairs)")


def ours(model: ModelConfig, ids: np.ndarray):
    """A closure that runs one step and waits for it."""
    config = OptimizerConfig(peak_learning_rate=1e-4, clip_norm=0.0)
    transform = optimizer(config)
    step = make_step(
        transform,
        schedule(config, 1000),
        config,
        LossConfig(chunk_tokens=512, implementation="chunked"),
    )
    step = jax.jit(step, donate_argnums=0)
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    rows, length = ids.shape[0], ids.shape[1] - 1
    fields = (
        *(ids[:, :-1], ids[:, 1:], np.ones((rows, length), np.float32)),
        *(np.tile(np.arange(length, dtype=np.int32), (rows, 1)), np.ones((rows, length), np.int32)),
    )
    batch = Batch(*(sharding.place(field[None], 0, rows, mesh) for field in fields))
    with jax.set_mesh(mesh):
        state = random_state(model, transform, mesh, seed=0)

    def run():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
        return jax.block_until_ready(metrics.loss)

    return run


def theirs(model: ModelConfig, ids: np.ndarray):
    """The same step in transformers and torch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embed,
        intermediate_size=model.mlp,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_eps,
        attn_implementation="sdpa",
    )
    net = LlamaForCausalLM(config).to(device).train()
    if model.remat != "none":
        net.gradient_checkpointing_enable()
    forward = torch.compile(net) if device == "cuda" else net
    adam = torch.optim.AdamW(
        net.parameters(),
        lr=1e-4,
        betas=(0.9, 0.95),
        **{"cuda": {"fused": True}}.get(device, {"foreach": True}),
    )
    tokens = torch.tensor(ids[:, :-1], dtype=torch.long, device=device)
    half = model.dtype == "bfloat16"

    def run():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss)

    return run


if __name__ == "__main__":
    main()
