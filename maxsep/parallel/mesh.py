"""The device mesh: which device has which place on the axes."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from maxsep.config import Config, MeshConfig
from maxsep.config.layouts import AXES
from maxsep.parallel.order import inner


def make_mesh(config: Config) -> Mesh:
    """The mesh on the job's devices: (stage, attention, expert), the axis that `inner` names innermost.

    Neighbouring devices, those of a process first, share the fastest links.
    """
    needed = config.mesh.devices
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))[:needed]
    assert len(devices) == needed, "parallel.start has counted the devices"
    return mesh_of(arranged(devices, config.mesh, inner(config, near(devices))))


def arranged(devices: Sequence, mesh: MeshConfig, inner: str) -> np.ndarray:
    """Devices [stage, attention, expert], given in the order of their neighbourhood; `inner` is the innermost axis."""
    if inner == "expert":
        return np.asarray(devices).reshape(mesh.shape)
    return np.asarray(devices).reshape(mesh.stage, mesh.expert, mesh.attention).swapaxes(1, 2)


def mesh_of(devices: np.ndarray) -> Mesh:
    """The mesh of devices [stage, attention, expert]."""
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * 3)


def near(devices: Sequence[jax.Device]) -> int:
    """Devices of a process, which a node has one of."""
    return len(devices) // len({device.process_index for device in devices})


def describe(devices: Sequence[jax.Device]) -> str:
    """Number and kind of `devices`, for people."""
    kind = "simulated CPU device" if devices[0].platform == "cpu" else devices[0].device_kind
    processes = len({device.process_index for device in devices})
    return f"{len(devices)} x {kind}" + (f" in {processes} processes" if processes > 1 else "")


def neighbours(config: Config, devices: Sequence[jax.Device]) -> str:
    """Which axis lies innermost, for people; nothing where only one has a size."""
    if min(config.mesh.attention, config.mesh.expert) == 1:
        return ""
    return f", neighbours along {inner(config, near(devices))} (mesh.inner={config.mesh.inner})"


def abstract_mesh(config: Config) -> AbstractMesh:
    """The same mesh without devices, to type-check a program for a machine one does not have."""
    return AbstractMesh(config.mesh.shape, AXES, axis_types=(AxisType.Explicit,) * 3)
