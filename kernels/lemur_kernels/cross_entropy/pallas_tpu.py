"""Cross-entropy on TPU: the f32 logits of a tile live in VMEM only.

Values: one kernel multiplies a tile of tokens by a tile of the vocabulary and keeps, for each
token, the running maximum, the running sum of exp and the logit of the target. One product.

Gradients (computed in the forward pass, see forward_gradient.py): the same kernel also writes
exp(logit - running maximum) in x's dtype, a second one turns that buffer in place into the
logits' gradient once log Z is known, and XLA multiplies it by w and by x: three products, as
many as if logits were kept, where recomputing them costs four. README.md has the count.

Axis key: B batch, T length, E embed, V vocab, N tokens of a chunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lemur_kernels.cross_entropy import shards
from lemur_kernels.cross_entropy.blocks import Blocks, choose
from lemur_kernels.cross_entropy.forward_gradient import Chunk, Setting
from lemur_kernels.differentiation import no_derivative
from lemur_kernels.needs_tpu import needs_tpu
from lemur_kernels.x64 import without_x64

MASKED = -3e38  # logit of a column that does not exist; exp(MASKED - FLOOR) == 0
FLOOR = -1e37  # where the running maximum starts
LANES = 128


def _tile_kernel(limit_ref, target_ref, x_ref, w_ref, *refs, keep: bool, steps: int, strip: int):
    """One (tokens, vocabulary, embed) step of the projection; see `project`."""
    if keep:
        p_ref, reference_ref, *refs = refs
    log_z_ref, target_logit_ref, acc_ref, top_ref, total_ref, hit_ref = refs
    v, k = pl.program_id(1), pl.program_id(2)
    tokens, columns = acc_ref.shape

    # The scopes name the regions of the schedule that tools/tpu_compiler reads.
    @pl.when((v == 0) & (k == 0))
    @jax.named_scope("start")
    def _():
        top_ref[...] = jnp.full(top_ref.shape, FLOOR, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        hit_ref[...] = jnp.zeros(hit_ref.shape, jnp.float32)

    @pl.when(k == 0)
    @jax.named_scope("clear")
    def _():
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    # In no branch: the additions are scheduled under the product.
    acc_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)

    @jax.named_scope("strip")
    def finish(i, _):
        rows = pl.ds(pl.multiple_of(i * strip, strip), strip)
        column = lax.broadcasted_iota(jnp.int32, (strip, columns), 1) + v * columns
        logits = jnp.where(column < limit_ref[0], acc_ref[rows, :], MASKED)
        old = top_ref[rows, :]
        top = jnp.maximum(old, logits.max(1, keepdims=True))
        p = jnp.exp(logits - top)
        hit = jnp.where(column == target_ref[rows, :], logits, 0.0)
        top_ref[rows, :] = top
        total_ref[rows, :] = total_ref[rows, :] * jnp.exp(old - top) + _by_lane(p)
        hit_ref[rows, :] += _by_lane(hit)
        if keep:
            p_ref[rows, :] = p.astype(p_ref.dtype)
            lane = lax.broadcasted_iota(jnp.int32, (strip, LANES), 1)
            group = pl.ds(pl.multiple_of(lax.div(v, LANES) * LANES, LANES), LANES)
            reference_ref[rows, group] = jnp.where(
                lane == lax.rem(v, LANES), top, reference_ref[rows, group]
            )
        return ()

    @pl.when(k == steps - 1)
    def _():
        lax.fori_loop(0, tokens // strip, finish, ())

    @pl.when((v == pl.num_programs(1) - 1) & (k == steps - 1))
    @jax.named_scope("close")
    def _():
        total = total_ref[...].sum(1, keepdims=True)
        log_z_ref[...] = top_ref[...] + jnp.log(total)
        target_logit_ref[...] = hit_ref[...].sum(1, keepdims=True)


def _by_lane(x):
    """[R, n * 128] -> [R, 128]: sums without crossing lanes, which the vector unit does."""
    return functools.reduce(jnp.add, (x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)))


@without_x64
def project(x_NE, w_EV, target_N, limit, blocks: Blocks, *, keep: bool, interpret=False):
    """(log Z, target's logit) of each token [N,1], and with `keep` what the gradient needs.

    Args:
      target_N: column of w of each token's target; -1 where w has no such column.
      limit: int32 scalar; columns from here on have probability 0.
      keep: also return p [N,V] = exp(logit - reference) in x's dtype, and the references
        [N, tiles]: each token's running maximum when a tile of the vocabulary was done.
    """
    (N, E), V = x_NE.shape, w_EV.shape[1]
    tokens, columns, depth = blocks.tokens, blocks.columns, blocks.depth
    tiles = pl.cdiv(V, columns)
    lanes = pl.cdiv(tiles, LANES) * LANES
    grid = (pl.cdiv(N, tokens), tiles, E // depth)
    column = pl.BlockSpec((tokens, 1), lambda t, v, k, _: (t, 0))
    outs = [jax.ShapeDtypeStruct((N, 1), jnp.float32)] * 2
    out_specs = [column, column]
    if keep:
        outs = [
            jax.ShapeDtypeStruct((N, V), x_NE.dtype),
            jax.ShapeDtypeStruct((N, lanes), jnp.float32),
            *outs,
        ]
        out_specs = [
            pl.BlockSpec((tokens, columns), lambda t, v, k, _: (t, v)),
            pl.BlockSpec((tokens, lanes), lambda t, v, k, _: (t, 0)),
            *out_specs,
        ]
    out = pl.pallas_call(
        functools.partial(_tile_kernel, keep=keep, steps=grid[2], strip=min(blocks.strip, tokens)),
        out_shape=outs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                column,
                pl.BlockSpec((tokens, depth), lambda t, v, k, _: (t, k)),
                pl.BlockSpec((depth, columns), lambda t, v, k, _: (k, v)),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((tokens, columns), jnp.float32),
                pltpu.VMEM((tokens, 1), jnp.float32),
                pltpu.VMEM((tokens, LANES), jnp.float32),
                pltpu.VMEM((tokens, LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_bytes,
        ),
        interpret=interpret,
        name="lemur_cross_entropy_project",
    )(jnp.asarray(limit, jnp.int32).reshape(1), target_N[:, None], x_NE, w_EV)
    return out


def _gradient_kernel(
    target_ref, log_z_ref, weight_ref, at_target_ref, top_ref, p_ref, out_ref, *, columns
):
    """p -> weight * softmax, and the target's own entry from its f32 value."""
    v = pl.program_id(1)
    lane = lax.broadcasted_iota(jnp.int32, top_ref.shape, 1)
    top = jnp.where(lane == lax.rem(v, LANES), top_ref[...], 0.0).sum(1, keepdims=True)
    scale = weight_ref[...] * jnp.exp(top - log_z_ref[...])
    column = lax.broadcasted_iota(jnp.int32, p_ref.shape, 1) + v * columns
    g = jnp.where(
        column == target_ref[...], at_target_ref[...], p_ref[...].astype(jnp.float32) * scale
    )
    out_ref[...] = g.astype(out_ref.dtype)


@without_x64
def logits_gradient(
    p_NV, reference_N, target_N, log_z_N, weight_N, at_target_N, blocks: Blocks, *, interpret=False
):
    """Turns `project`'s p in place into weight * softmax, with at_target at the target.

    Args:
      weight_N, at_target_N: f32, of each token.
    """
    N, V = p_NV.shape
    tokens, columns = blocks.gradient_tokens, blocks.columns
    column = pl.BlockSpec((tokens, 1), lambda t, v: (t, 0))
    tile = pl.BlockSpec((tokens, columns), lambda t, v: (t, v))
    return pl.pallas_call(
        functools.partial(_gradient_kernel, columns=columns),
        out_shape=jax.ShapeDtypeStruct((N, V), p_NV.dtype),
        grid=(pl.cdiv(N, tokens), pl.cdiv(V, columns)),
        in_specs=[
            *(column,) * 4,
            pl.BlockSpec((tokens, LANES), lambda t, v: (t, lax.div(v, LANES))),
            tile,
        ],
        out_specs=tile,
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_bytes
        ),
        interpret=interpret,
        name="lemur_cross_entropy_gradient",
    )(*(a[:, None] for a in (target_N, log_z_N, weight_N, at_target_N)), reference_N, p_NV)


@dataclasses.dataclass(frozen=True)
class PallasTpu:
    """An Implementation of forward_gradient for one kind of chip."""

    chip: str
    interpret: bool | pltpu.InterpretParams = False

    def values(self, chunk: Chunk, setting: Setting):
        _, out = self._project(chunk, setting, keep=False)
        shape = chunk.targets_BC.shape
        log_z_BC, target_BC = (x.reshape(shape) for x in out)
        log_z_BC, target_BC = shards.join(log_z_BC, target_BC, setting.axis_name)
        return log_z_BC, log_z_BC - target_BC

    def logits_gradient(self, chunk: Chunk, setting: Setting, token_weights):
        column_N, (p_NV, reference_N, *out) = self._project(chunk, setting, keep=True)
        shape = chunk.targets_BC.shape
        log_z_BC, target_BC = (x.reshape(shape) for x in out)
        log_z_BC, target_BC = shards.join(log_z_BC, target_BC, setting.axis_name)
        nll_BC = log_z_BC - target_BC
        of_p_BC, of_target_BC = token_weights(log_z_BC)
        at_target_BC = of_p_BC * jnp.exp(-nll_BC) - of_target_BC
        rows = (x.reshape(-1) for x in (log_z_BC, of_p_BC, at_target_BC))
        dlogits_NV = logits_gradient(
            p_NV, reference_N, column_N, *rows, self._blocks(chunk), interpret=self.interpret
        )
        return log_z_BC, nll_BC, dlogits_NV.reshape(*shape, -1)

    def _blocks(self, chunk: Chunk) -> Blocks:
        B, C, E = chunk.x_BCE.shape
        return choose(self.chip, B * C, E, chunk.w_EV.shape[1], chunk.x_BCE.dtype)

    def _project(self, chunk: Chunk, setting: Setting, keep: bool):
        x_BCE, w_EV = no_derivative(
            "cross_entropy implementation='pallas_tpu' is differentiable once, in reverse mode: "
            "its gradient was differentiated again; use implementation='reference' for that",
            chunk.x_BCE,
            chunk.w_EV,
        )
        if not self.interpret:
            x_BCE = needs_tpu(x_BCE, "cross_entropy", "chunked")
        E, V = w_EV.shape
        first, limit = shards.columns(V, setting.valid_vocab, setting.axis_name)
        column_N = shards.local_targets(chunk.targets_BC, first, V).reshape(-1)
        out = project(
            x_BCE.reshape(-1, E), w_EV, column_N, limit, self._blocks(chunk),
            keep=keep, interpret=self.interpret,
        )  # fmt: skip
        return column_N, out
