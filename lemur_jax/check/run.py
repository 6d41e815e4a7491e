"""All checks of a run, and its certificate: what `lemur check` does."""

from collections.abc import Callable

import jax

from lemur_jax import sharding
from lemur_jax.check.accumulation import check_accumulation
from lemur_jax.check.certificate import Certificate, fingerprint
from lemur_jax.check.evidence import Evidence, Rows, collect
from lemur_jax.check.ids import check_ids
from lemur_jax.check.isolation import check_isolation
from lemur_jax.check.masks import check_masks
from lemur_jax.check.stop import check_stop
from lemur_jax.check.subject import Subject, subject
from lemur_jax.config import TrainConfig
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.data.tokenizer import Tokenizer

ROWS = 64


def check(
    config: TrainConfig,
    operative_config: str,
    *,
    layers: int | None = None,
    rows: int = ROWS,
    say: Callable[[str], None] = lambda line: None,
) -> Certificate:
    """Judges a run by its first rows and writes its certificate into the run directory.

    Args:
      config: the run.
      operative_config: as `settings.load` gives it.
      layers: of the model that is run; None: as many as fit.
      rows: of data that are looked at, at least.
      say: takes a line for each outcome.

    Raises:
      ConfigError: the run cannot start at all.
    """
    pipeline = Pipeline(config.data)
    pipeline.check_vocabulary(config.model.vocab_size)
    found = certify(pipeline, config, operative_config, layers=layers, rows=rows, say=say)
    path = found.write(config.run_dir)
    say(f"{found.verdict()}; {path}")
    return found


def certify(
    pipeline: Rows,
    config: TrainConfig,
    operative_config: str,
    *,
    layers: int | None = None,
    rows: int = ROWS,
    say: Callable[[str], None] = lambda line: None,
) -> Certificate:
    """The certificate of a run that reads its rows from `pipeline`; arguments as `check`'s."""
    tokenizer = Tokenizer.load(pipeline.tokenizer_dir)
    evidence = collect(pipeline, tokenizer, config.data.batch_size, rows)
    of_run = subject(config, layers)
    setting = _setting(of_run, evidence)
    for name, value in setting.items():
        say(f"{name}: {value}")
    for line in of_run.reduced:
        say(f"less than the run: {line}")
    weights = of_run.weights()
    checks = (
        lambda: check_masks(evidence),
        lambda: check_ids(evidence, config.model.vocab_size),
        lambda: check_stop(evidence, config),
        lambda: check_isolation(evidence, of_run, weights),
        lambda: check_accumulation(evidence, of_run, weights),
    )
    results = []
    for run in checks:
        result = run()
        say(f"{result.status:6} {result.name}: {result.summary}")
        for fix in result.fixes:
            say(f"       - {fix}")
        results.append(result)
    mark = fingerprint(operative_config, pipeline.manifest)
    return Certificate(mark, setting, of_run.reduced, tuple(results))


def _setting(of_run: Subject, evidence: Evidence) -> dict[str, str]:
    config = of_run.config
    model, mesh = config.model, of_run.mesh
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    data = evidence.chat_format or "plain text"
    return {
        "model": f"{model.layers} layers, embed {model.embed}, {model.heads} heads of "
        f"{model.head_dim} and {model.kv_heads} kv heads, vocabulary {model.vocab_size} "
        f"(padded {sharding.padded_vocab(model)}), {model.dtype}, random weights"
        + (f", LoRA rank {config.lora.rank}" if config.lora else ""),
        "mesh": f"{mesh.size} x {jax.devices()[0].device_kind} ({sizes or 'one device'})",
        "attention": of_run.attention,
        "loss": config.loss.implementation,
        "data": f"{data}{f', packing {evidence.packing}' if evidence.packing else ''}; the run's "
        f"first {len(evidence.sources)} rows",
    }
