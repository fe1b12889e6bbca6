"""A layout on a mesh: the sharding of every tensor, and what devices exchange of tokens.

Every tensor is named by its shape letters (B batch, S sequence, D model, H query heads, K key/value heads, Q head size,
E experts, F expert hidden, V vocabulary, L layers), so its sharding follows from its name: `layout.spec("bsd")`. A dash
is a dimension left whole.
"""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from maxsep.config import Config
from maxsep.config.layouts import AXES, row
from maxsep.parallel import collectives
from maxsep.parallel.collectives import Axes
from maxsep.parallel.sharding import split_further


@dataclass(frozen=True)
class Layout:
    """A row of the table of layouts on a mesh of known sizes and kind of device.

    `splits` holds (letter, axes) pairs, `sizes` the mesh axes' sizes in the order of `AXES`, `platform` is cpu, gpu or
    tpu. What takes arrays is to be called inside `jax.shard_map`: they are one device's part.
    """

    splits: tuple[tuple[str, Axes], ...]
    sizes: tuple[int, ...]
    platform: str

    @classmethod
    def of(cls, config: Config, platform: str | None = None) -> "Layout":
        """The config's layout on its mesh; `platform` is this machine's unless one compiles for another."""
        splits = row(config.layout)
        layout = cls(tuple(splits.items()), config.mesh.shape, platform or jax.default_backend())
        # With fewer key/value heads than heads have parts, each device holds them all and uses its own.
        if config.model.n_kv_heads % layout.ways("h") == 0:
            splits["k"] = splits.get("h", ())
        return cls(tuple(sorted(splits.items())), layout.sizes, layout.platform)

    def for_inference(self) -> "Layout":
        """The same with weights as they are used: to gather them for every token would take longer than all else."""
        return replace(self, splits=tuple(split for split in self.splits if split[0] != "w"))

    def of_single_tokens(self) -> "Layout":
        """The same for sequences of one token: what splits the sequence splits the batch further."""
        splits = dict(self.splits)
        splits["b"] = splits.get("b", ()) + splits.pop("s", ())
        return replace(self, splits=tuple(sorted(splits.items())))

    def axes(self, letter: str) -> Axes:
        """Mesh axes that split dimension `letter`, those of size 1 included."""
        return dict(self.splits).get(letter, ())

    def ways(self, letter: str) -> int:
        """Number of parts that dimension `letter` is split into."""
        return math.prod(self.sizes[AXES.index(axis)] for axis in self.axes(letter))

    def spec(self, letters: str) -> PartitionSpec:
        """Sharding of the tensor whose dimensions `letters` name."""
        return PartitionSpec(*(self.axes(letter) or None for letter in letters))

    def at_rest(self, letters: str, shape: tuple[int, ...]) -> tuple[PartitionSpec, tuple[Axes, int] | None]:
        """Sharding in which a matrix is stored, and what to gather where it is used: axes, and dimension from the end.

        Layers stay whole, as they are used one at a time. None: nothing is to be gathered.
        """
        dims = range(letters.startswith("l"), len(shape))
        spec, split = split_further(self.spec(letters), shape, self.sizes, self.axes("w"), dims)
        return spec, split and (split.axes, split.dim - len(shape))

    @property
    def token_axes(self) -> Axes:
        """Mesh axes along which devices hold different tokens between layers."""
        return self.axes("b") + self.axes("s")

    def join(self, x_bs: jax.Array, axes: Axes) -> jax.Array:
        """Tokens [b, s, ...] of all devices along `axes`, the same on each of them."""
        for dim, letter in enumerate("bs"):
            x_bs = collectives.gather(x_bs, self._among(letter, axes), dim)
        return x_bs

    def join_ids(self, ids_bs: jax.Array, axes: Axes) -> jax.Array:
        """Ids [b, S] of a device's whole sequences -> those of the tokens that `join` over `axes` gives."""
        if set(self.axes("s")) <= set(axes):
            return collectives.gather(ids_bs, self._among("b", axes), 0)
        own = ids_bs.shape[1] // self.ways("s")
        first = collectives.index(self.axes("s")) * own
        return self.join(lax.dynamic_slice_in_dim(ids_bs, first, own, axis=1), axes)

    def own(self, x_bs: jax.Array, axes: Axes) -> jax.Array:
        """This device's tokens of those `join`ed over `axes`."""
        for dim, letter in enumerate("bs"):
            among = self._among(letter, axes)
            size = x_bs.shape[dim] // collectives.size(among)
            x_bs = lax.dynamic_slice_in_dim(x_bs, collectives.index(among) * size, size, axis=dim)
        return x_bs

    def part(self, y_bs: jax.Array, axes: Axes) -> jax.Array:
        """Sum over the devices along `axes` of what they made of `join`ed tokens; each keeps its own tokens."""
        for dim, letter in enumerate("bs"):
            y_bs = collectives.reduce_scatter(y_bs, self._among(letter, axes), dim)
        return collectives.vary(collectives.total(y_bs, tuple(axis for axis in axes if axis not in self.token_axes)))

    @property
    def in_stage(self) -> Axes:
        """Mesh axes along which devices hold the same layers."""
        return tuple(axis for axis in AXES if axis not in self.axes("l"))

    def total(self, x: jax.Array, apart: Axes, along: Axes = AXES) -> jax.Array:
        """Sum over the devices along `along` of what differs along `apart`; along others it is the same, counted once.

        A layer's figures are summed along `in_stage`, as other stages have other layers.
        """
        copies = tuple(axis for axis in along if axis not in apart)
        if jnp.issubdtype(x.dtype, jnp.integer):  # of one copy: all of them together may be too large a number
            return lax.psum(jnp.where(collectives.index(copies) == 0, collectives.vary(x), 0), along)
        return lax.psum(collectives.vary(x), along) / collectives.size(copies)

    def _among(self, letter: str, axes: Axes) -> Axes:
        return tuple(axis for axis in self.axes(letter) if axis in axes)
