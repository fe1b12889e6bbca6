"""The device mesh, and the shardings that a layout gives on it.

Every tensor is named by its shape letters (B batch, S sequence, D model, H query heads, K key/value heads, Q head size,
E experts, F expert hidden, V vocabulary, L layers), so its sharding follows from its name: `layout.spec("bsd")`. A dash
is a dimension left whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from maxsep.config import Config
from maxsep.config.layouts import AXES, LAYOUTS


@dataclass(frozen=True)
class Layout:
    """A layout on a mesh of known sizes and kind of device.

    `splits` holds (letter, axes) pairs, `sizes` the mesh axes' sizes in the order of `AXES`, `platform` is cpu, gpu or
    tpu.
    """

    name: str
    splits: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: tuple[int, ...]
    platform: str

    @classmethod
    def of(cls, config: Config, platform: str | None = None) -> "Layout":
        """The config's layout on its mesh; `platform` is this machine's unless one compiles for another."""
        splits = dict(LAYOUTS[config.layout])
        sizes = config.mesh.shape
        ways = _product(sizes, splits["h"])
        # With fewer key/value heads than the axis has devices, each device holds them all and uses its own.
        splits["k"] = splits["h"] if config.model.n_kv_heads % ways == 0 else ()
        return cls(config.layout, tuple(sorted(splits.items())), sizes, platform or jax.default_backend())

    def axes(self, letter: str) -> tuple[str, ...]:
        """Mesh axes that split dimension `letter`, those of size 1 included."""
        return dict(self.splits).get(letter, ())

    def ways(self, letter: str) -> int:
        """Number of parts that dimension `letter` is split into."""
        return _product(self.sizes, self.axes(letter))

    def spec(self, letters: str) -> PartitionSpec:
        """Sharding of the tensor whose dimensions `letters` name."""
        return PartitionSpec(*(self.axes(letter) or None for letter in letters))


def replicating_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """Mesh axes over which a tensor of sharding `spec` is replicated."""
    used = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
    return tuple(axis for axis in AXES if axis not in used)


def zero_spec(spec: PartitionSpec, shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[PartitionSpec, int | None]:
    """Sharding that also splits a tensor over the axes that replicate it (ZeRO-1), and the dimension it does so on.

    The last dimension that divides takes all the replicating axes. None where no dimension divides, or none replicates.
    """
    axes = tuple(axis for axis in replicating_axes(spec) if sizes[AXES.index(axis)] > 1)
    parts = list(spec) + [None] * (len(shape) - len(spec))
    for dim in reversed(range(len(shape))):
        if axes and parts[dim] is None and shape[dim] % _product(sizes, axes) == 0:
            parts[dim] = axes
            return PartitionSpec(*parts), dim
    return spec, None


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


def _product(sizes: tuple[int, ...], axes: tuple[str, ...]) -> int:
    return int(np.prod([sizes[AXES.index(axis)] for axis in axes], dtype=int))
