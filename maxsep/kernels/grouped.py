"""Products of rows that are sorted by group, each with its group's matrix, on NVIDIA GPUs: Pallas through Triton.

XLA makes `lax.ragged_dot` one dense product there, each row times every group's matrix. These kernels compute what the
rows cost: groups have any size, none is padded. Rows after the last group's are padding; their results and their
gradients are zeros.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from maxsep.kernels import HIGHEST, ROWS, WEIGHTS

UNIT = 16  # the smallest side of a tensor core's block: other sizes are padded to a multiple
SIDE_BY_SIDE = 8  # blocks of rows that run at the same time, so that the second-level cache serves both operands


class Blocks(NamedTuple):
    """What one program of a kernel computes: m × n results, from k products of each at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


OF_16_BITS = Blocks(128, 256, 32, warps=8, stages=4)
# Exact float32 has no tensor cores: larger blocks would only compile for longer (tens of seconds).
OF_32_BITS = Blocks(128, 128, 16, warps=8, stages=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot(x_rk: jax.Array, w_ekn: jax.Array, rows_e: jax.Array, interpret: bool = False) -> jax.Array:
    """[R, K] and [E, K, N] -> [R, N], of `kernels.DTYPES`, summed in float32; differentiable.

    Products of float32 are as exact as `jax_default_matmul_precision` says.

    Args:
        x_rk: rows sorted by group.
        w_ekn: a matrix for each group.
        rows_e: int32, the rows of each group.
        interpret: run the kernels' Python on any machine, outside of `jax.shard_map`.
    """
    return grouped_rows(x_rk, w_ekn, rows_e, interpret=interpret)


def _forward(x_rk, w_ekn, rows_e, interpret):
    return grouped_dot(x_rk, w_ekn, rows_e, interpret), (x_rk, w_ekn, rows_e)


def _backward(interpret, kept, g_rn):
    x_rk, w_ekn, rows_e = kept
    dx_rk = grouped_rows(g_rn, w_ekn, rows_e, transposed=True, interpret=interpret)
    return dx_rk, _grouped_weights(x_rk, g_rn, rows_e, interpret), None


grouped_dot.defvjp(_forward, _backward)


def grouped_rows(
    x_rk: jax.Array,
    w_ekn: jax.Array,
    rows_e: jax.Array,
    first: int = 0,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """As `grouped_dot`, without a gradient. The matrices are those from `first` on, `transposed` if that is set."""
    columns = w_ekn.shape[1 if transposed else 2]
    if any(size % UNIT for size in w_ekn.shape[1:]):  # padding copies: only of the matrices that are used
        w_ekn, first = _padded(w_ekn[first : first + rows_e.size]), 0
    x = _padded(x_rk)
    rows, depth = x.shape
    blocks = _blocks(x.dtype)
    width = w_ekn.shape[1 if transposed else 2]
    blocks = blocks._replace(n=_dividing(width, blocks.n), k=_dividing(depth, blocks.k))
    tiles = _tiles(rows_e, rows, blocks.m)
    number = tiles[0].size
    kernel = functools.partial(
        _rows_kernel, blocks=blocks, tiles=number, groups=rows_e.size, first=first, transposed=transposed
    )
    grid = (number * (width // blocks.n),)
    return _call(kernel, ROWS, (rows, width), grid, blocks, interpret, *tiles, x, w_ekn)[:, :columns]


def _grouped_weights(x_rk, g_rn, rows_e, interpret: bool) -> jax.Array:
    """The sum over each group's rows of x's times g's: [E, K, N]."""
    depth, columns = x_rk.shape[1], g_rn.shape[1]
    x, g = _padded(x_rk), _padded(g_rn)
    blocks = _blocks(x.dtype)
    blocks = blocks._replace(m=_dividing(x.shape[1], blocks.m), n=_dividing(g.shape[1], blocks.n))
    ends = jnp.cumsum(rows_e).astype(jnp.int32)
    shape = rows_e.size, x.shape[1], g.shape[1]
    grid = (x.shape[1] // blocks.m * (g.shape[1] // blocks.n), rows_e.size)
    kernel = functools.partial(_weights_kernel, blocks=blocks)
    starts = ends - rows_e.astype(jnp.int32)
    return _call(kernel, WEIGHTS, shape, grid, blocks, interpret, starts, ends, x, g)[:, :depth, :columns]


def _padded(x: jax.Array) -> jax.Array:
    """With zeros up to a multiple of UNIT in all dimensions but the first."""
    extra = [(0, 0), *((0, -size % UNIT) for size in x.shape[1:])]
    return jnp.pad(x, extra) if any(after for _, after in extra) else x


def _call(kernel, name: str, shape, grid, blocks: Blocks, interpret: bool, *operands):
    like = operands[-1]
    if like.dtype == jnp.float32 and jax.config.jax_default_matmul_precision == "highest":
        name += HIGHEST
    out = jax.ShapeDtypeStruct(shape, like.dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
    options = {} if interpret else {"compiler_params": triton.CompilerParams(blocks.warps, blocks.stages)}
    return pl.pallas_call(kernel, out_shape=out, grid=grid, interpret=interpret, name=name, **options)(*operands)


def _blocks(dtype) -> Blocks:
    return OF_16_BITS if dtype.itemsize == 2 else OF_32_BITS


def _dividing(size: int, most: int) -> int:
    """The largest of `most`, its half, its quarter and so on that divides `size`."""
    while size % most:
        most //= 2
    return most


def _tiles(rows_e: jax.Array, rows: int, height: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each tile of `height` rows its group, its first row, and the row at which its group ends.

    The padding is one group more. There are as many tiles as there can be; those too many have no rows.
    """
    rows_e = rows_e.astype(jnp.int32)
    sizes = jnp.append(rows_e, rows - jnp.sum(rows_e))
    ends, tiles = jnp.cumsum(sizes), (sizes + height - 1) // height
    last = jnp.cumsum(tiles)
    number = jnp.arange(pl.cdiv(rows, height) + rows_e.size, dtype=jnp.int32)
    group = jnp.sum(number[:, None] >= last, axis=1, dtype=jnp.int32)
    own = group[:, None] == jnp.arange(sizes.size)

    def of_group(values):
        return jnp.sum(jnp.where(own, values, 0), axis=1, dtype=jnp.int32)

    return group, of_group(ends - sizes) + (number - of_group(last - tiles)) * height, of_group(ends)


def _place(index, rows: int, columns: int):
    """Row and column of tile `index`: SIDE_BY_SIDE rows of tiles at a time, column by column."""
    first = lax.div(index, SIDE_BY_SIDE * columns) * SIDE_BY_SIDE
    height = jnp.minimum(rows - first, SIDE_BY_SIDE)
    within = lax.rem(index, SIDE_BY_SIDE * columns)
    return first + lax.rem(within, height), lax.div(within, height)


def _rows_kernel(group, start, end, x, w, y, *, blocks: Blocks, tiles: int, groups: int, first: int, transposed: bool):
    depth, columns = x.shape[1], y.shape[1]
    i, j = _place(pl.program_id(0), tiles, columns // blocks.n)
    own_group, top, stop = group[i], start[i], end[i]
    rows, column = pl.ds(top, blocks.m), pl.ds(j * blocks.n, blocks.n)
    own = (top + jnp.arange(blocks.m) < stop)[:, None]

    @pl.when(top < stop)
    def _():
        def step(k, sums):
            inner, matrix = pl.ds(k * blocks.k, blocks.k), own_group + first
            a = triton.load(x.at[rows, inner], mask=own, other=0)
            b = triton.load(w.at[matrix, column, inner] if transposed else w.at[matrix, inner, column])
            return sums + triton.dot(a, b, trans_b=transposed)

        # None for the padding. Arithmetic, as Triton's lowering takes no choice between two constants here.
        steps = jnp.minimum(groups - own_group, 1) * (depth // blocks.k)
        sums = lax.fori_loop(0, steps, step, jnp.zeros((blocks.m, blocks.n), jnp.float32))
        triton.store(y.at[rows, column], sums.astype(y.dtype), mask=own)


def _weights_kernel(start, end, x, g, dw, *, blocks: Blocks):
    i, j = _place(pl.program_id(0), dw.shape[1] // blocks.m, dw.shape[2] // blocks.n)
    group = pl.program_id(1)
    first, stop = start[group], end[group]
    row, column = pl.ds(i * blocks.m, blocks.m), pl.ds(j * blocks.n, blocks.n)

    def step(number, sums):
        at = first + number * blocks.k
        own = (at + jnp.arange(blocks.k) < stop)[:, None]
        a = triton.load(x.at[pl.ds(at, blocks.k), row], mask=own, other=0)
        b = triton.load(g.at[pl.ds(at, blocks.k), column], mask=own, other=0)
        return sums + triton.dot(a, b, trans_a=True)

    steps = lax.div(stop - first + blocks.k - 1, blocks.k)
    sums = lax.fori_loop(0, steps, step, jnp.zeros((blocks.m, blocks.n), jnp.float32))
    dw[group, row, column] = sums.astype(dw.dtype)
