"""Settings of `lemur data clean`, and the steps that gin may list."""

import dataclasses
from typing import Any

from lemur_jax.config import ConfigError
from lemur_jax.data.cleaning.decontaminate import Decontaminate
from lemur_jax.data.cleaning.duplicates import ExactDuplicates, NearDuplicates
from lemur_jax.data.cleaning.redact import RedactAddresses, RedactSecrets
from lemur_jax.data.cleaning.steps import (
    AlphanumericFilter,
    LanguageFilter,
    LengthFilter,
    LicenceFilter,
    LineFilter,
)
from lemur_jax.data.sources import SourceConfig

CORPUS_STEPS = (ExactDuplicates, NearDuplicates)
STEPS = (
    *CORPUS_STEPS,
    *(LicenceFilter, LanguageFilter, LengthFilter, LineFilter, AlphanumericFilter),
    *(RedactSecrets, RedactAddresses, Decontaminate),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """One run of `lemur data clean`.

    Attributes:
      path: a new directory for the result.
      sources: what is cleaned. Duplicates are found across all of them; the first one is kept, in
        this order.
      steps: of STEPS, in the order in which they run.
      workers: processes; 0 takes one for each core, 1 runs in this process.
      memory_mb: MiB that the main process may hold while it finds duplicates, besides the
        interpreter.
      seed: of the sources' `validation_fraction`.
    """

    path: str
    sources: tuple[SourceConfig, ...]
    steps: tuple[Any, ...]
    workers: int = 0
    memory_mb: int = 1024
    seed: int = 0

    def __post_init__(self):
        problems = []
        for field in ("sources", "steps"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
            if not getattr(self, field):
                problems.append(f"CleanConfig.{field}=() is empty: give at least one")
        if not self.path:
            problems.append("CleanConfig.path='' is empty: give a directory")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            problems.append(f"CleanConfig.sources={names} repeat a name: every name must differ")
        for step in self.steps:
            if not isinstance(step, STEPS):
                known = ", ".join(one.__name__ for one in STEPS)
                problems.append(f"CleanConfig.steps: {step!r} is not one of {known}")
        for field, least in (("workers", 0), ("memory_mb", 1)):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                problems.append(f"CleanConfig.{field}={value!r} must be an integer >= {least}")
        if problems:
            raise ConfigError(problems)
