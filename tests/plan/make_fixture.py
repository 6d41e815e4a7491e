"""Compiles tests/plan/fixture: a small model's step on 256 chips of v4, on a machine without one.

    python tests/plan/make_fixture.py        (libtpu 0.0.42.1, jax 0.10.2; 20 s)

Two micro-batches, a scan over eight layers of a gated pair of products with full rematerialisation,
fsdp 64 x tensor 4: nested loops, asynchronous gathers fused with products, reduce-scatters,
all-reduces in every printed form of replica groups. The text and the compiler's buffer assignment
are kept, compressed, without what the analyses do not read.
"""

import gzip
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

FIXTURE = Path(__file__).with_name("fixture")
MESH = {"data": 1, "fsdp": 64, "sequence": 1, "tensor": 4}
LAYERS, EMBED, MLP, ROWS, LENGTH, MICRO_BATCHES = 8, 1024, 4096, 4, 8192, 2
OPTIONS = dict.fromkeys(
    (
        "xla_tpu_enable_async_collective_fusion",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "xla_enable_async_all_gather",
    ),
    True,
)


def compiled(directory: str) -> str:
    """The program's text; the buffer assignment is written into the directory."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        JAX_PLATFORMS="cpu",
        TPU_ACCELERATOR_TYPE="v4-8",
        TPU_WORKER_HOSTNAMES="localhost",
    )
    import jax
    import jax.numpy as jnp
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from lemur_jax.plan.buffers import dump_options

    class Model(NamedTuple):
        up: jax.Array
        down: jax.Array

    class State(NamedTuple):
        model: Model
        mu: Model

    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name="v4:4x8x8",
        chip_config_name="megacore",
        chips_per_host_bounds=(2, 2, 1),
        wrap=(True, True, True),
    )
    grid = mesh_utils.create_device_mesh(tuple(MESH.values()), devices=list(topology.devices))
    mesh = Mesh(grid, tuple(MESH))

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def keep(x, *spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def loss(model: Model, x_BTE):
        def layer(x, w):
            h = jax.nn.silu(keep(x @ w.up.astype(x.dtype), "fsdp", None, "tensor"))
            return keep(x + h @ w.down.astype(x.dtype), "fsdp"), None

        y, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x_BTE, model)
        return (y.astype(jnp.float32) ** 2).sum()

    def step(state: State, batch):
        def add(total, x_BTE):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(state.model, x_BTE)), None

        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.model), batch)
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mu, grads)
        return State(jax.tree.map(jnp.subtract, state.model, mu), mu)

    model = Model(
        array((LAYERS, EMBED, MLP), jnp.float32, None, "fsdp", "tensor"),
        array((LAYERS, MLP, EMBED), jnp.float32, None, "tensor", "fsdp"),
    )
    rows = ROWS * MESH["fsdp"]
    batch = array((MICRO_BATCHES, rows, LENGTH, EMBED), jnp.bfloat16, None, ("data", "fsdp"))
    with jax.set_mesh(mesh):
        traced = jax.jit(step, donate_argnums=0).trace(State(model, model), batch)
        lowered = traced.lower(lowering_platforms=("tpu",))
        program = lowered.compile(compiler_options=OPTIONS | dump_options(directory))
    return program.as_text()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        texts = {"program": compiled(directory)}
        for name in ("buffer-assignment", "buffer-assignment-values", "live-range"):
            (path,) = Path(directory).glob(f"*after_optimizations-{name}.txt")
            texts[name] = path.read_text()
        (report,) = Path(directory).glob("*memory-usage-report.txt")
        texts["report"] = "\n".join(report.read_text().splitlines()[:3])
    texts["live-range"] = texts["live-range"].split("  Live ranges at")[0]
    for name, text in texts.items():
        (FIXTURE / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
