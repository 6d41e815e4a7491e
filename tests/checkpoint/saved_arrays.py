"""The arrays that the tests of this folder save, and what they do to them.

Plain functions, not fixtures: the worker processes of test_processes.py need them too.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.checkpoint import CheckpointWriter

# When one of many reads or writes fails, Orbax closes its event loop under the others, whose
# complaints come a moment later, as "unraisable" exceptions.
LATE_COMPLAINTS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# name -> (shape, dtype, partition over the mesh axes x and y); sizes divide by 8. The large ones
# are stored in data files; OCDBT puts small values into its index, where checksums guard them.
LAYOUT = {
    "params/embed": ((512, 64), "float32", ("x", "y")),
    "params/layers/wq": ((3, 64, 32, 16), "bfloat16", (None, "x", "y")),
    "params/layers/norm": ((3, 16), "float32", (None, "y")),
    "params/half": ((64, 512), "float16", ("y",)),
    "params/mask": ((16, 8), "bool", ("x",)),
    "opt/mu/embed": ((512, 64), "float32", ("y", "x")),
    "opt/count": ((), "int32", ()),
    "step": ((), "int32", ()),
}
ABOUT = {"model": {"layers": 3, "rope": {"theta": 1e4}}, "data": {"position": 2**40 + 1}}
FILES = {"config.gin": b"A.b = 1\n", "tokenizer/tokenizer.model": bytes(range(256))}
PARAMS = sorted(name for name in LAYOUT if name.startswith("params/"))


def make_mesh(x: int, y: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: x * y]).reshape(x, y)
    return jax.sharding.Mesh(devices, ("x", "y"))


def on(mesh: jax.sharding.Mesh, axes: tuple) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def host_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Random bits of every dtype: NaNs with payloads, infinities and denormals included."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, (shape, dtype, _) in LAYOUT.items():
        if dtype == "bool":
            arrays[name] = rng.random(shape) < 0.5
        else:
            size = jnp.dtype(dtype).itemsize
            bits = rng.integers(0, 256, (*shape, size), dtype=np.uint8)
            arrays[name] = bits.view(jnp.dtype(dtype)).reshape(shape)
    return arrays


def place(arrays: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    return {n: jax.device_put(a, on(mesh, LAYOUT[n][2])) for n, a in arrays.items()}


def split(arrays: dict) -> dict[str, dict]:
    is_param = {name: name.startswith("params/") for name in arrays}
    return {
        "params": {n: a for n, a in arrays.items() if is_param[n]},
        "opt": {n: a for n, a in arrays.items() if not is_param[n]},
    }


def targets_on(mesh: jax.sharding.Mesh, names=LAYOUT) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        n: jax.ShapeDtypeStruct(LAYOUT[n][0], LAYOUT[n][1], sharding=on(mesh, LAYOUT[n][2]))
        for n in names
    }


def assert_same_bits(got: dict, want: dict) -> None:
    assert sorted(got) == sorted(want)
    for name in want:
        a, b = np.asarray(got[name]), np.asarray(want[name])
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert a.tobytes() == b.tobytes(), name


def save_steps(directory: Path, *steps: int, mesh=None, keep_latest=10) -> None:
    """Complete checkpoints; that of step s holds host_arrays(s)."""
    with CheckpointWriter(directory, keep_latest=keep_latest) as writer:
        for step in steps:
            arrays = place(host_arrays(step), mesh or make_mesh(4, 2))
            writer.save(step, split(arrays), {**ABOUT, "step": step}, FILES)


def overwrite_value(step_dir: Path, array: np.ndarray) -> None:
    """Changes one byte of `array` where it is stored: as it is (no compression), and if it is
    small perhaps more than once, in nodes that OCDBT has since replaced."""
    raw = array.tobytes()
    found = 0
    for path in (step_dir / "params").rglob("*"):
        if path.is_file() and (start := path.read_bytes().find(raw)) >= 0:
            data = bytearray(path.read_bytes())
            data[start + len(raw) // 2] ^= 0x10
            path.write_bytes(data)
            found += 1
    assert found
