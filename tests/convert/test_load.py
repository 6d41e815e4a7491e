"""One loader for every kind of directory, onto any mesh."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_hf

from lemur_jax.config import MeshConfig
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf import import_hf
from lemur_jax.convert.hf_source import open_hf
from lemur_jax.convert.load import load_model
from lemur_jax.model import param
from lemur_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_hf.write(tmp_path_factory.mktemp("load") / "hf", tiny_hf.weights("bfloat16"))


@pytest.fixture(scope="module")
def ours(source):
    return import_hf(source, source.parent / "ours")


def bits(model):
    return {name: np.asarray(leaf) for name, leaf in param.flatten(model).items()}


def test_layers_are_read_one_by_one_or_together(source):
    """Red when `read(name, layer)` reads another layer."""
    hf = open_hf(source)
    for name in hf.names:
        whole = hf.read(name)
        assert whole.shape == hf.shape(name) and whole.dtype == hf.dtype(name)
        if name.startswith("layers/"):
            for layer in range(2):
                assert np.array_equal(hf.read(name, layer), whole[layer])
    q = tiny_hf.weights("bfloat16")["model.layers.1.self_attn.q_proj.weight"]
    assert np.array_equal(hf.read("layers/wq", 1), q.reshape(4, 4, 16).transpose(2, 0, 1))


def test_every_kind_of_path_gives_the_same_weights(source, ours):
    """Red when the HF path skips the table or the checkpoint path strips a wrong prefix."""
    from_hf, where = load_model(source)
    assert where == source
    assert from_hf.config.param_dtype == "bfloat16"
    for path in (ours, ours.parent):
        model, where = load_model(path)
        assert where == ours and model.config.param_dtype == "bfloat16"
        expected = bits(from_hf)
        for name, leaf in bits(model).items():
            assert leaf.dtype == expected[name].dtype == "bfloat16"
            assert np.array_equal(leaf, expected[name])


@pytest.mark.parametrize("kind", ["hf", "lemur"])
def test_onto_a_mesh_in_the_dtype_asked_for(source, ours, kind):
    """Red when weights arrive unsharded, or stay in the stored dtype."""
    path = source if kind == "hf" else ours
    plain, _ = load_model(path)
    config = dataclasses.replace(plain.config, param_dtype="float32", remat="full")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    model, _ = load_model(path, mesh=mesh, config=config)
    assert model.config == config
    expected = bits(plain)
    for name, leaf in param.flatten(model).items():
        assert leaf.dtype == "float32"
        assert np.array_equal(np.asarray(leaf), expected[name].astype(np.float32))
    wq = param.flatten(model)["layers/wq"]
    assert len(wq.sharding.device_set) == 8
    assert wq.addressable_shards[0].data.shape == (2, 8, 2, 4)  # embed over fsdp, heads over tensor


def test_vocabulary_padding_is_the_readers_choice_for_hf(source, ours):
    """Red when the padding of the default config is kept: 101 rows fit in 104."""
    config = dataclasses.replace(load_model(ours)[0].config, vocab_multiple=8)
    model, _ = load_model(source, config=config)
    assert param.flatten(model)["table"].shape == (104, 16)
    with pytest.raises(ConversionError, match=r"128 vocabulary rows.*vocab_multiple=8"):
        load_model(ours, config=config)


@pytest.mark.parametrize("kind", ["hf", "lemur"])
def test_another_model_is_refused(source, ours, kind):
    """Red when the config asked for silently wins over the stored one."""
    path = source if kind == "hf" else ours
    config = load_model(path)[0].config
    wrong = dataclasses.replace(
        config, norm_eps=1e-6, rope=dataclasses.replace(config.rope, theta=5e5)
    )
    with pytest.raises(ConversionError) as caught:
        load_model(path, config=wrong)
    for word in ("ModelConfig.norm_eps=1e-06", "1e-05", "theta=500000.0", "theta=10000.0"):
        assert word in str(caught.value)
