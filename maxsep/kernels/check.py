"""Grouped products on this machine's device, before a run relies on them, against exact ones.

Matrices of -1, 0 and 1 have products that float32 adds up without rounding, in any order. So what comes back is the
exact sum, rounded once to its type, or the kernel is wrong.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from maxsep.kernels import ROWS, WEIGHTS, Sizes
from maxsep.kernels.grouped import grouped_dot

SAMPLED = 64  # rows, and 16 columns of each matrix, are compared
COLUMNS = 16


def wrong(sizes: Sizes, dtype: str, interpret: bool = False) -> str | None:
    """The first kernel that is wrong on this process's first device, and where; None: none is.

    Both matrices of an expert, forward and both gradients, on groups of the run's own size, ragged, empty, and with all
    rows in one.

    Args:
        sizes: of the run's products.
        dtype: of the factors.
        interpret: run the kernels' Python, on any machine.
    """
    rng = np.random.default_rng(0)
    alone = Mesh(jax.local_devices()[:1], ("one",), axis_types=(AxisType.Auto,))  # whatever mesh the run has set
    with jax.set_mesh(alone):
        return _wrong(sizes, dtype, interpret, rng)


def _wrong(sizes: Sizes, dtype: str, interpret: bool, rng: np.random.Generator) -> str | None:
    for depth, width in dict.fromkeys([(sizes.d_model, sizes.d_ff), (sizes.d_ff, sizes.d_model)]):
        chosen = [np.sort(rng.choice(of, min(of, COLUMNS), replace=False)) for of in (depth, width)]
        shapes = (sizes.rows, depth), (sizes.groups, depth, width), (sizes.rows, width)
        run = jax.jit(functools.partial(_products, shapes, jnp.dtype(dtype), interpret))
        for name, rows_e in _cases(sizes, rng):
            sampled = _sampled(rows_e, sizes.rows, rng)
            found = jax.device_get(run(rows_e, sampled, *chosen))
            for kernel, where in _differences(found, rows_e, sampled, *chosen):
                return f"{kernel} at {where}, {sizes.rows} rows x {depth} x {width}, {sizes.groups} groups ({name})"
    return None


def _cases(sizes: Sizes, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of each group, int32."""
    used, groups = int(sizes.rows * sizes.filled), sizes.groups
    ends = np.linspace(0, used, groups + 1).astype(int)
    cases = {
        "balanced": np.diff(ends),
        "ragged": rng.multinomial(used, rng.dirichlet(np.full(groups, 0.5))),
        "every other empty": np.diff(ends) * (np.arange(groups) % 2),
        "all rows in the last": np.where(np.arange(groups) == groups - 1, sizes.rows, 0),
        "none": np.zeros(groups),
    }
    for name, rows_e in cases.items():
        yield name, rows_e.astype(np.int32)


def _sampled(rows_e: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Rows to compare: around the ends of groups, where kernels go wrong, and any."""
    ends = np.cumsum(rows_e)
    near = rng.permutation(np.unique(np.clip([0, *(ends - 1), *ends, rows - 1], 0, rows - 1)))[: SAMPLED // 2]
    return np.concatenate([near, rng.integers(rows, size=SAMPLED - near.size)]).astype(np.int32)


def _products(shapes, dtype, interpret: bool, rows_e, sampled, deep, wide) -> dict[str, jax.Array]:
    """What is compared of the products and their factors: the sampled rows, and columns `deep` of K and `wide` of N."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (jax.random.randint(key, of, -1, 2, jnp.int8).astype(dtype) for key, of in zip(keys, shapes, strict=True))
    y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, rows_e, interpret), x, w)
    dx, dw = pull(g)
    return {
        "x": x[sampled],
        "g": g[sampled],
        "x deep": x[:, deep],
        "g wide": g[:, wide],
        "w wide": w[:, :, wide],
        "w deep": w[:, deep, :],
        "y": y[sampled][:, wide],
        "dx": dx[sampled][:, deep],
        "dw": dw[:, deep][:, :, wide],
    }


def _differences(found: dict[str, np.ndarray], rows_e, sampled, deep, wide) -> Iterator[tuple[str, str]]:
    """Where a product is not the exact one: the kernel, and the place."""
    exact = {name: of.astype(np.float64) for name, of in found.items()}
    ends = np.cumsum(rows_e)
    groups = np.searchsorted(ends, sampled, side="right")
    for at, (row, group) in enumerate(zip(sampled, groups, strict=True)):
        y, dx = np.zeros(wide.size), np.zeros(deep.size)
        if group < ends.size:
            y, dx = exact["x"][at] @ exact["w wide"][group], exact["w deep"][group] @ exact["g"][at]
        for result, right, columns, product in (("y", y, wide, ROWS), ("dx", dx, deep, f"{ROWS}, transposed,")):
            off = np.flatnonzero(found[result][at] != right.astype(found[result].dtype))
            if off.size:
                yield product, f"row {row}, column {columns[off[0]]}"
    for group, (first, end) in enumerate(zip(ends - rows_e, ends, strict=True)):
        right = exact["x deep"][first:end].T @ exact["g wide"][first:end]
        off = np.argwhere(found["dw"][group] != right.astype(found["dw"].dtype))
        if off.size:
            yield WEIGHTS, f"group {group}, row {deep[off[0][0]]}, column {wide[off[0][1]]}"
