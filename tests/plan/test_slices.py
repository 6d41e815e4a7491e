"""Slices by name: what N counts, which exist, and what libtpu makes of each."""

import contextlib
import math
import subprocess
import sys

import pytest

from lemur_jax.config import ConfigError
from lemur_jax.plan import libtpu
from lemur_jax.plan.chips import CHIPS
from lemur_jax.plan.slices import legal_names, shapes, slice_named

needs_libtpu = pytest.mark.skipif(libtpu.missing() is not None, reason=str(libtpu.missing()))


@pytest.mark.parametrize(
    ("name", "shape", "chips", "devices", "wrap"),
    [
        ("v4-8", (2, 2, 1), 4, 4, (False, False, False)),
        ("v4-512", (4, 8, 8), 256, 256, (True, True, True)),
        ("v4-64", (2, 4, 4), 32, 32, (False, False, False)),
        ("v5p-1024", (8, 8, 8), 512, 512, (True, True, True)),
        ("v5p-17920", (16, 20, 28), 8960, 8960, (True, True, True)),
        ("v5e-16", (4, 4), 16, 16, (False, False, False)),
        ("v5e-128", (8, 16), 128, 128, (False, True, False)),
        ("v6e-256", (16, 16), 256, 256, (True, True, False)),
        ("v7x-128", (4, 4, 4), 64, 128, (True, True, True)),
        ("tpu7x-128", (4, 4, 4), 64, 128, (True, True, True)),
        ("2xv4-256", (4, 4, 8), 256, 256, (True, True, True)),
        ("4xv5e-256", (16, 16), 1024, 1024, (True, True, False)),
    ],
)
def test_names(name, shape, chips, devices, wrap):
    """Red if N of v4 counted chips, v7x had one device a chip, or a 2x2x1 was a torus."""
    found = slice_named(name)
    assert (found.shape, found.chips, found.devices, found.wrap) == (shape, chips, devices, wrap)
    assert str(chips) in found.description()


def test_generated_shapes_are_the_published_ones():
    """Red if _cubes preferred a long box (4x4x36 for 12x12x4), or the sides' limit moved."""
    published = {  # cloud.google.com/tpu/docs/v5p: a sample over all sizes
        **{384: (4, 4, 12), 640: (4, 4, 20), 768: (4, 8, 12), 1152: (4, 12, 12)},
        **{1408: (4, 4, 44), 1536: (8, 8, 12), 3072: (8, 12, 16), 3456: (12, 12, 12)},
        **{6912: (12, 12, 24), 7040: (4, 20, 44), 7808: (4, 4, 244), 8448: (8, 12, 44)},
        **{10368: (12, 12, 36), 11520: (12, 20, 24), 12288: (16, 16, 24), 13824: (12, 24, 24)},
    }
    assert published.items() <= shapes("v5p").items()
    assert len(shapes("v5p")) == 96
    # 67 cubes in a row are longer than any published slice
    assert 8576 not in shapes("v5p")
    for chip in CHIPS:
        for n, shape in shapes(chip).items():
            assert n == CHIPS[chip].cores * CHIPS[chip].devices * math.prod(shape)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "v4-500",
            "no slice of 500 TensorCores (two a chip); nearest first: v4-512, v4-384",
        ),
        ("v5e-24", "v5e has no slice of 24 chips; nearest first: v5e-32, v5e-16"),
        ("v4_512", "did you mean v4-512"),
        ("v8-256", "v7x, N = TensorCores (two a chip): v7x-8"),
        ("h100", "Legal:\n  v4, N = TensorCores (two a chip): v4-8, v4-16"),
        ("0xv4-8", "is unknown"),
        ("", "is unknown"),
    ],
)
def test_unknown_names_get_the_legal_ones(name, message):
    """Red if the list were not ordered by distance, or a name were taken for another."""
    with pytest.raises(ConfigError) as error:
        slice_named(name)
    assert message in str(error.value)


def test_peaks_are_those_of_mfu():
    """Red if the chip table and the MFU of a run used different peaks."""
    from lemur_jax.train.metrics import PEAK_FLOPS

    for chip in CHIPS.values():
        assert PEAK_FLOPS[chip.device_kind] == chip.flops_per_s
        made = chip.flops_per_cycle * chip.cores * chip.clock_hz
        assert made == pytest.approx(chip.flops_per_s, rel=3e-3)


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"libtpu": None, "jax": libtpu.JAX}, "is not installed. In an environment with Python"),
        ({"libtpu": "0.0.50", "jax": libtpu.JAX}, "libtpu 0.0.50 is installed; "),
        ({"libtpu": libtpu.VERSION, "jax": "0.11.2"}, "jax 0.11.2 is installed, which libtpu"),
    ],
    ids=str,
)
def test_no_compiler_or_another(monkeypatch, installed, message):
    """Red if another version were used in silence, or the message did not say how to install."""
    monkeypatch.setattr(libtpu, "_version", installed.get)
    with pytest.raises(libtpu.CompilerMissing) as error:
        libtpu.prepare()
    assert message in str(error.value)
    assert "pip install -e '.[tpu]'" in str(error.value)


def test_the_lock_is_explained():
    """Red if libtpu's words about its lock file came through alone."""
    words = "ABORTED: The TPU is already in use by process 5. See libtpu multi-process lockfile"
    with pytest.raises(Exception, match="set it to 1") as error, libtpu.explained():
        raise RuntimeError(words)
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD" in str(error.value)


_ASK = """
import sys
from lemur_jax.plan import libtpu, slices
libtpu.prepare()
for name in sys.argv[1:]:
    where = slices.slice_named(name)
    devices = slices.topology(where).devices
    last = devices[-1]
    slice_index = getattr(last, "slice_index", None) or 0
    print(name, len(devices), last.device_kind.replace(" ", "_"), last.num_cores, slice_index)
"""


def _asked(names: list[str]) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", _ASK, *names], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines()]


def _check(names: list[str]) -> None:
    answers = _asked(names)
    assert [answer[0] for answer in answers] == names
    for name, devices, kind, cores, slice_index in answers:
        where = slice_named(name)
        assert int(devices) == where.devices, name
        assert kind.replace("_", " ") == where.chip.device_kind, name
        assert int(cores) == where.chip.cores, name
        assert int(slice_index) == where.slices - 1, name


@needs_libtpu
def test_libtpu_knows_the_slices():
    """Red if megacore, the host's bounds or the number of slices did not reach libtpu."""
    _check(["v4-8", "v4-512", "v5p-128", "v5e-1", "v5e-128", "v6e-256", "v7x-16", "2xv4-256"])


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_libtpu_knows_every_legal_name(chip):
    """Red if legal_names invented a slice."""
    _check([*legal_names(chip), f"2x{legal_names(chip)[1]}"])


_HOLD = """
import sys
from lemur_jax.plan import libtpu, slices
libtpu.prepare()
try:
    print(len(slices.topology(slices.slice_named("v4-8")).devices), flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
sys.stdin.read()
"""


@needs_libtpu
@pytest.mark.parametrize("allowed", [True, False])
def test_two_compilers_at_once(allowed, monkeypatch):
    """Red if prepare() left libtpu's lock on, or the second process's error were not explained."""
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD", raising=False)
    if not allowed:
        monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "0")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    said = []
    with contextlib.ExitStack() as running:
        for _ in range(2):
            process = running.enter_context(
                subprocess.Popen([sys.executable, "-c", _HOLD], **pipes)
            )
            said.append(process.stdout.readline().strip())
            running.callback(process.stdin.close)
    in_use = "LemurError libtpu is in use by another process"
    if allowed:
        assert said == ["4", "4"]
    else:  # the first may meet some other test's compiler
        assert said[0] == "4" or said[0].startswith(in_use)
        assert said[1].startswith(in_use)
