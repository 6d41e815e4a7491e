# ruff: noqa: E402  (a clone that is not installed must find the packages first)
"""Greedy decoding on CPU: this package against transformers, and against the memory's speed.

    python tools/benchmarks/decode.py [--batches=1,8] [--new_tokens=128] [--repeats=5]

Both sides run the same random float32 weights of a 12.6M-parameter Llama (hidden 384, mlp 1024,
6 layers, 6/2 heads, vocab 4096) from the same 64-token prompts and must give the same tokens.
Calls are interleaved (one of each side, again and again), so that a busy machine slows both, and
are timed whole: prefill, decoding and the way back to Python. transformers runs at its best:
inference mode, the fastest number of torch threads (torch's threads spin: on a busy machine all
cores can be ten times slower than one) and the faster of its dynamic and its static cache.

The bound is what the memory allows: a decode step reads every weight but the embedding table once,
and the key/value cache of each row; that many bytes at the copy speed of this machine. Weights that
fit into the last-level cache may beat it.
"""

import argparse
import concurrent.futures
import functools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("", "kernels")]

import jax
import numpy as np
import torch
import transformers

from lemur_jax.config import ModelConfig, RopeConfig
from lemur_jax.convert import tables
from lemur_jax.model import param
from lemur_jax.model.decoder import Decoder
from lemur_jax.sample.request import Request
from lemur_jax.sample.sampler import Sampler

CONFIG = ModelConfig(
    vocab_size=4096,
    embed=384,
    mlp=1024,
    layers=6,
    heads=6,
    kv_heads=2,
    head_dim=64,
    max_positions=512,
    rope=RopeConfig(theta=10000.0),
    norm_eps=1e-5,
    dtype="float32",
    # Larger than usual, so that random weights have clear favourites: equal tokens are then a
    # test of the arithmetic, not of which of two equal logits wins.
    initializer_range=0.1,
)
PROMPT_TOKENS = 64


class NoTokenizer:
    """Prompts are ids and nothing stops early: the model alone is measured."""

    vocab_size = CONFIG.vocab_size
    bos_id = eos_id = None

    def encode(self, text: str, bos: bool = False) -> list[int]:
        raise ValueError(f"prompts of this benchmark are ids, got {text!r}")

    def stream(self, after=()):
        return self

    def push(self, index: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def their_model(model: Decoder) -> transformers.LlamaForCausalLM:
    """transformers' Llama with the same weights."""
    c = model.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.embed,
        intermediate_size=c.mlp,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_positions,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope.theta,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    leaves, state = param.flatten(model), {}
    for rule in tables.hf_llama(c):
        array = np.asarray(leaves[rule.ours])
        for layer, name in enumerate(rule.source_names(c)):
            tensor = rule.to_theirs(array[layer] if rule.stacked else array, c)
            state[name] = torch.from_numpy(np.array(tensor))
    theirs.load_state_dict(state)
    return theirs


def ours(sampler: Sampler, prompts: np.ndarray, new_tokens: int) -> np.ndarray:
    requests = [Request(prompt=tuple(row), max_new_tokens=new_tokens) for row in prompts.tolist()]
    return np.array([completion.ids for completion in sampler.generate(requests)])


def transformers_generate(model, prompts: np.ndarray, new_tokens: int, cache: str) -> np.ndarray:
    ids = torch.from_numpy(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            cache_implementation=None if cache == "dynamic" else cache,
        )
    return out[:, prompts.shape[1] :].numpy()


def copy_bytes_per_second(threads: int, megabytes: int = 64) -> float:
    """Bytes read and written, all cores copying arrays far larger than caches; best of 5."""
    size = megabytes << 20
    pairs = [(np.ones(size, np.uint8), np.zeros(size, np.uint8)) for _ in range(threads)]
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))
            best = max(best, 2 * size * threads / (time.perf_counter() - start))
    return best


def bytes_per_step(batch: int, new_tokens: int) -> int:
    """What a decode step must read: weights once, and each row's keys and values so far (mean)."""
    c, size = CONFIG, np.dtype(CONFIG.dtype).itemsize
    layer = c.embed * c.head_dim * 2 * (c.heads + c.kv_heads) + 3 * c.embed * c.mlp
    weights = c.layers * layer + c.embed * c.vocab_size
    tokens = PROMPT_TOKENS + new_tokens // 2
    return size * (weights + batch * tokens * 2 * c.layers * c.kv_heads * c.head_dim)


def timed(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", default="1,8", help="comma-separated")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side")
    args = parser.parse_args()

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    warnings.filterwarnings("ignore")  # transformers' advice on static caches
    transformers.utils.logging.set_verbosity_error()

    model = Decoder(CONFIG, jax.random.key(0))
    theirs = their_model(model)
    sampler = Sampler(model, NoTokenizer())
    speed = copy_bytes_per_second(cores)
    print(
        f"{param.size(model).parameters / 1e6:.1f}M parameters, {CONFIG.dtype}, {cores} cores, "
        f"load {os.getloadavg()[0]:.1f}; copy {speed / 1e9:.1f} GB/s\n"
        f"jax {jax.__version__} on {jax.default_backend()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n"
        f"prompt {PROMPT_TOKENS} tokens, {args.new_tokens} new, greedy; medians of {args.repeats}"
    )
    for batch in map(int, args.batches.split(",")):
        prompts = np.random.default_rng(batch).integers(5, 4096, (batch, PROMPT_TOKENS))
        trials = {}
        for threads in sorted({1, max(1, cores // 2), cores}):
            torch.set_num_threads(threads)
            for cache in ("dynamic", "static"):
                call = functools.partial(
                    transformers_generate, theirs, prompts, args.new_tokens, cache
                )
                transformers_generate(theirs, prompts, 4, cache)  # warms up
                trials[threads, cache] = (min(timed(call)[0] for _ in range(2)), call)
        threads, cache = min(trials, key=lambda setting: trials[setting][0])
        torch.set_num_threads(threads)
        best = f"transformers {cache}"
        sides = {
            "lemur_jax": functools.partial(ours, sampler, prompts, args.new_tokens),
            best: trials[threads, cache][1],
        }
        tokens = {name: call() for name, call in sides.items()}  # compiles
        print(f"\nbatch {batch}; transformers is fastest with {threads} threads")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, call in sides.items():
                elapsed, result = timed(call)
                seconds[name].append(elapsed)
                assert np.array_equal(result, tokens[name]), f"{name} is not deterministic"
        median = {name: statistics.median(times) for name, times in seconds.items()}
        bound = bytes_per_step(batch, args.new_tokens) / speed
        for name, value in median.items():
            print(
                f"  {name:<21} {value:7.3f} s   {batch * args.new_tokens / value:8.1f} tokens/s   "
                f"{value / args.new_tokens * 1e3:7.3f} ms/step   "
                f"(fastest {min(seconds[name]) / args.new_tokens * 1e3:.3f})"
            )
        print(
            f"  {'memory bound':<21} {bound * args.new_tokens:7.3f} s   {batch / bound:8.1f} "
            f"tokens/s   {bound * 1e3:7.3f} ms/step   "
            f"({bytes_per_step(batch, args.new_tokens) / 1e6:.1f} MB)"
        )
        same = np.mean(tokens["lemur_jax"] == tokens[best])
        print(
            f"  ratio {median[best] / median['lemur_jax']:.2f} of medians, "
            f"{min(seconds[best]) / min(seconds['lemur_jax']):.2f} of fastest; "
            f"equal tokens {same:.1%}; {median['lemur_jax'] / args.new_tokens / bound:.1f} times "
            "the memory bound"
        )


if __name__ == "__main__":
    main()
