"""Grouped products, interpreted, against a loop over groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxsep.kernels.grouped import OF_16_BITS, _tiles, grouped_dot, grouped_rows

TILE = OF_16_BITS.m
COUNTS = {
    "uneven": [3, 2 * TILE + 5, 1, 40],
    "empty": [0, 30, 0, 0],
    "none": [0, 0, 0, 0],
    "whole tiles": [TILE, 0, TILE, TILE],
    "all to the last": [0, 0, 0, TILE + 1],
}
SIZES = {"one block": (32, 16), "several": (96, 528), "no multiple of 16": (40, 23)}
FAST = [("one block", "bfloat16"), ("no multiple of 16", "float32")]
ROWS = max(map(sum, COUNTS.values())) + 13  # at least so many are of no group


@jax.jit
def products(x, w, rows, g):
    """The product and both gradients; and the product with matrices among others."""
    y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, rows, interpret=True), x, w)
    among = jnp.concatenate([jnp.full_like(w[:2], jnp.nan), w, jnp.full_like(w[:1], jnp.nan)])
    return (y, *pull(g)), grouped_rows(x, among, rows, first=2, interpret=True)


@pytest.mark.parametrize(
    ("sizes", "dtype", "rounding"),
    [
        pytest.param(
            sizes,
            dtype,
            rounding,
            id=f"{name}-{dtype}",
            marks=[] if (name, dtype) in FAST else pytest.mark.slow,
        )
        for name, sizes in SIZES.items()
        for dtype, rounding in (("float32", 2e-6), ("bfloat16", 2**-8))
    ],
)
def test_equals_a_loop_over_groups(sizes, dtype, rounding):
    """Zeros in the padding, whatever its gradient is."""
    (K, N), rng = sizes, np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((ROWS, K), (4, K, N), (ROWS, N)))
    of_x, of_w, of_g = (np.asarray(a, np.float64) for a in (x, w, g))
    for name, counts in COUNTS.items():
        found, among = products(x, w, jnp.array(counts, jnp.int32), g)
        np.testing.assert_array_equal(among, found[0])
        y, dx, dw = (np.zeros(a.shape) for a in found)
        for row, group in enumerate(np.repeat(range(4), counts)):
            y[row], dx[row] = of_x[row] @ of_w[group], of_w[group] @ of_g[row]
            dw[group] += np.outer(of_x[row], of_g[row])
        for one, right in zip(found, (y, dx, dw), strict=True):
            tolerance = rounding * max(1, np.abs(right).max())
            np.testing.assert_allclose(np.asarray(one, np.float64), right, rtol=0, atol=tolerance, err_msg=name)
        for padding in (found[0][sum(counts) :], found[1][sum(counts) :]):
            assert not padding.any(), name


def test_sums_are_in_float32_and_results_in_their_type():
    x, w, g = (jnp.ones(shape, jnp.bfloat16) for shape in ((300, 512), (1, 512, 16), (300, 16)))
    (y, dx, dw), _ = products(x, w, jnp.array([299], jnp.int32), g)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    assert (y[:299] == 512).all()
    assert (dw == jnp.asarray(299, jnp.bfloat16)).all()  # bfloat16's own sums would stop at 256


def test_every_row_is_in_one_tile():
    rng = np.random.default_rng(0)
    plan = jax.jit(_tiles, static_argnums=(1, 2))
    for _ in range(20):
        counts = rng.multinomial(rng.integers(70), rng.dirichlet([0.3] * 5)).astype(np.int32)
        groups, starts, ends = (np.asarray(a) for a in plan(counts, 90, 8))
        covered = [
            (row, g) for g, at, end in zip(groups, starts, ends, strict=True) for row in range(at, min(at + 8, end))
        ]
        assert sorted(covered) == list(enumerate(np.repeat(range(6), [*counts, 90 - counts.sum()])))
