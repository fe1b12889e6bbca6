"""The device mesh: which device has which place on the axes."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from maxsep.config import Config
from maxsep.config.layouts import AXES


def make_mesh(config: Config) -> Mesh:
    """The mesh on this machine's devices: (stage, attention, expert), `expert` innermost.

    Neighbouring devices share the fastest links, and the all-to-all of the dispatch runs along `expert`.
    """
    needed = config.mesh.devices
    devices = jax.devices()[:needed]
    assert len(devices) == needed, "parallel.start has counted the devices"
    grid = np.asarray(devices).reshape(config.mesh.shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 3)


def describe(devices: Sequence[jax.Device]) -> str:
    """Number and kind of `devices`, for people."""
    kind = "simulated CPU device" if devices[0].platform == "cpu" else devices[0].device_kind
    return f"{len(devices)} x {kind}"


def abstract_mesh(config: Config) -> AbstractMesh:
    """The same mesh without devices, to type-check a program for a machine one does not have."""
    return AbstractMesh(config.mesh.shape, AXES, axis_types=(AxisType.Explicit,) * 3)
