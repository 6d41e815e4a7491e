"""One step: independent of mesh, micro-batches and packing; skips what it must."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import MODEL

from lemur_jax import sharding
from lemur_jax.config import LossConfig, MeshConfig, OptimizerConfig
from lemur_jax.data.pipeline import Batch
from lemur_jax.model import param
from lemur_jax.model.decoder import Decoder
from lemur_jax.train.optimizer import decay_mask, optimizer, schedule
from lemur_jax.train.state import random_state
from lemur_jax.train.step import WARM_STEPS, explicit_gradients, gradients, make_step

OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2)
LOSS = LossConfig(z_loss=1e-3, chunk_tokens=8, implementation="chunked")
# float32 sums in another order, after four steps with a learning rate that amplifies them.
SAME_LOSS = 2e-5


def batch(rows: int = 8, length: int = 24) -> Batch:
    """[1, rows, length]: two documents and padding, uneven weights."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 101, (rows, length + 1)).astype(np.int32)
    first, second = length // 2, length // 2 - 3
    segments = np.repeat([[1] * first + [2] * second + [0] * 3], rows, 0).astype(np.int32)
    positions = np.concatenate([np.arange(first), np.arange(second), np.zeros(3)])
    positions = np.repeat(positions[None], rows, 0).astype(np.int32)
    # Rows differ in their number of weighted tokens: a mean of means would be wrong.
    weights = (segments > 0) & (rng.random((rows, length)) < np.linspace(0.1, 1, rows)[:, None])
    fields = (tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32), positions, segments)
    return Batch(*(field[None] for field in fields))


def four_losses(mesh_config, micro_batches, config=OPTIMIZER, explicit=False):
    devices = jax.devices()[: int(np.prod(list(dataclasses.asdict(mesh_config).values())))]
    mesh = sharding.make_mesh(mesh_config, devices)
    transform = optimizer(config)
    step = make_step(transform, schedule(config, 10), config, LOSS, explicit)
    step = jax.jit(step, donate_argnums=0)
    rows = 8 // micro_batches
    split = (x.reshape(micro_batches, rows, -1) for x in batch())
    placed = Batch(*(sharding.place(x, 0, rows, mesh) for x in split))
    with jax.set_mesh(mesh):
        state = random_state(MODEL, transform, mesh, seed=0)
        losses = []
        for _ in range(4):
            state, metrics = step(state, placed)
            losses.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(losses)


@pytest.fixture(scope="module")
def on_one_device():
    return four_losses(MeshConfig(fsdp=1), 1)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [
        (MeshConfig(data=8, fsdp=1), 1),
        (MeshConfig(fsdp=8), 1),
        (MeshConfig(fsdp=1, sequence=8), 1),
        (MeshConfig(fsdp=1, tensor=8), 1),  # tensor > kv_heads
        (MeshConfig(data=2, fsdp=2, tensor=2), 2),
        (MeshConfig(fsdp=2, sequence=2, tensor=2), 4),
    ],
    ids=str,
)
def test_same_losses_on_every_mesh(on_one_device, mesh, micro_batches):
    """Red if attention under a split sequence saw only its own keys, or kv heads were misrouted."""
    np.testing.assert_allclose(four_losses(mesh, micro_batches), on_one_device, rtol=SAME_LOSS)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [
        (MeshConfig(fsdp=8), 1),
        (MeshConfig(fsdp_outer=2, fsdp=2, data=2), 1),
        (MeshConfig(fsdp_outer=2, fsdp=2), 2),
        (MeshConfig(fsdp_outer=2, fsdp=2, sequence=2), 2),
    ],
    ids=str,
)
def test_explicit_gradients_on_every_mesh(on_one_device, mesh, micro_batches):
    """Red if a part of the batch were left out of a weight's gradient (sum_over_batch without
    "data" or "sequence", for norms without the fsdp axes), or if parts came back in another order
    than they were gathered in (psum_scatter over the last axis first)."""
    losses = four_losses(mesh, micro_batches, explicit=True)
    np.testing.assert_allclose(losses, on_one_device, rtol=SAME_LOSS)


def test_explicit_gradients_are_reduce_scattered():
    """Red if `gathered` left the gradient to autodiff of a gather in an automatic step, where one
    reduction over all fsdp devices is an all-reduce."""
    mesh = sharding.make_mesh(MeshConfig(fsdp_outer=2, fsdp=4))
    with jax.set_mesh(mesh):
        model = random_state(MODEL, optimizer(OPTIMIZER), mesh, seed=0).model
        rows = Batch(*(sharding.place(x, 0, 8, mesh) for x in batch()))
        text = jax.jit(explicit_gradients, static_argnums=2).lower(model, rows, LOSS).as_text()
    gathered = [w for name, w in param.flatten(model).items() if "norm" not in name]
    # The layers' weights appear once, in the scan's body; two axes for each weight.
    assert text.count("stablehlo.reduce_scatter") == 2 * len(gathered)


def gradients_on(mesh_config: MeshConfig, form: str):
    """Loss sums, {name: gradient} and the program's text; the weights are the same on every mesh.
    The second of two documents lies on both halves of its row."""
    lengths = np.array([7, 14, 3])
    places = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    segments = np.repeat(np.array([1, 2, 0], np.int32), lengths)
    rows = (np.broadcast_to(x, batch().positions.shape) for x in (places, segments))
    one = batch()._replace(**dict(zip(("positions", "segment_ids"), rows)))
    mesh = sharding.make_mesh(mesh_config, jax.devices()[: mesh_config.sequence])
    config = dataclasses.replace(MODEL, sequence_attention=form)
    placed = Batch(*(sharding.place(x, 0, 8, mesh) for x in one))
    with jax.set_mesh(mesh):
        model = random_state(config, optimizer(OPTIMIZER), mesh, seed=0).model
        lowered = jax.jit(gradients, static_argnums=2).lower(model, placed, LOSS)
        sums, grads = lowered.compile()(model, placed)
    return sums, param.flatten(grads), lowered.as_text()


@pytest.fixture(scope="module")
def gradients_on_one_device():
    return gradients_on(MeshConfig(fsdp=1), "gather")


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_a_row_on_two_devices_has_the_gradients_of_one(gradients_on_one_device, form):
    """Red if the ring's dk and dv did not go home, if either form attended to its own half only, or
    if ModelConfig.sequence_attention did not reach the attention."""
    sums, grads, text = gradients_on(MeshConfig(fsdp=1, sequence=2), form)
    assert ("collective_permute" in text) == (form == "ring")
    whole_sums, whole, _ = gradients_on_one_device
    np.testing.assert_allclose(sums, whole_sums, rtol=1e-6)
    for name, gradient in whole.items():
        # float32 sums in another order
        np.testing.assert_allclose(grads[name], gradient, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulation_is_the_full_batch_gradient(micro_batches):
    """Red if gradients were averaged over micro-batches instead of divided once by all tokens."""
    model = Decoder(MODEL, jax.random.key(0))
    whole_sums, whole = jax.jit(gradients, static_argnums=2)(model, batch(), LOSS)
    split = Batch(*(x.reshape(micro_batches, 8 // micro_batches, -1) for x in batch()))
    sums, parts = jax.jit(gradients, static_argnums=2)(model, split, LOSS)
    np.testing.assert_allclose(sums, whole_sums, rtol=1e-6)
    for name, gradient in param.flatten(whole).items():
        # float32 sums in another order
        np.testing.assert_allclose(
            param.flatten(parts)[name], gradient, rtol=1e-4, atol=1e-4, err_msg=name
        )


def test_padding_rows_change_nothing():
    """Red if the loss divided by the number of tokens instead of their weights."""
    model = Decoder(MODEL, jax.random.key(0))
    padded = Batch(*(np.concatenate([x, np.zeros_like(x)], axis=1) for x in batch()))
    (nll, z, tokens), _ = jax.jit(gradients, static_argnums=2)(model, batch(), LOSS)
    (padded_nll, padded_z, padded_tokens), _ = jax.jit(gradients, static_argnums=2)(
        model, padded, LOSS
    )
    assert tokens == padded_tokens
    np.testing.assert_allclose([padded_nll, padded_z], [nll, z], rtol=1e-6)


def run_steps(config: OptimizerConfig, batches):
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    transform = optimizer(config)
    step = jax.jit(make_step(transform, schedule(config, 100), config, LOSS))
    state = random_state(MODEL, transform, mesh, seed=0)
    history = []
    for one in batches:
        state, metrics = step(state, one)
        history.append((state, metrics))
    return history


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(bad):
    """Red if the update were applied when `apply` is False, or NaN leaked through jnp.where."""
    weights = batch().weights
    poisoned = batch()._replace(weights=np.where(weights > 0, bad, 0).astype(np.float32))
    (before, _), (after, metrics), (recovered, last) = run_steps(
        OPTIMIZER, [batch(), poisoned, batch()]
    )
    assert (int(metrics.skipped), int(metrics.skipped_in_a_row)) == (1, 1)
    assert int(after.step) == int(before.step) + 1
    kept = jax.tree.map(
        np.array_equal, (before.model, before.opt_state), (after.model, after.opt_state)
    )
    assert all(jax.tree.leaves(kept))
    assert (int(last.skipped), int(last.skipped_in_a_row)) == (0, 0)
    assert np.isfinite(float(last.loss)) and not np.array_equal(
        recovered.model.norm[...], after.model.norm[...]
    )


def test_a_spike_is_skipped_and_reported():
    """Red if the spike test compared with the norm before, or ran before WARM_STEPS."""
    config = dataclasses.replace(OPTIMIZER, spike_factor=1.5, peak_learning_rate=1e-6)
    # Concentrating all weight on one token raises the norm of the mean gradient severalfold.
    one = np.zeros_like(batch().weights)
    one[0, 0, 0] = 1.0
    spike = batch()._replace(weights=one)
    early, late = [batch(), spike], [batch()] * (WARM_STEPS - 2)
    history = run_steps(config, [*early, *late, spike, batch()])
    norms = [float(metrics.grad_norm) for _, metrics in history]
    assert norms[1] > 2 * norms[0]  # a spike indeed, but too early to be judged
    skipped = [int(metrics.skipped) for _, metrics in history]
    assert skipped == [0] * WARM_STEPS + [2, 0]


def test_schedules():
    """Red if warm-up started at zero, decay ended off its fraction, or wsd decayed early."""

    def rates(**changes):
        config = OptimizerConfig(peak_learning_rate=1.0, warmup_steps=10, **changes)
        rate = schedule(config, 110)
        return np.array([float(rate(jnp.asarray(step))) for step in range(111)])

    cosine = rates(schedule="cosine", end_fraction=0.1)
    np.testing.assert_allclose(cosine[:11], [*np.arange(1, 11) / 10, 1.0], rtol=1e-6)
    np.testing.assert_allclose(cosine[60], 0.1 + 0.9 * 0.5, rtol=1e-5)  # half of the cosine
    np.testing.assert_allclose(cosine[110], 0.1, rtol=1e-5)
    linear = rates(schedule="linear", end_fraction=0.0)
    np.testing.assert_allclose(linear[[10, 60, 110]], [1.0, 0.5, 0.0], atol=1e-6)
    wsd = rates(schedule="wsd", decay_steps=20, end_fraction=0.0)
    np.testing.assert_allclose(wsd[[10, 90, 100, 110]], [1.0, 1.0, 0.5, 0.0], atol=1e-6)
    assert (rates(schedule="constant")[10:] == 1.0).all()


def test_decay_touches_matrices_only():
    """Red if the mask counted head_dim as an axis of its own: query biases would decay."""
    config = dataclasses.replace(MODEL, attention_bias=True, mlp_bias=True)
    mask = param.flatten(decay_mask(Decoder(config, jax.random.key(0))))
    decayed = {name for name, yes in mask.items() if yes}
    matrices = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
    assert decayed == {"table", "head", *(f"layers/{name}" for name in matrices)}


def test_adamw_is_torchs():
    """Red if eps, decay or bias correction differ from torch.optim.AdamW."""
    torch = pytest.importorskip("torch", reason="the reference optimizer")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3)).astype(np.float32)
    grads = rng.normal(size=(5, 4, 3)).astype(np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    config = OptimizerConfig(peak_learning_rate=0.01, clip_norm=0.0, weight_decay=0.0)
    transform = optax.chain(optimizer(config), optax.add_decayed_weights(0.1))
    ours, state = jnp.asarray(start), None
    state = transform.init(ours)
    for gradient in grads:
        weight.grad = torch.tensor(gradient)
        reference.step()
        updates, state = transform.update(jnp.asarray(gradient), state, ours)
        ours = ours - 0.01 * updates
    np.testing.assert_allclose(ours, weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_adafactor_keeps_layers_apart():
    """Red if per_layer() ran the transform on the stacked weights."""
    config = OptimizerConfig(peak_learning_rate=1e-2, name="adafactor", weight_decay=0.0)
    model = Decoder(MODEL, jax.random.key(0))
    transform = optimizer(config)
    state = transform.init(model)
    quiet = jax.tree.map(jnp.ones_like, model)
    loud = jax.tree.map(lambda w: w, quiet)
    loud.layers.w_up = loud.layers.w_up.replace(loud.layers.w_up[...].at[1].multiply(100.0))
    updates = [transform.update(grads, state, model)[0] for grads in (quiet, loud)]
    first, second = (u.layers.w_up[...][0] for u in updates)
    clip = optax.global_norm(quiet) / optax.global_norm(loud)
    # Adafactor is invariant to the scale of a matrix's gradient; clipping scales all alike.
    assert clip < 0.5
    np.testing.assert_allclose(first, second, rtol=1e-3)
