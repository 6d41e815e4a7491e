# ruff: noqa: E402  (a clone that is not installed must find the packages first)
"""What data building and reading cost, beside SeqIO, grain and Hugging Face datasets.

    python tools/benchmarks/data.py CORPUS.jsonl TOKENIZER_DIR [--scratch=DIR] [--repeats=5]

Contenders run in turns, on the same documents and the same rows; medians of the repeats.
Speed per core is bytes of text by seconds of CPU time: other work on the machine weighs less in it.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("", "kernels")]

import numpy as np

ROWS_PER_BATCH = 16
# Lemur-70B on v4-512, the shipped recipe: 64 hosts, 1024 rows of 4097 tokens in 37.5 s.
ROWS_PER_SECOND_PER_HOST = 1024 / 37.5 / 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("tokenizer")
    parser.add_argument("--scratch", default="/tmp/lemur_data_benchmark")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenise_mb", type=float, default=8)
    parser.add_argument("--build_mb", type=float, default=100)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--only", default="tokenise,build,read", help="which measurements")
    options = parser.parse_args()
    scratch = Path(options.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if "tokenise" in options.only:
        measure_tokenising(options)
    if "build" in options.only:
        measure_building(options, scratch)
    if "read" in options.only:
        measure_reading(options, scratch)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


def texts_of(corpus: str, megabytes: float) -> Iterator[str]:
    """Texts of a corpus from its start, again and again until there are enough."""
    held = 0.0
    while True:
        with open(corpus) as lines:
            for line in lines:
                text = json.loads(line)["text"]
                yield text
                held += len(text.encode()) / 1e6
                if held >= megabytes:
                    return


# --- tokenising ------------------------------------------------------------------------------


def ours(tokenizer: str) -> Callable[[list[str]], int]:
    """Words remembered; the memory starts empty in each repeat."""
    from lemur_jax.data.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    return lambda texts: sum(map(len, loaded.encode_arrays(texts, bos=True, eos=True)))


def sentencepiece_lists(tokenizer: str) -> Callable[[list[str]], int]:
    """SentencePiece's own encode."""
    from lemur_jax.data.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    return lambda texts: sum(map(len, loaded.encode_batch(texts, bos=True, eos=True, threads=1)))


def seqio_tf_text(tokenizer: str) -> Callable[[list[str]], int]:
    """seqio.SentencePieceVocabulary.encode_tf in a tf.data map of one thread."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import seqio
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    vocabulary = seqio.SentencePieceVocabulary(str(Path(tokenizer) / "tokenizer.model"))

    def run(texts: list[str]) -> int:
        data = tf.data.Dataset.from_tensor_slices(texts).map(vocabulary.encode_tf)
        single = tf.data.Options()
        single.threading.private_threadpool_size = 1
        return sum(len(ids) + 2 for ids in data.with_options(single).as_numpy_iterator())

    return run


def hugging_face_fast(tokenizer: str) -> Callable[[list[str]], int]:
    """transformers' fast tokenizer (the `tokenizers` library), one thread."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    return lambda texts: sum(len(e.ids) + 1 for e in loaded.encode_batch(texts))


TOKENISERS = (ours, sentencepiece_lists, seqio_tf_text, hugging_face_fast)


def _tokenise(make: Callable, tokenizer: str, texts: list[str], result) -> None:
    run = make(tokenizer)
    run(texts[:2])
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = run(texts)
    result.put((tokens, time.process_time() - cpu, time.perf_counter() - wall))


def measure_tokenising(options: argparse.Namespace) -> None:
    """MB/s of each tokeniser on one core, every repeat in a process of its own."""
    texts = list(texts_of(options.corpus, options.tokenise_mb))
    size = sum(len(text.encode()) for text in texts) / 1e6
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, float]]] = {}
    counts = {}
    contenders = list(TOKENISERS)
    if not (Path(options.tokenizer) / "tokenizer.json").is_file():
        contenders.remove(hugging_face_fast)
    for _ in range(options.repeats):
        for make in contenders:
            queue = context.Queue()
            arguments = (make, options.tokenizer, texts, queue)
            process = context.Process(target=_tokenise, args=arguments)
            process.start()
            tokens, cpu, wall = queue.get()
            process.join()
            counts[make.__name__] = tokens
            found.setdefault(make.__name__, []).append((size / cpu, size / wall))
    print(f"\ntokenising {size:.1f} MB, one thread; tokens: {counts}")
    first = statistics.median(cpu for cpu, _ in found["ours"])
    for name, speeds in found.items():
        cpu = statistics.median(speed for speed, _ in speeds)
        wall = statistics.median(speed for _, speed in speeds)
        print(
            f"  {name:22} {cpu:6.2f} MB/s of CPU, {wall:6.2f} of wall; ours is {first / cpu:.2f}x"
        )


# --- building --------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure_building(options: argparse.Namespace, scratch: Path) -> None:
    """Wall time of a whole build by the number of workers, and its packing fill."""
    from rich.console import Console

    from lemur_jax.data.build import BuildConfig, build
    from lemur_jax.data.sources import SourceConfig

    shards = scratch / "shards"
    shutil.rmtree(shards, ignore_errors=True)
    shards.mkdir()
    files = [open(shards / f"{n:02d}.jsonl", "w") for n in range(16)]  # noqa: SIM115
    size = 0.0
    for n, text in enumerate(texts_of(options.corpus, options.build_mb)):
        files[n % 16].write(json.dumps({"text": text}) + "\n")
        size += len(text.encode()) / 1e6
    for file in files:
        file.close()
    source = SourceConfig(
        name="code", rate=1.0, train_files=(f"{shards}/*.jsonl",), validation_fraction=0.02
    )
    seconds: dict[int, list[float]] = {}
    used: dict[int, list[float]] = {}
    for _ in range(options.repeats):
        for workers in map(int, options.workers.split(",")):
            shutil.rmtree(scratch / "data", ignore_errors=True)
            config = BuildConfig(
                path=str(scratch / "data"),
                sources=(source,),
                tokenizer=options.tokenizer,
                sequence_length=4096,
                part_bytes=4_000_000,
                workers=workers,
            )
            start, cpu = time.perf_counter(), cpu_seconds()
            manifest = build(config, Console(quiet=True))
            seconds.setdefault(workers, []).append(time.perf_counter() - start)
            used.setdefault(workers, []).append(cpu_seconds() - cpu)
    train = manifest["sources"]["code"]["splits"]["train"]
    print(f"\nbuilding {size:.0f} MB in {len(train['parts'])} parts, digest {train['digest'][:12]}")
    first = None
    for workers, taken in seconds.items():
        speed = size / statistics.median(taken)
        first = first or speed
        cpu = size / statistics.median(used[workers])
        print(
            f"  {workers} workers: {speed:6.2f} MB/s of wall, {speed / first:.2f}x; "
            f"{cpu:6.2f} MB/s of CPU, all processes together"
        )
    print(f"  packing fill {train['fill']:.4%} of {train['rows']} rows")


# --- reading ---------------------------------------------------------------------------------


def open_ours(scratch: Path) -> Callable[[np.ndarray], tuple]:
    """The row store."""
    from lemur_jax.data import manifest

    root = str(scratch / "data")
    about = json.loads((scratch / "data" / "manifest.json").read_text())
    store = manifest.open_store(root, about, "code", "train")
    return lambda rows: store.read(rows)[:2]


def open_grain(scratch: Path) -> Callable[[np.ndarray], tuple]:
    """grain's ArrayRecord source; a record is tokens and segments, one after the other."""
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    read = open_ours(scratch)
    path = scratch / "rows.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for row in range(rows_of(scratch)):
        tokens, segments = read([row])
        writer.write(tokens.tobytes() + segments.tobytes())
    writer.close()
    source = grain.sources.ArrayRecordDataSource(str(path))

    def run(rows: np.ndarray) -> tuple:
        records = source.__getitems__(rows.tolist())
        both = np.stack([np.frombuffer(record, np.uint16) for record in records])
        return both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]

    return run


def open_hugging_face(scratch: Path) -> Callable[[np.ndarray], tuple]:
    """datasets, arrow files mapped into memory, numpy format."""
    import datasets

    datasets.disable_progress_bars()
    read, total = open_ours(scratch), rows_of(scratch)
    columns = read([0])[0].shape[1]
    kind = datasets.List(datasets.Value("uint16"), length=columns)

    def rows() -> Iterator[dict]:
        for row in range(total):
            tokens, segments = read([row])
            yield {"tokens": tokens[0], "segments": segments[0]}

    features = datasets.Features({"tokens": kind, "segments": kind})
    made = datasets.Dataset.from_generator(
        rows, features=features, cache_dir=str(scratch / "huggingface")
    )
    made.save_to_disk(str(scratch / "arrow"))
    mapped = datasets.load_from_disk(str(scratch / "arrow")).with_format("numpy")

    def run(wanted: np.ndarray) -> tuple:
        batch = mapped[wanted.tolist()]
        return np.stack(batch["tokens"]), np.stack(batch["segments"])

    return run


def rows_of(scratch: Path) -> int:
    """Training rows of the benchmark's data set."""
    about = json.loads((scratch / "data" / "manifest.json").read_text())
    return about["sources"]["code"]["splits"]["train"]["rows"]


def measure_reading(options: argparse.Namespace, scratch: Path) -> None:
    """Rows read at random per second, in batches of 16, one thread calling; page cache warm."""
    for name in ("arrow", "huggingface"):
        shutil.rmtree(scratch / name, ignore_errors=True)
    contenders = {
        make.__name__: make(scratch) for make in (open_ours, open_grain, open_hugging_face)
    }
    rng = np.random.default_rng(0)
    probe = rng.integers(0, rows_of(scratch), 8)
    for run in contenders.values():
        for a, b in zip(run(probe), contenders["open_ours"](probe), strict=True):
            assert np.array_equal(a, b)
    found: dict[str, list[float]] = {}
    for _ in range(4 * options.repeats):
        for name, run in contenders.items():
            batches = rng.integers(0, rows_of(scratch), (32, ROWS_PER_BATCH))
            start = time.perf_counter()
            for rows in batches:
                run(rows)
            found.setdefault(name, []).append(batches.size / (time.perf_counter() - start))
    print(f"\nrows of 4097 tokens and segments at random, of {rows_of(scratch)}, one thread")
    print(f"  a v4 host of the 70B run consumes {ROWS_PER_SECOND_PER_HOST:.3f} rows/s")
    for name, speeds in found.items():
        speed = statistics.median(speeds)
        ours_by_it = statistics.median(a / b for a, b in zip(found["open_ours"], speeds))
        print(
            f"  {name:18} {speed:9.0f} rows/s, {speed / ROWS_PER_SECOND_PER_HOST:,.0f} times that; "
            f"ours is {ours_by_it:.2f}x"
        )


if __name__ == "__main__":
    sys.exit(main())
