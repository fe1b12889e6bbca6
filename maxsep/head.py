"""The output head and its loss, fused: no copy of the logits outlives a block of positions."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from maxsep import collectives
from maxsep.collectives import Axes

BLOCK_LOGITS = 8 * 2**20  # logits that one device holds at a time, about


def cross_entropy(x_bsd: jax.Array, table_vd: jax.Array, targets_bs: jax.Array, vocab_size: int, axes: Axes):
    """This device's share of the summed next-token cross-entropy (nats, float32 or wider).

    `x_bsd` [b, S, D] are whole sequences, the same on every device along `axes`, over which the rows of `table_vd` are
    split; each of those devices returns an equal share of the sum. Targets of -1 count nothing. Rows from `vocab_size`
    on are padding: they have no probability.
    """
    return _loss(vocab_size, axes, x_bsd, table_vd, targets_bs)


def logits(x_bsd: jax.Array, table_vd: jax.Array, vocab_size: int, axes: Axes) -> jax.Array:
    """Logits of this device's rows, float32 or wider; minus infinity for padded ids."""
    wide = jnp.promote_types(x_bsd.dtype, jnp.float32)
    scores = jnp.einsum("bsd,vd->bsv", x_bsd, table_vd, preferred_element_type=wide)
    return jnp.where(_ids(table_vd, axes) < vocab_size, scores, -jnp.inf)


def _ids(table_vd: jax.Array, axes: Axes) -> jax.Array:
    return collectives.index(axes) * table_vd.shape[0] + jnp.arange(table_vd.shape[0])


def _blocks(x_bsd: jax.Array, rows: int) -> list[slice]:
    b, s, _ = x_bsd.shape
    length = max(1, BLOCK_LOGITS // (b * rows))
    count = -(-s // length)
    edges = [s * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def _softmax_parts(vocab_size, axes, x_bsd, table_vd, targets_bs):
    """exp(logits - lse) and the lse of one block, and which entry is the target."""
    scores = logits(x_bsd, table_vd, vocab_size, axes)
    top = lax.stop_gradient(collectives.largest(jnp.max(scores, axis=-1, keepdims=True), axes))
    exp = jnp.exp(scores - top)
    norm = collectives.total(jnp.sum(exp, axis=-1, keepdims=True), axes)
    is_target = _ids(table_vd, axes) == targets_bs[..., None]
    target = collectives.total(jnp.sum(jnp.where(is_target, scores, 0), axis=-1), axes)
    nll = jnp.where(targets_bs >= 0, (jnp.log(norm) + top)[..., 0] - target, 0)
    return nll, exp / norm, is_target


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(vocab_size, axes, x_bsd, table_vd, targets_bs):
    table = table_vd.astype(x_bsd.dtype)
    parts = (
        jnp.sum(_softmax_parts(vocab_size, axes, x_bsd[:, at], table, targets_bs[:, at])[0])
        for at in _blocks(x_bsd, table.shape[0])
    )
    return collectives.vary(sum(parts) / collectives.size(axes))


def _loss_fwd(vocab_size, axes, x_bsd, table_vd, targets_bs):
    """The gradient is made with the loss, block by block: nothing is computed twice, and no logits are kept."""
    table = table_vd.astype(x_bsd.dtype)
    loss, dxs, dtable = 0.0, [], jnp.zeros_like(table_vd)
    for at in _blocks(x_bsd, table.shape[0]):
        x, targets = x_bsd[:, at], targets_bs[:, at]
        nll, p, is_target = _softmax_parts(vocab_size, axes, x, table, targets)
        d = jnp.where((targets >= 0)[..., None], p - is_target, 0).astype(x.dtype)
        dxs.append(jnp.einsum("bsv,vd->bsd", d, table))
        dtable += jnp.einsum("bsv,bsd->vd", d, x, preferred_element_type=dtable.dtype)
        loss += jnp.sum(nll)
    return collectives.vary(loss / collectives.size(axes)), (jnp.concatenate(dxs, axis=1), dtable)


def _loss_bwd(vocab_size, axes, residuals, g):
    dx, dtable = residuals
    return (g * dx).astype(dx.dtype), g * dtable, None


_loss.defvjp(_loss_fwd, _loss_bwd)
