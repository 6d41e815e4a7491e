"""Every setting of the system, as frozen dataclasses that check themselves.

A config is data: it is built once (from gin by `lemur_jax.cli`, or in Python), validated in
`__post_init__`, and flows down. Numbers that define a model have no defaults. Each class lists
everything that is wrong with it in one `ConfigError`; each problem names field, value and fix.
"""

import dataclasses
import math
from typing import Any

from lemur_jax.errors import LemurError

DTYPES = ("float32", "bfloat16", "float16")


class ConfigError(LemurError, ValueError):
    """One or more settings that cannot work. `problems` holds one line for each."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(
        self,
    ):  # pickled with its message it would come out of a process letter by letter
        return type(self), (self.problems,)


def _positive(config: Any, *fields: str) -> list[str]:
    name = type(config).__name__
    return [
        f"{name}.{field}={getattr(config, field)!r} must be a positive integer"
        for field in fields
        if not isinstance(getattr(config, field), int)
        or isinstance(getattr(config, field), bool)
        or getattr(config, field) < 1
    ]


def _not_negative(config: Any, *fields: str) -> list[str]:
    name = type(config).__name__
    return [
        f"{name}.{field}={getattr(config, field)!r} must be a number >= 0"
        for field in fields
        if not isinstance(getattr(config, field), (int, float))
        or not math.isfinite(getattr(config, field))
        or getattr(config, field) < 0
    ]


def _one_of(config: Any, field: str, legal: tuple[str, ...]) -> list[str]:
    value = getattr(config, field)
    if value in legal:
        return []
    return [f"{type(config).__name__}.{field}={value!r} is unknown; legal: {', '.join(legal)}"]


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
REMAT_POLICIES = ("none", "full", "dots", "named")
# A layer's activations that remat="named" may keep, in the order of the computation.
ACTIVATION_NAMES = ("layer_input", "q", "kv", "attention", "mlp_residual", "gate", "up")
ATTENTION_IMPLEMENTATIONS = ("auto", "reference", "chunked", "cudnn", "pallas_gpu", "pallas_tpu")
SEQUENCE_ATTENTION = ("gather", "ring")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) and its length extensions, as HF defines them.

    Attributes:
      theta: base of the geometric frequency series.
      kind: one of ROPE_KINDS.
      factor: how many times longer than trained (linear, dynamic, llama3, yarn).
      original_max_positions: the trained length (dynamic, llama3, yarn); positions.
      low_freq_factor, high_freq_factor: llama3's band of wavelengths to blend.
      beta_fast, beta_slow: yarn's band of rotations to blend (arXiv:2309.00071).
      attention_factor: yarn's scale of cos and sin; None derives it from `factor` (and mscale).
      mscale, mscale_all_dim: yarn's two-part attention factor (DeepSeek form); None when absent.
      truncate: yarn rounds its band to whole dimensions.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        problems = _one_of(self, "kind", ROPE_KINDS)
        if self.theta <= 0:
            problems.append(f"RopeConfig.theta={self.theta} must be positive")
        if self.kind != "default" and self.factor < 1.0:
            problems.append(f"RopeConfig.factor={self.factor} must be >= 1 for kind={self.kind!r}")
        if self.kind in ("dynamic", "llama3", "yarn") and not self.original_max_positions:
            problems.append(
                f"RopeConfig.original_max_positions={self.original_max_positions} is needed by "
                f"kind={self.kind!r}: set the length that the model was trained at"
            )
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is None or high is None or not low < high:
                problems.append(
                    f"RopeConfig.low_freq_factor={low}, high_freq_factor={high}: "
                    "kind='llama3' needs both, the low one smaller (Llama 3.1 uses 1 and 4)"
                )
        _raise_if(problems)


# Fields of ModelConfig that say how to compute, not what the model is: a checkpoint does not bind
# them.
COMPUTATION_FIELDS = (
    "dtype",
    "remat",
    "remat_saved",
    "remat_offloaded",
    "scan_unroll",
    "attention",
    "sequence_attention",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-class decoder. The numbers that define the model have no defaults.

    Attributes:
      vocab_size: rows of the vocabulary that exist (V before padding; 32005 is fine).
      embed, mlp, layers, heads, kv_heads, head_dim: E, F, L, H, K, D of the dimension key.
      max_positions: longest sequence that the model claims to handle.
      rope: rotary embedding.
      norm_eps: added to the mean square in RMSNorm.
      activation: gate non-linearity, HF's `hidden_act`.
      attention_bias, mlp_bias: whether the four (three) projections have a bias.
      tie_embeddings: the output projection is the transposed embedding table.
      initializer_range: standard deviation of the normal initialisation of every matrix.
      vocab_multiple: vocabulary rows are padded to this multiple in memory, so that every usual
        mesh divides them, and masked to -inf. The same on every mesh; never visible in an export.
      dtype: of activations and of weights as they enter a matrix product. Master weights, softmax,
        norms and the loss are float32.
      param_dtype: of the master weights.
      remat: what the backward pass recomputes: REMAT_POLICIES. "full" keeps a layer's input alone,
        "dots" also all results of weight products, "named" the two lists below.
      remat_saved: ACTIVATION_NAMES that stay in device memory, for remat="named".
      remat_offloaded: ACTIVATION_NAMES that wait in host memory, for remat="named"; with
        "layer_input" the device keeps nothing of a layer but what remat_saved names.
      scan_unroll: layers in one iteration of the scan over layers. More than 1 compiles longer and
        runs a small model faster (on CPU).
      attention: ATTENTION_IMPLEMENTATIONS; "auto" is resolved once, before tracing, and printed.
      sequence_attention: how a device that holds a part of each row (MeshConfig.sequence) gets the
        other devices' keys and values: "gather" holds them all at a time, "ring" two devices' at a
        time, transferred while it computes. Printed at the start.
    """

    vocab_size: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope: RopeConfig
    norm_eps: float
    activation: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    vocab_multiple: int = 128
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "none"
    remat_saved: tuple[str, ...] = ()
    remat_offloaded: tuple[str, ...] = ()
    scan_unroll: int = 1
    attention: str = "auto"
    sequence_attention: str = "gather"

    def __post_init__(self):
        problems = _positive(
            self,
            "vocab_size",
            "embed",
            "mlp",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "max_positions",
        )
        if not problems and self.heads % self.kv_heads:
            legal = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            problems.append(
                f"ModelConfig.heads={self.heads} must divide by kv_heads={self.kv_heads}; "
                f"legal kv_heads: {', '.join(map(str, legal))}"
            )
        if not problems and self.head_dim % 2:
            problems.append(f"ModelConfig.head_dim={self.head_dim} must be even: RoPE turns pairs")
        if self.norm_eps <= 0:
            problems.append(f"ModelConfig.norm_eps={self.norm_eps} must be positive, e.g. 1e-5")
        problems += _positive(self, "vocab_multiple", "scan_unroll")
        problems += _one_of(self, "activation", ACTIVATIONS)
        problems += _one_of(self, "dtype", DTYPES)
        problems += _one_of(self, "param_dtype", DTYPES)
        problems += _one_of(self, "remat", REMAT_POLICIES) + self._named_activations()
        problems += _one_of(self, "attention", ATTENTION_IMPLEMENTATIONS)
        problems += _one_of(self, "sequence_attention", SEQUENCE_ATTENTION)
        _raise_if(problems)

    def _named_activations(self) -> list[str]:
        problems = []
        for field in ("remat_saved", "remat_offloaded"):
            names = getattr(self, field)
            if names and self.remat != "named":
                problems.append(
                    f"ModelConfig.{field}={names!r} is only used by remat='named', not "
                    f"{self.remat!r}: set remat='named' or remove it"
                )
            problems += [
                f"ModelConfig.{field} has {name!r}, which is unknown; legal: "
                f"{', '.join(ACTIVATION_NAMES)}"
                for name in names
                if name not in ACTIVATION_NAMES
            ]
        both = sorted(set(self.remat_saved) & set(self.remat_offloaded))
        if both:
            problems.append(
                f"ModelConfig.remat_saved and remat_offloaded both have {', '.join(both)}: an "
                "activation is kept in one place"
            )
        if self.remat == "named" and not self.remat_saved + self.remat_offloaded:
            problems.append(
                "ModelConfig.remat='named' keeps nothing: fill remat_saved or remat_offloaded, "
                f"from {', '.join(ACTIVATION_NAMES)}, or use remat='full'"
            )
        return problems


# ---------------------------------------------------------------------------------------------
# Mesh, data, optimizer, checkpoints, training
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh. One of them may be -1: what the other sizes leave.

    Attributes:
      data: replicas of the parameters; splits the batch.
      fsdp: shards parameters and optimizer state; splits the batch.
      fsdp_outer: more of the same, as a mesh axis of its own: with explicit gradients (see
        TrainConfig) they are reduced over one axis after the other.
      sequence: splits the tokens of a row.
      tensor: splits heads, mlp and vocabulary.
      dcn_data: slices connected by the data-centre network, the slowest part of the data axis.
    """

    data: int = 1
    fsdp: int = -1
    fsdp_outer: int = 1
    sequence: int = 1
    tensor: int = 1
    dcn_data: int = 1

    def __post_init__(self):
        problems = []
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if not isinstance(size, int) or (size < 1 and size != -1):
                problems.append(f"MeshConfig.{name}={size!r} must be a positive integer or -1")
        if list(sizes.values()).count(-1) > 1:
            free = [name for name, size in sizes.items() if size == -1]
            problems.append(f"MeshConfig: {', '.join(free)} are all -1; at most one size may be")
        _raise_if(problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model reads: a data set that `lemur data build` has written.

    Attributes:
      path: directory with manifest.json, tokenizer/ and one row store for each source and split.
      batch_size: rows of a global batch, over all hosts and micro-batches.
      sequence_length: T; must equal the row length that the data set was built with.
      seed: of the global order.
      weight_changes: ((step, source, rate), ...): once `step` steps are done, `source` has `rate`
        in place of the one it was built with (or changed to before), and the others keep theirs;
        0 leaves it out. Steps before stay as they were; docs/data_order.md.
    """

    path: str
    batch_size: int
    sequence_length: int
    seed: int = 0
    weight_changes: tuple[tuple[int, str, float], ...] = ()

    def __post_init__(self):
        # gin binds lists where tuples are meant.
        changes = tuple(tuple(c) if isinstance(c, list) else c for c in self.weight_changes)
        object.__setattr__(self, "weight_changes", changes)
        problems = _positive(self, "batch_size", "sequence_length")
        if not self.path:
            problems.append("DataConfig.path is empty: give the directory of `lemur data build`")
        _raise_if(problems + _weight_change_problems(self.weight_changes))


def _weight_change_problems(changes: tuple) -> list[str]:
    name, problems, before = "DataConfig.weight_changes", [], (0, "")
    for index, change in enumerate(changes):
        if not (
            isinstance(change, tuple)
            and [type(part) for part in change] in ([int, str, float], [int, str, int])
            and change[0] >= 0
            and 0 <= change[2] < math.inf
        ):
            problems.append(
                f"{name}[{index}]={change!r} must be (step >= 0, source, rate >= 0), e.g. "
                "(2000, 'text', 2.0)"
            )
            continue
        if change[0] < before[0]:
            problems.append(
                f"{name}[{index}]={change!r} goes back from step {before[0]}: write the changes "
                "in the order of their steps"
            )
        if change[:2] in [c[:2] for c in changes[:index]]:
            problems.append(
                f"{name}[{index}]={change!r} sets the rate of {change[1]!r} twice at step "
                f"{change[0]}: keep one of them"
            )
        before = change
    return problems


OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("cosine", "wsd", "linear", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule and the learning rate over time.

    Attributes:
      peak_learning_rate: after warm-up.
      name: OPTIMIZERS.
      schedule: SCHEDULES, all with a linear warm-up from 0. wsd = warm-up, stable, decay.
      warmup_steps: steps of linear warm-up.
      decay_steps: wsd only: length of the final linear decay.
      end_fraction: learning rate at the last step, as a fraction of the peak (paper: 0.1).
      b1, b2, eps: Adam's moments; b2 is not used by Adafactor, which sets its own decay.
      weight_decay: decoupled; applied to matrices only (two or more axes that are not `layers`).
      clip_norm: global norm above which gradients are scaled down; 0 turns clipping off.
      spike_factor: a step whose gradient norm exceeds this many times its running mean is skipped
        and reported; 0 turns it off. Non-finite steps are always skipped and reported.
      max_skipped_in_a_row: stop training when this many steps in a row had to be skipped.
    """

    peak_learning_rate: float
    name: str = "adamw"
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    end_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    spike_factor: float = 0.0
    max_skipped_in_a_row: int = 5

    def __post_init__(self):
        problems = _one_of(self, "name", OPTIMIZERS) + _one_of(self, "schedule", SCHEDULES)
        problems += _not_negative(
            self,
            *("peak_learning_rate", "warmup_steps", "weight_decay", "clip_norm", "spike_factor"),
            "eps",
        )
        problems += _positive(self, "max_skipped_in_a_row")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                problems.append(f"OptimizerConfig.{field}={getattr(self, field)} must be in [0, 1)")
        if not 0 <= self.end_fraction <= 1:
            problems.append(f"OptimizerConfig.end_fraction={self.end_fraction} must be in [0, 1]")
        if self.schedule == "wsd" and not self.decay_steps:
            problems.append(
                "OptimizerConfig.decay_steps must be set when schedule='wsd': "
                "the length of the final decay in steps"
            )
        if self.schedule != "wsd" and self.decay_steps is not None:
            problems.append(
                f"OptimizerConfig.decay_steps={self.decay_steps} is only used by schedule='wsd', "
                f"not {self.schedule!r}: remove it"
            )
        _raise_if(problems)


LOSS_IMPLEMENTATIONS = ("auto", "reference", "chunked", "pallas_tpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross-entropy over the vocabulary.

    Attributes:
      z_loss: weight of mean(log(Z)^2), which keeps logits from drifting (PaLM uses 1e-4).
      chunk_tokens: tokens of each row whose logits exist at one time; full logits never do. A
        config for TPUs should name the row length here (DataConfig.sequence_length): the kernel
        keeps no f32 logits, and every further chunk reads and writes the head's f32 gradient once
        more. By lemur_kernels/cross_entropy/README.md that also takes the least memory up to about
        2 ModelConfig.embed tokens a device; only beyond, smaller chunks save some.
      implementation: LOSS_IMPLEMENTATIONS; "auto" is resolved once, before tracing, and printed.
    """

    z_loss: float = 0.0
    chunk_tokens: int = 512
    implementation: str = "auto"

    def __post_init__(self):
        problems = _not_negative(self, "z_loss") + _positive(self, "chunk_tokens")
        _raise_if(problems + _one_of(self, "implementation", LOSS_IMPLEMENTATIONS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep. The last step of a run is always saved.

    Attributes:
      steps_per_save: steps between saves.
      keep_latest: how many of the newest checkpoints survive.
      keep_every_steps: checkpoints at multiples of this survive forever; None keeps none so.
    """

    steps_per_save: int = 1000
    keep_latest: int = 2
    keep_every_steps: int | None = None

    def __post_init__(self):
        problems = _positive(self, "steps_per_save", "keep_latest")
        if self.keep_every_steps is not None:
            problems += _positive(self, "keep_every_steps")
        _raise_if(problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss of each source inside the training loop.

    Attributes:
      steps_per_evaluation: steps between evaluations; 0 evaluates only at the end.
      batches: batches of each source's held-out split; fewer when the split is smaller.
    """

    steps_per_evaluation: int = 1000
    batches: int = 8

    def __post_init__(self):
        _raise_if(_not_negative(self, "steps_per_evaluation") + _positive(self, "batches"))


# Our name of a layer's matrix -> Hugging Face's, by which PEFT names what it adapts.
LORA_TARGETS = {
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w_gate": "gate_proj",
    "w_up": "up_proj",
    "w_down": "down_proj",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685): x W becomes x W + alpha/rank (x A) B, W frozen.

    The defaults are those of Lemur-Chat's training script. There is no dropout.

    Attributes:
      rank: columns of A and rows of B.
      alpha: numerator of the adapters' scale.
      targets: the adapted matrices of every layer, by our names (wq) or by Hugging Face's (q_proj).
    """

    rank: int = 64
    alpha: float = 16.0
    targets: tuple[str, ...] = tuple(LORA_TARGETS)

    def __post_init__(self):
        problems = _positive(self, "rank")
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < math.inf:
            problems.append(f"LoraConfig.alpha={self.alpha!r} must be a positive number")
        asked = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        ours = {theirs: ours for ours, theirs in LORA_TARGETS.items()}
        found = [ours.get(name, name) for name in asked]
        legal = ", ".join(f"{a} ({b})" for a, b in LORA_TARGETS.items())
        problems += [
            f"LoraConfig.targets has {name!r}, which is unknown; legal: {legal}"
            for name in found
            if name not in LORA_TARGETS
        ]
        problems += [
            f"LoraConfig.targets names {name!r} twice: keep one"
            for name in LORA_TARGETS
            if found.count(name) > 1
        ]
        if not asked:
            problems.append(f"LoraConfig.targets=() adapts nothing; legal: {legal}")
        _raise_if(problems)
        in_order = tuple(name for name in LORA_TARGETS if name in found)
        object.__setattr__(self, "targets", in_order)

    @property
    def scale(self) -> float:
        """What (x A) B is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
      run_dir: everything the run writes: config.gin, checkpoints/, events, metrics.jsonl, plots.
      steps: optimizer steps in all; 0 when `epochs` says it.
      epochs: instead of steps: each training row is read exactly so often. Steps are then epochs x
        rows / batch_size (train/epochs.py), of a data set with one source.
      micro_batches: M; each step sums the gradients of M equal parts of the global batch.
      explicit_gradients: writes the gathers of weights and the reduce-scatters of their gradients
        out instead of leaving them to the compiler. The same numbers; on a pod of TPUs half the
        bytes of gradients (docs/plan.md). Needs MeshConfig.tensor = 1.
      init_from: a run, checkpoint or Hugging Face directory to take the parameters from when the
        run has no checkpoint of its own; None starts from random weights.
      lora: train adapters alone (TrainConfig.lora = @LoraConfig()), on the frozen weights of
        `init_from`; None trains every weight.
      seed: of the parameter initialisation.
      steps_per_log: steps between lines of metrics.
      compiler_options: XLA's, "name=value" each, for the step and the evaluation. Values are
        spelled as the accelerator's compiler reads them (TPU: "true").
    """

    run_dir: str
    steps: int
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    epochs: int | None = None
    mesh: MeshConfig = MeshConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    micro_batches: int = 1
    explicit_gradients: bool = False
    init_from: str | None = None
    lora: LoraConfig | None = None
    seed: int = 0
    steps_per_log: int = 10
    compiler_options: tuple[str, ...] = ()

    def __post_init__(self):
        problems = _positive(self, "micro_batches", "steps_per_log") + self._length()
        names = [option.partition("=")[0] for option in self.compiler_options]
        for option, name in zip(self.compiler_options, names):
            if not name or "=" not in option:
                problems.append(
                    f"TrainConfig.compiler_options: {option!r} must be 'name=value', e.g. "
                    "'xla_tpu_enable_async_collective_fusion=true'"
                )
            elif names.count(name) > 1:
                problems.append(f"TrainConfig.compiler_options sets {name} twice: keep one")
        if not self.run_dir:
            problems.append("TrainConfig.run_dir is empty: give the directory of this run")
        if not problems and self.data.batch_size % self.micro_batches:
            problems.append(
                f"DataConfig.batch_size={self.data.batch_size} must divide by "
                f"TrainConfig.micro_batches={self.micro_batches}"
            )
        if self.data.sequence_length > self.model.max_positions:
            problems.append(
                f"DataConfig.sequence_length={self.data.sequence_length} is longer than "
                f"ModelConfig.max_positions={self.model.max_positions}: shorten the rows or "
                "extend the model (RopeConfig.kind)"
            )
        if self.explicit_gradients and self.mesh.tensor != 1:
            problems.append(
                f"TrainConfig.explicit_gradients needs MeshConfig.tensor=1, not "
                f"{self.mesh.tensor}: turn one of them off"
            )
        if self.lora is not None and self.init_from is None:
            problems.append(
                "TrainConfig.lora needs TrainConfig.init_from: adapters change trained weights, "
                "random ones stay random; give a run, checkpoint or Hugging Face directory"
            )
        known = self.epochs is None  # else checked again when the data set has said how many
        if known and self.optimizer.warmup_steps >= self.steps and self.optimizer.warmup_steps:
            problems.append(
                f"OptimizerConfig.warmup_steps={self.optimizer.warmup_steps} must be smaller than "
                f"TrainConfig.steps={self.steps}"
            )
        decay = self.optimizer.decay_steps or 0
        if known and self.optimizer.warmup_steps + decay > self.steps and decay:
            problems.append(
                f"OptimizerConfig.warmup_steps + decay_steps = "
                f"{self.optimizer.warmup_steps + decay} exceeds TrainConfig.steps={self.steps}"
            )
        _raise_if(problems)

    def _length(self) -> list[str]:
        if self.epochs is None:
            return _positive(self, "steps")
        problems = _positive(self, "epochs")
        if self.steps:
            problems.append(
                f"TrainConfig.steps={self.steps} and epochs={self.epochs} both say when the run "
                "ends: set steps=0, or epochs=None"
            )
        return problems


def model_config(stored: dict[str, Any]) -> ModelConfig:
    """ModelConfig from what `dataclasses.asdict` made of it (a checkpoint's manifest).

    Raises:
      ConfigError: a key that this version does not know.
    """
    stored = dict(stored)
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise ConfigError([f"stored model config has unknown fields: {', '.join(unknown)}"])
    stored["rope"] = RopeConfig(**stored["rope"])
    for field in ("remat_saved", "remat_offloaded"):  # JSON has no tuples
        stored[field] = tuple(stored.get(field, ()))
    return ModelConfig(**stored)


def lora_config(stored: dict[str, Any] | None) -> LoraConfig | None:
    """LoraConfig from what a checkpoint's manifest says of its adapters; None: it has none.

    Raises:
      ConfigError: a key that this version does not know.
    """
    if stored is None:
        return None
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise ConfigError([f"stored lora config has unknown fields: {', '.join(unknown)}"])
    return LoraConfig(**stored | {"targets": tuple(stored["targets"])})
