"""The output head and its loss, fused: no copy of the logits outlives a block of positions."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from maxsep.parallel import collectives
from maxsep.parallel.collectives import Axes

# Logits that one device holds at a time, about; more where that would make too many blocks, each of which is compiled.
BLOCK_LOGITS, MOST_BLOCKS = 8 * 2**20, 16


def cross_entropy(x_td: jax.Array, table_vd: jax.Array, targets_t: jax.Array, ids: int, axes: Axes):
    """This device's share of the summed next-token cross-entropy (nats, float32 or wider).

    `x_td` [T, D] are the same tokens on every device along `axes`, over which the rows of `table_vd` are split; each of
    those devices returns an equal share of the sum. Targets of -1 count nothing. Rows from `ids` on have no
    probability: padding, or ids that the tokenizer does not have.
    """
    return _loss(ids, axes, x_td, table_vd, targets_t)


def logits(x_td: jax.Array, table_vd: jax.Array, ids: int, axes: Axes) -> jax.Array:
    """Logits [T, v] of this device's rows, float32 or wider; minus infinity from `ids` on."""
    wide = jnp.promote_types(x_td.dtype, jnp.float32)
    scores = jnp.einsum("td,vd->tv", x_td, table_vd, preferred_element_type=wide)
    rows = table_vd.shape[0]
    if rows * collectives.size(axes) == ids:  # a pass over the logits saved
        return scores
    return jnp.where(_first_id(rows, axes) + jnp.arange(rows) < ids, scores, -jnp.inf)


def summed(nll: Callable, weights, x_absd: jax.Array, targets_abs: jax.Array) -> jax.Array:
    """Sum over micro-batches of `nll`, a device's share of a loss: of `weights` (a tree), [b, s, D] and [b, S].

    The gradient is made with the loss, one micro-batch after the other: `nll` is not computed again, and what it keeps
    for its own gradient lives as long as one of them. It takes the sum's own gradient to be the same on every device.
    """
    if x_absd.shape[0] == 1:
        return nll(weights, x_absd[0], targets_abs[0])
    return _summed(nll, weights, x_absd, targets_abs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(nll, weights, x_absd, targets_abs):
    one = functools.partial(nll, weights)
    nothing = collectives.zeros(jax.eval_shape(one, x_absd[0], targets_abs[0]))
    return lax.scan(lambda loss, at: (loss + one(*at), None), nothing, (x_absd, targets_abs))[0]


def _summed_fwd(nll, weights, x_absd, targets_abs):
    def one(x_bsd, targets_bs):
        loss, (dweights, dx_bsd) = jax.value_and_grad(nll, (0, 1))(weights, x_bsd, targets_bs)
        return (loss, dweights), dx_bsd

    def add(sums, at):
        more, dx_bsd = one(*at)
        return jax.tree.map(jnp.add, sums, more), dx_bsd

    nothing = collectives.zeros(jax.eval_shape(one, x_absd[0], targets_abs[0])[0])
    (loss, dweights), dx_absd = lax.scan(add, nothing, (x_absd, targets_abs))
    return loss, (dweights, dx_absd)


def _summed_bwd(nll, gradients, g):
    return *jax.tree.map(lambda d: (g * d).astype(d.dtype), gradients), None


_summed.defvjp(_summed_fwd, _summed_bwd)


def log_probabilities(x_td: jax.Array, table_vd: jax.Array, targets_t: jax.Array, ids: int, axes: Axes) -> jax.Array:
    """Log-probability [T] of each target (nats, float32 or wider), the same on every device along `axes`; 0 for -1.

    The arguments are those of `cross_entropy`. Not to be differentiated.
    """
    table = table_vd.astype(x_td.dtype)
    blocks = (_block(ids, axes, x_td[at], table, targets_t[at])[0] for at in _blocks(x_td, table.shape[0]))
    return -jnp.concatenate(list(blocks))


def _first_id(rows: int, axes: Axes) -> jax.Array | int:
    return collectives.index(axes) * rows


def _blocks(x_td: jax.Array, rows: int) -> list[slice]:
    tokens = x_td.shape[0]
    count = min(tokens, MOST_BLOCKS, -(-tokens * rows // BLOCK_LOGITS))
    edges = [tokens * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _block(ids, axes, x_td, table_vd, targets_t):
    """Loss [T] of one block of tokens, and the gradient of its sum by the logits [T, v]."""
    scores = logits(x_td, table_vd, ids, axes)
    top = collectives.largest(jnp.max(scores, axis=-1, keepdims=True), axes)
    exp = jnp.exp(scores - top)
    norm = collectives.total(jnp.sum(exp, axis=-1, keepdims=True), axes)

    rows, counted = table_vd.shape[0], (targets_t >= 0)[:, None]
    local = targets_t[:, None] - _first_id(rows, axes)
    score = jnp.take_along_axis(scores, jnp.clip(local, 0, rows - 1), axis=-1)
    score = collectives.total(jnp.where((local >= 0) & (local < rows), score, 0), axes)
    loss_t = jnp.where(counted, jnp.log(norm) + top - score, 0)[:, 0]
    # A target of -1 is no id, so nothing is subtracted from its row of zeros. On another device it might look like one.
    is_target = jnp.where(counted, local, -1) == jnp.arange(rows)
    return loss_t, exp * jnp.where(counted, 1 / norm, 0) - is_target


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(ids, axes, x_td, table_vd, targets_t):
    table = table_vd.astype(x_td.dtype)
    parts = (_block(ids, axes, x_td[at], table, targets_t[at])[0] for at in _blocks(x_td, table.shape[0]))
    return collectives.vary(sum(map(jnp.sum, parts)) / collectives.size(axes))


def _loss_fwd(ids, axes, x_td, table_vd, targets_t):
    """The gradient is made with the loss, block by block: nothing is computed twice, and no logits are kept."""
    table = table_vd.astype(x_td.dtype)
    loss, dxs, dtable = 0.0, [], jnp.zeros_like(table_vd)
    for at in _blocks(x_td, table.shape[0]):
        x = x_td[at]
        nll_t, d = _block(ids, axes, x, table, targets_t[at])
        d = d.astype(x.dtype)
        dxs.append(jnp.einsum("tv,vd->td", d, table))
        dtable += jnp.einsum("tv,td->vd", d, x, preferred_element_type=dtable.dtype)
        loss += jnp.sum(nll_t)
    return collectives.vary(loss / collectives.size(axes)), (jnp.concatenate(dxs), dtable)


def _loss_bwd(ids, axes, residuals, g):
    dx, dtable = residuals
    return (g * dx).astype(dx.dtype), g * dtable, None


_loss.defvjp(_loss_fwd, _loss_bwd)
