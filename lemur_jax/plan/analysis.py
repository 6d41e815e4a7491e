"""Everything that is read from one compiled program: HBM by owner, time model, findings, knobs."""

import dataclasses
from functools import cached_property

from lemur_jax.plan import hlo
from lemur_jax.plan.buffers import read_dump
from lemur_jax.plan.checks import Finding, findings
from lemur_jax.plan.cost import Cost, Flops, cost
from lemur_jax.plan.kernels import kernel_costs
from lemur_jax.plan.knobs import Knob, knobs
from lemur_jax.plan.memory import Memory, memory
from lemur_jax.plan.programs import Compiled
from lemur_jax.plan.serving import Serving
from lemur_jax.train.metrics import flops_per_token


@dataclasses.dataclass(frozen=True)
class Analysis:
    """One compiled program, read.

    Attributes:
      compiled: what the compiler made.
      memory: HBM of one device at the peak, by owner.
      cost: time model of one device.
      flops: of one device, against what the mathematics needs.
      tokens: that the program works on, over all devices: of a step, of the prompts, of one decode
        step.
      knobs: what a changed setting would do (a model); of the train step only.
      findings: habits that cost memory or time; of the train step only.
    """

    compiled: Compiled
    memory: Memory
    cost: Cost
    flops: Flops
    tokens: int
    knobs: tuple[Knob, ...]
    findings: tuple[Finding, ...]

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Seconds of one run of the program: best and worst corner."""
        return self.cost.interval

    @property
    def needed_bytes(self) -> int:
        """HBM of one device that the compiler assigned, and the program's code."""
        return self.memory.total + self.compiled.code_bytes

    @property
    def spare_bytes(self) -> int:
        """What is left of the device's HBM."""
        return self.compiled.where.chip.hbm_bytes - self.needed_bytes

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs over peak, at the worst and at the best corner."""
        peak = self.compiled.where.chip.flops_per_s
        best, worst = self.interval
        return self.flops.model / peak / worst, self.flops.model / peak / best

    @property
    def binding(self) -> str:
        """What most of the time goes to, at 3 axes."""
        return next(iter(self.cost.kinds), "nothing")


def analyse(compiled: Compiled, serving: Serving | None = None) -> Analysis:
    """Reads a program that was compiled with a dump (`cache.compile_cached`).

    Args:
      serving: shapes of prefill and decode.

    Raises:
      HloError: the HLO or the dump is not in the form of the pinned libtpu.
    """
    config, where = compiled.config, compiled.where
    program = hlo.parse(compiled.hlo)
    length = config.data.sequence_length
    kernels = kernel_costs(where.chip, length)
    found = cost(program, where.chip, kernels, compiled.mesh, where.slices)
    held = memory(
        program, read_dump(compiled.dump), config.model, compiled.mesh, compiled.code_bytes
    )
    tokens, flops = _work(compiled, serving)
    train = compiled.name == "train"
    return Analysis(
        compiled=compiled,
        memory=held,
        cost=found,
        flops=found.flops(flops / where.devices),
        tokens=tokens,
        knobs=tuple(knobs(config, held, found)) if train else (),
        findings=tuple(findings(program, config.model, compiled.mesh)) if train else (),
    )


def _work(compiled: Compiled, serving: Serving | None) -> tuple[int, float]:
    """Tokens and FLOPs that the mathematics needs, over all devices. A forward pass is a third of
    a training step's."""
    data, model = compiled.config.data, compiled.config.model
    if compiled.name in ("train", "evaluate"):
        tokens = data.batch_size * data.sequence_length
        if compiled.name == "evaluate":
            return tokens, tokens * flops_per_token(model, data.sequence_length) / 3
        lora = compiled.config.lora
        return tokens, tokens * flops_per_token(model, data.sequence_length, lora)
    if compiled.name == "prefill":
        tokens = serving.batch * serving.prompt
        return tokens, tokens * flops_per_token(model, serving.prompt) / 3
    # One token of each row attends to the whole cache: twice the causal half.
    return serving.batch, serving.batch * flops_per_token(model, 2 * serving.cache) / 3
