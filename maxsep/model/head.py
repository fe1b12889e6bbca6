"""The output head and its loss, fused: no copy of the logits outlives a block of positions."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from maxsep.parallel import collectives
from maxsep.parallel.collectives import Axes

# Logits that one device holds at a time, about. Each block reads and writes the table's gradient: few, large ones; but
# on a CPU those whose logits (16 MB of float32) stay in a cache, of at least so many tokens.
BLOCK_LOGITS = 32 * 2**20
CPU_LOGITS, CPU_TOKENS = 4 * 2**20, 256


def block_of(rows: int, platform: str) -> int:
    """Tokens of a block, a power of two, on a device with `rows` rows of the table."""
    if platform == "cpu":
        return 2 ** int(math.log2(max(CPU_TOKENS, CPU_LOGITS // rows)))
    return 2 ** int(math.log2(max(1, BLOCK_LOGITS // rows)))


def cross_entropy(x_td: jax.Array, table_vd: jax.Array, targets_t: jax.Array, ids: int, axes: Axes, block: int):
    """This device's share of the summed next-token cross-entropy (nats, float32 or wider), `block` tokens at a time.

    `x_td` [T, D] are the same tokens on every device along `axes`, over which the rows of `table_vd` are split; each of
    those devices returns an equal share of the sum. Targets of -1 count nothing. Rows from `ids` on have no
    probability: padding, or ids that the tokenizer does not have.
    """
    return _loss(ids, axes, block, x_td, table_vd, targets_t)


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


def log_probabilities(
    x_td: jax.Array, table_vd: jax.Array, targets_t: jax.Array, ids: int, axes: Axes, block: int
) -> jax.Array:
    """Log-probability [T] of each target (nats, float32 or wider), the same on every device along `axes`; 0 for -1.

    The arguments are those of `cross_entropy`. Not to be differentiated.
    """
    table = table_vd.astype(x_td.dtype)
    found = lax.map(lambda at: _block(ids, axes, at[0], table, at[1])[0], _blocks(x_td, targets_t, block))
    return -found.ravel()[: x_td.shape[0]]


def _first_id(rows: int, axes: Axes) -> jax.Array | int:
    return collectives.index(axes) * rows


def _blocks(x_td: jax.Array, targets_t: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Tokens [n, t, D] and targets [n, t] in blocks, the last filled up with what counts nothing."""
    tokens, width = x_td.shape
    size = min(tokens, block)
    more = -tokens % size
    x_td, targets_t = jnp.pad(x_td, ((0, more), (0, 0))), jnp.pad(targets_t, (0, more), constant_values=-1)
    return x_td.reshape(-1, size, width), targets_t.reshape(-1, size)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(ids, axes, block, x_td, table_vd, targets_t):
    table = table_vd.astype(x_td.dtype)
    blocks = _blocks(x_td, targets_t, block)
    parts = lax.map(lambda at: jnp.sum(_block(ids, axes, at[0], table, at[1])[0]), blocks)
    return collectives.vary(jnp.sum(parts) / collectives.size(axes))


def _loss_fwd(ids, axes, block, x_td, table_vd, targets_t):
    """The gradient is made with the loss, block by block: nothing is computed twice, and no logits are kept.

    In a loop, in which the table's gradient is added up in place: unrolled, XLA keeps that of each block.
    """
    table = table_vd.astype(x_td.dtype)

    def one(x_td, targets_t):
        nll_t, d = _block(ids, axes, x_td, table, targets_t)
        d = d.astype(x_td.dtype)
        dtable = jnp.einsum("tv,td->vd", d, x_td, preferred_element_type=table_vd.dtype)
        return (jnp.sum(nll_t), dtable), jnp.einsum("tv,vd->td", d, table)

    def add(sums, at):
        more, dx_td = one(*at)
        return jax.tree.map(jnp.add, sums, more), dx_td

    blocks = _blocks(x_td, targets_t, block)
    nothing = collectives.zeros(jax.eval_shape(one, *(part[0] for part in blocks))[0])
    (loss, dtable), dx = lax.scan(add, nothing, blocks)
    dx_td = dx.reshape(-1, x_td.shape[1])[: x_td.shape[0]]
    return collectives.vary(loss / collectives.size(axes)), (dx_td, dtable)


def _loss_bwd(ids, axes, block, residuals, g):
    dx, dtable = residuals
    return (g * dx).astype(dx.dtype), g * dtable, None


_loss.defvjp(_loss_fwd, _loss_bwd)
