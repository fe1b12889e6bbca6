"""Communication between devices, inside the train step's one `jax.shard_map`.

What layers exchange goes through these functions; losses, counts and gradients are added up with `lax.psum`. Each takes
the mesh axes from the layout and does nothing where those have size 1, so the same model runs on one device. Arrays are
what one device holds.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from maxsep.config.layouts import AXES

Axes = tuple[str, ...]


def size(axes: Axes) -> int:
    """Number of devices along `axes`."""
    return math.prod(lax.axis_size(axis) for axis in axes)


def vary(tree):
    """Mark arrays as differing between devices, so that gradients stay where they arise until they are reduced."""

    def mark(x):
        axes = tuple(axis for axis in AXES if axis not in jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, axes, to="varying") if axes else x

    return jax.tree.map(mark, tree)


def zeros(like):
    """Zeros of the shapes of a tree of abstract arrays; between devices they differ where those do."""

    def make(x):
        axes = tuple(axis for axis in AXES if axis in x.manual_axis_type.varying)
        zero = jnp.zeros(x.shape, x.dtype)
        return lax.pcast(zero, axes, to="varying") if axes else zero

    return jax.tree.map(make, like)


def gather(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """The whole of dimension `dim` from its parts on the devices along `axes`; the gradient is a reduce-scatter."""
    return x if size(axes) == 1 else lax.all_gather(x, axes, axis=dim, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gather_weight(w: jax.Array, cast: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """The whole of a weight from its parts, of which `cast` is sent: w in the computation's dtype.

    The gradient is all w's, a reduce-scatter in its own dtype: sums over devices are not in bfloat16.
    """
    return _gather_weight_fwd(w, cast, axes, dim)[0]


def _gather_weight_fwd(w, cast, axes, dim):
    with jax.named_scope("parameters"):
        return gather(cast, axes, dim), jnp.zeros((), w.dtype)


def _gather_weight_bwd(axes, dim, own, g):
    with jax.named_scope("gradient_reduction"):
        return reduce_scatter(g.astype(own.dtype), axes, dim), None


gather_weight.defvjp(_gather_weight_fwd, _gather_weight_bwd)


def reduce_scatter(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Sum over the devices along `axes`, of which each keeps its part of dimension `dim`; the gradient is a gather."""
    return x if size(axes) == 1 else lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def exchange(x: jax.Array, axes: Axes, split: int, concat: int) -> jax.Array:
    """All-to-all: part i of dimension `split` goes to device i along `axes`, what arrives is joined on `concat`."""
    return x if size(axes) == 1 else lax.all_to_all(x, axes, split_axis=split, concat_axis=concat, tiled=True)


def shift(x: jax.Array, axes: Axes) -> jax.Array:
    """What the device before this one along `axes` has; zeros on the first, or the only one. Gradients go back."""
    return lax.ppermute(x, axes, [(i, i + 1) for i in range(size(axes) - 1)])


def total(x: jax.Array, axes: Axes) -> jax.Array:
    """Sum over the devices along `axes`, on which the result is then the same."""
    return lax.psum(x, axes) if axes else x


def largest(x: jax.Array, axes: Axes) -> jax.Array:
    """Maximum over the devices along `axes`; not differentiable."""
    return x if size(axes) == 1 else lax.pmax(x, axes)


def index(axes: Axes) -> jax.Array | int:
    """This device's position along `axes`."""
    return 0 if size(axes) == 1 else lax.axis_index(axes)
