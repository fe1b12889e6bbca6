"""Experts on rows sorted by expert, in blocks of rows, for CPUs: XLA's ragged product computes all experts on all rows.

An expert's rows are taken in blocks, what is left of them in blocks of a quarter of the size. The last one may run into
the next expert's rows, which that expert overwrites in turn, or past the end, so the rows are padded.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from maxsep.model.activation import activate, weighted
from maxsep.parallel import collectives

MOST_ROWS = 128  # of a block


def block_rows(rows: int, experts: int) -> int:
    """Rows of a block: the power of two next to the mean rows of an expert and one.

    On 2 quiet cores the fastest or nearly so, from 2 to 512 rows for 16 experts (docs/benchmarks.md, "Decoding").
    """
    return min(MOST_ROWS, 2 ** round(math.log2(1 + rows / experts)))


def _sizes(block: int) -> tuple[int, ...]:
    return (block, block // 4) if block >= 4 else (block,)


def used_experts(block: int, activation: str, x_rd, rows_e, inputs, w_out, layer: int) -> jax.Array:
    """Those with rows, one after the other, in blocks of `block` rows: [R, D] -> [R, D].

    The weights are those of all layers, [l, E, ...].
    """
    sizes = _sizes(block)
    starts_e, used_e = jnp.cumsum(rows_e) - rows_e, jnp.nonzero(rows_e, size=rows_e.size)[0]
    x = _pad(x_rd, sizes)

    def expert(number, y):
        e = used_e[number]

        def of_expert(w):
            # One slice: of two, XLA would copy all experts of the layer for the first.
            start = (jnp.asarray(i, e.dtype) for i in (layer, e, 0, 0))
            return lax.dynamic_slice(w, tuple(start), (1, 1, *w.shape[2:]))[0, 0]

        w_in, w_o = tuple(map(of_expert, inputs)), of_expert(w_out)

        def of_block(size, at, y):
            row = _rows(x, at, size)
            return _put(y, activate(activation, *(row @ w for w in w_in)) @ w_o, at)

        return _in_blocks(sizes, of_block, starts_e[e], rows_e[e], y)

    return lax.fori_loop(0, jnp.count_nonzero(rows_e), expert, jnp.zeros_like(x))[: x_rd.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_experts(activation: str, x_rd, share_r, rows_e, inputs, w_out) -> jax.Array:
    """One expert after the other: [R, D] -> [R, D], each row times its share; the gradient is in the same blocks."""
    return _fwd(activation, x_rd, share_r, rows_e, inputs, w_out)[0]


def _fwd(activation, x_rd, share_r, rows_e, inputs, w_out):
    sizes = _sizes(block_rows(x_rd.shape[0], rows_e.size))
    x, share = _pad(x_rd, sizes), _pad(share_r[:, None], sizes)
    hidden = tuple(collectives.vary(jnp.zeros((x.shape[0], w.shape[-1]), x.dtype)) for w in inputs)

    def expert(carry, of_expert):
        start, rows, w_in, w_o = of_expert

        def of_block(size, at, carry):
            y, hidden = carry
            row = _rows(x, at, size)
            h = tuple(row @ w for w in w_in)
            out = weighted(activate(activation, *h), _rows(share, at, size)) @ w_o
            return _put(y, out, at), tuple(_put(kept, new, at) for kept, new in zip(hidden, h, strict=True))

        return _in_blocks(sizes, of_block, start, rows, carry), None

    experts = jnp.cumsum(rows_e) - rows_e, rows_e, inputs, w_out
    (y, hidden), _ = lax.scan(expert, (jnp.zeros_like(x), hidden), experts)
    return y[: x_rd.shape[0]], (x_rd, share_r, rows_e, inputs, w_out, hidden)


def _bwd(activation, residuals, g_rd):
    x_rd, share_r, rows_e, inputs, w_out, hidden = residuals
    sizes = _sizes(block_rows(x_rd.shape[0], rows_e.size))
    x, g, share = (_pad(of_rows, sizes) for of_rows in (x_rd, g_rd, share_r[:, None]))

    def expert(carry, of_expert):
        start, rows, w_in, w_o = of_expert

        def of_block(size, at, carry):
            dx, dshare, dw_in, dw_o = carry
            own = (at - start + jnp.arange(size) < rows)[:, None]  # the next expert's rows are not this one's gradient
            row, g_row = _rows(x, at, size), jnp.where(own, _rows(g, at, size), 0)
            h_weighted, pull = jax.vjp(
                lambda share, *h: weighted(activate(activation, *h), share),
                *(_rows(of_rows, at, size) for of_rows in (share, *hidden)),
            )
            ds, *dh = pull(g_row @ w_o.T)
            dw_in = tuple(dw + row.T @ d for dw, d in zip(dw_in, dh, strict=True))
            dx = _put(dx, sum(d @ w.T for d, w in zip(dh, w_in, strict=True)), at)
            return dx, _put(dshare, ds, at), dw_in, dw_o + h_weighted.T @ g_row

        zeros = jax.tree.map(jnp.zeros_like, (w_in, w_o))
        *carry, dw_in, dw_o = _in_blocks(sizes, of_block, start, rows, (*carry, *zeros))
        return tuple(carry), (dw_in, dw_o)

    experts = jnp.cumsum(rows_e) - rows_e, rows_e, inputs, w_out
    (dx, dshare), (dw_in, dw_out) = lax.scan(expert, (jnp.zeros_like(x), jnp.zeros_like(share)), experts)
    # Rows after the last expert's are padding, whose gradient is nothing.
    used = jnp.arange(x_rd.shape[0])[:, None] < jnp.sum(rows_e)
    dx, dshare = (jnp.where(used, d[: x_rd.shape[0]], 0) for d in (dx, dshare))
    return dx, dshare[:, 0], None, dw_in, dw_out


blocked_experts.defvjp(_fwd, _bwd)


def _in_blocks(sizes: tuple[int, ...], of_block: Callable, start: jax.Array, rows: jax.Array, carry):
    """`carry` after `of_block(size, at, carry)` of each block of the `rows` rows from `start` on."""
    for size in sizes:
        count = (rows + size - 1) // size if size == sizes[-1] else rows // size
        carry = lax.fori_loop(0, count, functools.partial(_block, of_block, size, start), carry)
        start, rows = start + count * size, rows - count * size
    return carry


def _block(of_block: Callable, size: int, start: jax.Array, number: jax.Array, carry):
    return of_block(size, start + number * size, carry)


def _pad(x_rd: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """With room for the last block, and for one of the largest where there are fewer rows."""
    return jnp.pad(x_rd, ((0, max(sizes[-1], sizes[0] - x_rd.shape[0])), (0, 0)))


def _rows(x_rd: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x_rd, start, size)


def _put(x_rd: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x_rd, rows, start, axis=0)
