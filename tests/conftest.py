"""Eight CPU devices for every test, set before JAX looks: the real sharding path runs."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json  # noqa: E402  (JAX must not be imported before the lines above)
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A real data set, small: modules of the standard library as code, their docstrings as text,
    512 pieces, rows of 64 tokens."""
    import ast
    import os

    from lemur_jax.data import build, tokenizer_files

    root = tmp_path_factory.mktemp("tiny_data")
    library = Path(os.__file__).parent
    code, text = [], []
    for path in sorted(library.glob("*.py"))[:60]:
        source = path.read_text(encoding="utf-8")
        code.append({"text": source[:4000], "path": path.name})
        doc = ast.get_docstring(ast.parse(source))
        if doc and len(doc) > 200:
            text.append({"text": doc, "path": path.name})
    for name, documents in (("code", code), ("text", text)):
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (root / f"{name}.jsonl").write_text(lines)
    texts = [document["text"] for document in code + text]
    tokenizer_files.train(texts, root / "tokenizer", vocab_size=512)
    sources = tuple(
        build.SourceConfig(
            name=name,
            rate=rate,
            train_files=(str(root / f"{name}.jsonl"),),
            validation_fraction=0.2,
        )
        for name, rate in (("code", 10.0), ("text", 1.0))
    )
    config = build.BuildConfig(
        path=str(root / "data"),
        sources=sources,
        tokenizer=str(root / "tokenizer"),
        sequence_length=64,
    )
    build.build(config)
    return root / "data"
