"""Shardings of what is stored: which devices hold copies, and how to split an array over those too."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from maxsep.config.layouts import AXES
from maxsep.parallel.collectives import Axes


class Split(NamedTuple):
    """One dimension, and the mesh axes over which it is split."""

    axes: Axes
    dim: int


def axes_of(spec: PartitionSpec, dim: int) -> Axes:
    """Mesh axes that split dimension `dim`."""
    part = spec[dim] if dim < len(spec) else None
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def replicating_axes(spec: PartitionSpec) -> Axes:
    """Mesh axes over which a tensor of sharding `spec` is replicated."""
    used = {axis for dim in range(len(spec)) for axis in axes_of(spec, dim)}
    return tuple(axis for axis in AXES if axis not in used)


def split_further(
    spec: PartitionSpec, shape: tuple[int, ...], sizes: tuple[int, ...], over: Axes, dims: Iterable[int]
) -> tuple[PartitionSpec, Split | None]:
    """Sharding that also splits a whole dimension over those of the axes `over` that replicate the tensor.

    As many devices as possible take part; then the first of `dims` that divides is split. None: none does.

    Args:
        spec: sharding of the tensor now.
        shape: the global one.
        sizes: the mesh axes' sizes in the order of `AXES`.
        over: mesh axes.
        dims: dimensions, in the order of preference.
    """
    size = dict(zip(AXES, sizes, strict=True))
    free = [axis for axis in replicating_axes(spec) if axis in over and size[axis] > 1]
    choices = [axes for count in range(len(free), 0, -1) for axes in itertools.combinations(free, count)]
    whole = [dim for dim in dims if not axes_of(spec, dim)]
    for axes in sorted(choices, key=lambda axes: -math.prod(size[axis] for axis in axes)):
        for dim in whole:
            if shape[dim] % math.prod(size[axis] for axis in axes) == 0:
                parts = [axes_of(spec, i) or None for i in range(len(shape))]
                parts[dim] = axes
                return PartitionSpec(*parts), Split(axes, dim)
    return spec, None


def added(spec: PartitionSpec, further: PartitionSpec) -> Split | None:
    """What `split_further` has added to `spec`."""
    for dim in range(len(further)):
        if axes_of(further, dim) != axes_of(spec, dim):
            return Split(axes_of(further, dim), dim)
    return None


def on_mesh(abstract):
    """Abstract arrays on the mesh that is set; `eval_shape` leaves them on one without devices."""
    mesh = jax.sharding.get_mesh()

    def place(x):
        spec = PartitionSpec() if x.sharding is None else x.sharding.spec  # scalars have none
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract)


def fetched(array: jax.Array) -> np.ndarray:
    """All of an array over the mesh, in each process of the job; all have to ask for it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
