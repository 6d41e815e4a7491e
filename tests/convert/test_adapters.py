"""LoRA and PEFT: the same step, adapters out and in, merged exports, and damaged directories."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import decoder_logits, load_float32, make, random_tokens, their_logits, torch

from lemur_jax import checkpoint, sharding
from lemur_jax.cli import main
from lemur_jax.config import LoraConfig, LossConfig, MeshConfig, OptimizerConfig
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.load import load_model
from lemur_jax.convert.model import open_source
from lemur_jax.convert.peft import _to_ours, names, open_peft
from lemur_jax.data.pipeline import make_batch
from lemur_jax.model import lora, param
from lemur_jax.train.optimizer import optimizer, schedule
from lemur_jax.train.state import state_from_model
from lemur_jax.train.step import make_step

peft = pytest.importorskip("peft", reason="adapters are measured against peft (extra: test)")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

LORA = LoraConfig(rank=4, alpha=6.0, targets=("wq", "wk", "wv", "wo", "w_up", "w_down"))
HF_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture
def base(tmp_path):
    """(directory, transformers model): grouped queries, float32."""
    return tmp_path / "hf", make(tmp_path / "hf", num_key_value_heads=2)


def adapt(model, seed=0, **changes):
    """transformers' model with PEFT's adapters, B not zero."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": HF_TARGETS}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings | changes))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
            elif "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return adapted.eval()


def ours_of(adapted, config, model_config):
    """PEFT's adapters by our flat names."""
    parameters, found = dict(adapted.named_parameters()), {}
    if config.embeddings:
        module = "base_model.model.{}.modules_to_save.default.weight"
        for name, theirs in (("table", "model.embed_tokens"), ("head", "lm_head")):
            found[name] = parameters[module.format(theirs)].detach().numpy().copy()
        found["head"] = found["head"].T
    for target in config.targets:
        pairs = []
        for layer in range(model_config.layers):
            keys = (n.replace(".weight", ".default.weight") for n in names(target, layer))
            a, b = (parameters[key].detach().numpy().copy() for key in keys)
            pairs.append(_to_ours(a, b, target, model_config))
        for side, stack in zip("ab", zip(*pairs)):
            found[f"layers/{target}_{side}"] = np.stack(stack)
    return found


def write_run(root, hf, flat=None, config=LORA, dtype="float32"):
    """A run's checkpoint with LoRA, as training saves it; `flat`: its adapters."""
    model_config = dataclasses.replace(open_source(hf).config, dtype="float32", param_dtype=dtype)
    model, _ = load_model(hf, config=model_config)
    adapters = lora.Adapters(config, model_config, jax.random.key(1))
    if flat is not None:
        adapters = param.unflatten(adapters, {n: jnp.asarray(w) for n, w in flat.items()})
    writer = checkpoint.CheckpointWriter(
        root / checkpoint.CHECKPOINTS, keep_latest=1, keep_every_steps=None, report=print
    )
    writer.save(
        5,
        {
            "params": {f"params/{n}": w for n, w in param.flatten(model).items()},
            "adapters": {f"adapters/{n}": w for n, w in param.flatten(adapters).items()},
        },
        about={
            "kind": "train_state",
            "model": dataclasses.asdict(model_config),
            "lora": dataclasses.asdict(config),
            "lora_base": str(hf),
        },
    )
    writer.close()
    return root


def load_reference(path):
    """The model of a path, to be computed by the reference attention."""
    config = dataclasses.replace(open_source(path).config, attention="reference")
    return load_model(path, config=config)


@pytest.fixture(
    params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["matrices", "embeddings too"]
)
def run(tmp_path, base, request):
    """(run with LoRA, PEFT's model of the same adapters)."""
    directory, model = base
    config = dataclasses.replace(LORA, embeddings=request.param)
    saved = ["embed_tokens", "lm_head"] if request.param else None
    adapted = adapt(model, modules_to_save=saved)
    flat = ours_of(adapted, config, open_source(directory).config)
    return write_run(tmp_path / "run", directory, flat, config), adapted


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(base directory, PEFT's directory of adapters): never changed."""
    root = tmp_path_factory.mktemp("sound")
    adapt(make(root / "hf", num_key_value_heads=2)).save_pretrained(root / "saved")
    return root / "hf", root / "saved"


@pytest.fixture
def saved(sound, tmp_path):
    """(base directory, a copy of PEFT's directory, to be damaged)."""
    shutil.copytree(sound[1], tmp_path / "saved")
    return sound[0], tmp_path / "saved"


TOKENS = random_tokens(128, 2, 16)


def test_a_run_computes_what_pefts_model_does(run):
    """Red if load_model left the adapters out, which a plain read of `params` does."""
    directory, adapted = run
    model, _ = load_reference(directory)
    ours = decoder_logits(model, TOKENS)[..., :128]
    np.testing.assert_allclose(ours, their_logits(adapted, TOKENS), atol=2e-5)


def test_merged_export(run, tmp_path, capsys):
    """Red if open_ours returned the base, or Adapted.read cut B by the inputs' region."""
    directory, adapted = run
    assert main(["convert", str(directory), str(tmp_path / "out")]) == 0
    ours = decoder_logits(load_float32(tmp_path / "out", "reference")[0], TOKENS)[..., :128]
    np.testing.assert_allclose(ours, their_logits(adapted, TOKENS), atol=2e-5)
    merged = adapted.merge_and_unload().state_dict()
    stored = safetensors_numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged.items():
        np.testing.assert_allclose(stored[name], tensor.numpy(), atol=1e-6, err_msg=name)


def test_any_cut_gives_the_same_bits(run):
    """Red if a part of a weight took the adapters' rows of another part."""
    source = open_source(run[0])
    assert np.array_equal(source.read("head", (slice(3, 9), 5)), source.read("head")[3:9, 5])
    for name in ("layers/wk", "layers/wo", "layers/w_gate"):
        whole = source.read(name)
        assert np.array_equal(source.read(name, (1, slice(3, 5))), whole[1, 3:5])
        assert np.array_equal(source.read(name, (slice(1, 2), 2, slice(1, 2))), whole[1:, 2, 1:2])


def test_to_peft_and_back(run, base, tmp_path):
    """Red if A or B were not transposed, or k's B reshaped with H heads; PEFT itself loads it."""
    directory, adapted = run
    assert main(["convert", str(directory), str(tmp_path / "peft"), "--to=peft"]) == 0
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"]) == (4, 6)
    assert said["base_model_name_or_path"] == str(base[0])
    from transformers import LlamaForCausalLM

    fresh = LlamaForCausalLM.from_pretrained(base[0]).eval()
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "peft").eval()
    assert np.array_equal(their_logits(loaded, TOKENS), their_logits(adapted, TOKENS))
    # Back in, with the base that they name and with one that is given.
    for extra in ([], [f"--base={base[0]}"]):
        out = tmp_path / f"back{len(extra)}"
        assert main(["convert", str(tmp_path / "peft"), str(out), *extra]) == 0
        assert main(["convert", "verify", str(directory), str(out)]) == 0


def test_init_from_a_peft_directory(base, tmp_path):
    """Red if load_model took the adapter directory for a Hugging Face one, or lost its base."""
    adapted = adapt(base[1])
    adapted.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base[0])
    (tmp_path / "saved" / "adapter_config.json").write_text(json.dumps(config))
    model, _ = load_reference(tmp_path / "saved")
    ours = decoder_logits(model, TOKENS)[..., :128]
    np.testing.assert_allclose(ours, their_logits(adapted, TOKENS), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True changes"),
        ({"use_rslora": True}, "use_rslora=True changes"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "lacks base_model.model.lm_head"),
        ({"r": 8}, "the base's needs"),
        ({"r": None}, "rank=None"),
        ({"lora_alpha": "x"}, "alpha='x'"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(saved, changes, said):
    """Red if an option that changes the formula were ignored (`_HARMLESS` too wide)."""
    base, directory = saved
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConversionError) as caught:
        open_peft(directory, open_source(base))
    assert said in str(caught.value)


def test_missing_and_strange_tensors_are_named(saved):
    """Red if a layer without adapters were taken as unchanged."""
    base, directory = saved
    path = directory / "adapter_model.safetensors"
    tensors = safetensors_numpy.load_file(path)
    gone = names("wq", 1)[0]
    tensors["base_model.model.lm_head.weight"] = tensors.pop(gone)
    safetensors_numpy.save_file(tensors, path)
    with pytest.raises(ConversionError) as caught:
        open_peft(directory, open_source(base))
    assert f"lacks {gone}" in str(caught.value) and "holds base_model.model.lm_head" in str(
        caught.value
    )


def test_what_the_command_refuses(saved, tmp_path, capsys):
    """Red if a full model became empty adapters, or a base elsewhere were not asked for."""
    base, directory = saved
    assert main(["convert", str(base), str(tmp_path / "no"), "--to=peft"]) == 2
    assert "has no adapters" in capsys.readouterr().err
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "hub/name"}
    path.write_text(json.dumps(config))
    assert main(["convert", str(directory), str(tmp_path / "no")]) == 2
    assert "--base=MODEL" in capsys.readouterr().err
    assert main(["convert", str(base), str(tmp_path / "no"), "--base=x"]) == 2
    assert "--base is of PEFT's adapters" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_sums_are_rounded_to_the_bases_dtype(base, tmp_path):
    """Red if the delta were cast to bfloat16 before it is added."""
    flat = ours_of(adapt(base[1]), LORA, open_source(base[0]).config)
    run = write_run(tmp_path / "run", base[0], flat, dtype="bfloat16")
    found = open_source(run).read("layers/wq")
    frozen = open_source(base[0]).read("layers/wq").astype(jnp.bfloat16).astype(np.float64)
    a, b = flat["layers/wq_a"].astype(np.float64), flat["layers/wq_b"].astype(np.float64)
    exact = frozen + 1.5 * np.einsum("ler,lrhd->lehd", a, b)
    assert found.dtype == jnp.bfloat16
    assert np.array_equal(found, exact.astype(jnp.bfloat16))


def test_one_adamw_step_is_pefts(base):
    """Red if the scale were applied twice or left out of the gradient, if the loss were averaged
    over rows, or k's heads laid out as q's. B is not zero: else A has no gradient."""
    directory, model = base
    adapted = adapt(model)
    start, _ = load_float32(directory, "reference")
    optim = OptimizerConfig(
        peak_learning_rate=1e-2,
        schedule="constant",
        b2=0.999,
        eps=1e-4,  # with 1e-8 the first step is the sign of a gradient, however small
        weight_decay=0.01,
        clip_norm=0.0,
    )
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    transform = optimizer(optim)
    state = state_from_model(start, transform, mesh, LORA)
    before = ours_of(adapted, LORA, start.config)
    state = state._replace(adapters=param.unflatten(state.adapters, before))
    tokens = random_tokens(128, 4, 17)
    data = make_batch(tokens, np.ones_like(tokens))
    rng = np.random.default_rng(0)
    data = data._replace(weights=(rng.random((4, 16)) < 0.6).astype(np.float32))
    loss = LossConfig(chunk_tokens=8, implementation="chunked")
    step = jax.jit(make_step(transform, schedule(optim, 10), optim, loss))
    with jax.default_matmul_precision("float32"):
        after, metrics = step(state, jax.tree.map(lambda x: x[None], data))

    trained = [p for p in adapted.parameters() if p.requires_grad]
    torch_optim = torch.optim.AdamW(trained, lr=1e-2, eps=1e-4, weight_decay=0.01)
    out = adapted(torch.from_numpy(data.inputs.astype(np.int64)), use_cache=False).logits
    targets = torch.from_numpy(data.targets.astype(np.int64)).flatten()
    nll = torch.nn.functional.cross_entropy(out.flatten(0, 1), targets, reduction="none")
    weights = torch.from_numpy(data.weights).flatten()
    mean = (nll * weights).sum() / weights.sum()
    mean.backward()
    torch_optim.step()
    np.testing.assert_allclose(float(metrics.loss), float(mean.detach()), rtol=1e-5)
    ours = param.flatten(after.adapters)
    for name, expected in ours_of(adapted, LORA, start.config).items():
        assert np.abs(expected - before[name]).max() > 5e-3
        np.testing.assert_allclose(ours[name], expected, atol=5e-6, err_msg=name)
