"""The mesh, the table, and the checks that run before anything is traced."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lemur_jax import sharding
from lemur_jax.config import ConfigError, MeshConfig, ModelConfig, RopeConfig
from lemur_jax.model import decoder, param

MODEL = ModelConfig(
    vocab_size=32005,
    embed=64,
    mlp=96,
    layers=2,
    heads=8,
    kv_heads=2,
    head_dim=8,
    max_positions=64,
    rope=RopeConfig(theta=1e4),
    norm_eps=1e-5,
)


def test_free_size_takes_what_is_left():
    """Red if resolve_mesh divides by the wrong product."""
    sizes = sharding.resolve_mesh(MeshConfig(fsdp=-1, tensor=4), 8)
    assert (sizes.fsdp, sizes.tensor) == (2, 4)
    assert dict(sharding.make_mesh(MeshConfig(fsdp=2, tensor=-1)).shape) == {
        "data": 1,
        "fsdp_outer": 1,
        "fsdp": 2,
        "sequence": 1,
        "tensor": 4,
    }


def test_mesh_that_does_not_multiply():
    """Red if resolve_mesh accepts any product."""
    with pytest.raises(ConfigError, match=r"fsdp=3.*there are 8 devices.*legal sizes: 1, 2, 4, 8"):
        sharding.make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(ConfigError, match=r"tensor=3.*there are 8"):
        sharding.make_mesh(MeshConfig(fsdp=-1, tensor=3))


def test_check_names_every_number():
    """Red if check() stops at the first problem."""
    mesh = MeshConfig(data=1, fsdp=5, sequence=3, tensor=3)
    with pytest.raises(ConfigError) as error:
        sharding.check(MODEL, mesh, rows=8, sequence_length=64)
    text = str(error.value)
    assert "ModelConfig.heads=8 must divide by MeshConfig.tensor=3; legal" in text
    assert (
        "kv_heads=2 and MeshConfig.tensor=3: one must divide the other; legal tensor: 1, 2, 4, 8"
        in text
    )
    assert (
        "= 8 must divide by MeshConfig data*fsdp_outer*fsdp*dcn_data=5; nearest legal: 5, 10"
        in text
    )
    assert "sequence_length=64 must divide by MeshConfig.sequence=3" in text
    sharding.check(MODEL, MeshConfig(fsdp=2, tensor=4), rows=8, sequence_length=64)


def test_unknown_axis_is_an_error():
    """Red if a missing logical axis were replicated."""
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(KeyError, match="'embd' is not in"):
        sharding.spec(("embd",), mesh)
    with pytest.raises(ValueError, match="both map to mesh axis 'tensor'"):
        sharding.spec(("heads", "mlp"), mesh)


def test_every_weight_is_sharded_as_the_table_says():
    """Red if the table maps embed to None, or too few kv_heads are not replicated."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=4))
    specs = {
        name: where.spec
        for name, where in param.flatten(param.shardings(decoder.abstract(MODEL), mesh)).items()
    }
    fsdp = ("fsdp_outer", "fsdp")
    assert specs["layers/wq"] == P(None, fsdp, "tensor", None)
    assert specs["layers/wk"] == P(None, fsdp, None, None)  # 2 kv heads on 4 devices
    assert specs["layers/w_down"] == P(None, "tensor", fsdp)
    assert specs["table"] == P(None, (*fsdp, "tensor"))
    assert specs["head"] == P(fsdp, "tensor")
    assert specs["norm"] == P(None)


def test_odd_vocabularies_are_padded_the_same_on_every_mesh():
    """Red if padded_vocab depended on the mesh: checkpoints could not move."""
    assert sharding.padded_vocab(MODEL) == 32128
    assert param.flatten(decoder.abstract(MODEL))["head"].shape == (64, 32128)


def test_place_puts_rows_where_they_belong():
    """Red if place() forgets to subtract first_row, or splits the wrong dimension."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    rows = np.arange(3 * 8 * 4, dtype=np.int32).reshape(3, 8, 4)
    placed = sharding.place(rows, 0, 8, mesh)
    assert placed.sharding.spec == P(None, ("data", "fsdp_outer", "fsdp"), "sequence")
    assert {shard.data.shape for shard in placed.addressable_shards} == {(3, 2, 2)}
    np.testing.assert_array_equal(jax.device_get(placed), rows)
    assert sharding.local_row_range(8, mesh) == (0, 8)
