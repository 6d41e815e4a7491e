"""The TPU compiler on a machine without a TPU: environment, version, and its lock explained."""

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator

from lemur_jax.errors import LemurError

VERSION = "0.0.42.1"
JAX = "0.10.2"
INSTALL = (
    f"In an environment with Python 3.11: pip install -e '.[tpu]' (jax {JAX}, libtpu {VERSION})"
)
# Without these libtpu asks a metadata server which TPU it sits on, and locks out other processes.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class CompilerMissing(LemurError):
    """There is no TPU compiler here, or not the one that is understood; says how to get it."""


def missing() -> str | None:
    """Why nothing can be compiled for a TPU here, or None."""
    found = {name: _version(name) for name in ("libtpu", "jax")}
    if found["libtpu"] is None:
        return f"libtpu, the TPU compiler, is not installed. {INSTALL}"
    if found["libtpu"] != VERSION:
        return (
            f"libtpu {found['libtpu']} is installed; programs, budgets and the time model are read "
            f"from libtpu {VERSION}. {INSTALL}"
        )
    if found["jax"] != JAX:
        return f"jax {found['jax']} is installed, which libtpu {VERSION} does not fit. {INSTALL}"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def prepare() -> None:
    """Sets what libtpu reads when it loads. Call before anything touches JAX's backends.

    Raises:
      CompilerMissing: libtpu is not there, or another version.
    """
    if reason := missing():
        raise CompilerMissing(reason)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "jax" in sys.modules:  # it has read JAX_PLATFORMS already
        import jax

        if not jax.config.jax_platforms:
            jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns libtpu's refusal to be loaded twice into words."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if "lockfile" in text or "already in use" in text:
            raise LemurError(
                "libtpu is in use by another process and ALLOW_MULTIPLE_LIBTPU_LOAD="
                f"{os.environ.get('ALLOW_MULTIPLE_LIBTPU_LOAD')!r} forbids a second: set it to 1 "
                "(two compilations at once are safe where there is no TPU), or wait; a lock left "
                f"behind by a dead process is /tmp/libtpu_lockfile. libtpu: {text[:300]}"
            ) from error
        raise
