"""A model's parameters: declared by their shape letters where they are used, drawn all at once, used in a dtype."""

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maxsep.output import tree
from maxsep.parallel import collectives
from maxsep.parallel.layout import Layout


class Buffer(nnx.Variable):
    """What is not trained by gradients: balancing biases, moving averages."""


@dataclass(frozen=True)
class Parameters:
    """Declares the parameters of modules, on the mesh that is set: as shapes with shardings, until they are drawn.

    Args:
        layout: gives each its sharding.
        sizes: of the letters.
        dtype: of the matrices; what is `wide` is float32 or wider.
        layers: None, or how many a segment has: then a module declares those of one layer, and they are stacked on a
            dimension `l` in front.
    """

    layout: Layout
    sizes: dict[str, int]
    dtype: jnp.dtype
    layers: int | None = None

    def stacked(self, layers: int) -> "Parameters":
        """For the modules of a segment of so many layers."""
        return dataclasses.replace(self, layers=layers)

    def sized(self, **sizes: int) -> "Parameters":
        """With other sizes of some letters."""
        return dataclasses.replace(self, sizes=self.sizes | sizes)

    def normal(self, letters: str, std: float, *, whole: str = "", wide: bool = False) -> nnx.Param:
        """Normally distributed weights. `whole`: letters that are not split here, whatever the layout says."""
        shape, spec = self._stacked(letters, whole)
        spec, parts = self.layout.at_rest(spec, shape)
        abstract = self._abstract(shape, spec, self.wide if wide else self.dtype)
        return nnx.Param(abstract, parts=parts, std=std)

    def ones(self, letters: str) -> nnx.Param:
        """A norm's scales."""
        shape, spec = self._stacked(letters)
        return nnx.Param(self._abstract(shape, self.layout.spec(spec), self.wide), std=None)

    def buffer(self, letters: str, dtype) -> Buffer:
        """Zeros that are not trained by gradients; whole on every device but for their layers."""
        shape, spec = self._stacked(letters, whole=letters)
        return Buffer(self._abstract(shape, self.layout.spec(spec), dtype))

    @property
    def wide(self) -> jnp.dtype:
        return jnp.promote_types(self.dtype, jnp.float32)

    def _stacked(self, letters: str, whole: str = "") -> tuple[tuple[int, ...], str]:
        """Their shape, and the letters that split it."""
        shape = tuple(self.sizes[letter] for letter in letters)
        split = "".join("-" if letter in whole else letter for letter in letters)
        return (shape, split) if self.layers is None else ((self.layers, *shape), "l" + split)

    @staticmethod
    def _abstract(shape: tuple[int, ...], spec: PartitionSpec, dtype) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def declared(model: nnx.Module) -> dict[str, dict]:
    """A model's `params` and `buffers`, each as nested dicts of shapes with shardings."""
    kinds = {"params": nnx.Param, "buffers": Buffer}
    return {name: nnx.to_pure_dict(nnx.state(model, kind)) for name, kind in kinds.items()}


def drawn(model: nnx.Module, seed: int) -> dict[str, dict]:
    """A model's initial `params` and `buffers`: in their shardings; on any mesh the same but for rounding.

    Jit it: they are then born there.
    """
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    def draw(path: tuple[str, ...], param: nnx.Param) -> jax.Array:
        x = param.get_value()
        if param.std is None:
            return jnp.ones(x.shape, x.dtype, out_sharding=x.sharding.spec)
        # By its path alone: another parameter, or another order of them, changes no draw.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(".".join(path).encode()))
        normal = jax.random.normal(key, x.shape, x.dtype, out_sharding=x.sharding.spec)
        return normal * jnp.asarray(param.std, x.dtype)

    params = tree.nested({path: draw(path, param) for path, param in params.items()})
    return {"params": params, "buffers": new_buffers(model)}


def new_buffers(model: nnx.Module) -> dict:
    """A model's initial buffers, which are zeros."""

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding.spec)

    return jax.tree.map(zeros, declared(model)["buffers"])


def jitted_init(init: Callable, platform: str) -> Callable:
    """`init`, which draws parameters, jitted: its arrays are born in their shardings."""
    # XLA's CPU compiler would spend seconds on optimising the random numbers, more than on a train step.
    options = {"xla_backend_optimization_level": 1} if platform == "cpu" else None
    return jax.jit(init, compiler_options=options)


class Cast(NamedTuple):
    """A weight, and itself in the dtype in which it is used: cast before, not in each layer of each micro-batch.

    The gradient is all the weight's.
    """

    own: jax.Array
    cast: jax.Array


def casts(params: dict, dtype) -> dict:
    """The layers' matrices in `dtype`, for `with_casts`; None for all else: routers compute in float32 or wider."""

    def cast(path, w):
        names = [entry.key for entry in path]
        in_dtype = names[0] == "segments" and names[-1] != "scale" and "router" not in names
        return w.astype(dtype) if in_dtype else None

    return jax.tree_util.tree_map_with_path(cast, params)


def with_casts(params: dict, casts: dict) -> dict:
    """Parameters that `use` takes in their `casts`; their gradients are those of the parameters."""
    return jax.tree.map(lambda w, cast: w if cast is None else Cast(w, cast), params, casts)


def use(weight: nnx.Param, dtype=None) -> jax.Array:
    """What a device computes with of weights, in `dtype` (None: their own): gathered where they are stored in parts."""
    w = weight.get_value()
    own, cast = w if isinstance(w, Cast) else (w, w.astype(w.dtype if dtype is None else dtype))
    axes, dim = ((), 0) if weight.parts is None else weight.parts
    return collectives.gather_weight(own, cast, axes, own.ndim + dim)
