"""Weights, and the small layers: norm, rotary positions, embedding."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxsep.parallel import collectives
from maxsep.parallel.layout import Layout


def normal(rngs: nnx.Rngs, layout: Layout, letters: str, shape: tuple[int, ...], std: float, dtype) -> nnx.Param:
    """Normally distributed weights, drawn straight into their sharding; on any mesh the same but for rounding."""
    spec, parts = layout.at_rest(letters, shape)
    draw = jax.random.normal(rngs.params(), shape, dtype, out_sharding=spec)
    return nnx.Param(draw * jnp.asarray(std, dtype), parts=parts)


def jitted_init(init: Callable, platform: str) -> Callable:
    """`init`, which draws weights, jitted: its arrays are born in their shardings."""
    # XLA's CPU compiler would spend seconds on optimising the random numbers, more than on a train step.
    options = {"xla_backend_optimization_level": 1} if platform == "cpu" else None
    return jax.jit(init, compiler_options=options)


class Cast(NamedTuple):
    """A weight, and itself in the dtype in which it is used: cast before, not in each layer of each micro-batch.

    The gradient is all the weight's.
    """

    own: jax.Array
    cast: jax.Array


def use(weight: nnx.Param, dtype=None) -> jax.Array:
    """What a device computes with of weights, in `dtype` (None: their own): gathered where they are stored in parts."""
    w = weight.get_value()
    own, cast = w if isinstance(w, Cast) else (w, w.astype(w.dtype if dtype is None else dtype))
    axes, dim = ((), 0) if weight.parts is None else weight.parts
    return collectives.gather_weight(own, cast, axes, own.ndim + dim)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, equation 4) with a learned scale, in float32 or wider.

    `stack` leading dimensions hold one scale for each layer.
    """

    def __init__(self, layout: Layout, stack: tuple[int, ...], d_model: int, eps: float, dtype):
        spec = layout.spec("ld" if stack else "d")
        wide = jnp.promote_types(dtype, jnp.float32)
        self.scale = nnx.Param(jnp.ones((*stack, d_model), wide, out_sharding=spec))
        self.eps = eps

    def __call__(self, x_bsd: jax.Array) -> jax.Array:
        wide = x_bsd.astype(self.scale[...].dtype)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(x_bsd.dtype)


def rotate(x_bshq: jax.Array, theta: float, position_bs: jax.Array | None = None) -> jax.Array:
    """Rotary positions (Su et al. 2021), halves of a head paired as in GPT-NeoX.

    `position_bs` [b, s] are those of the tokens; None: 0 to S - 1.
    """
    half = x_bshq.shape[-1] // 2
    wide = jnp.promote_types(x_bshq.dtype, jnp.float32)
    frequency = jnp.asarray(theta, wide) ** (-jnp.arange(half, dtype=wide) / half)
    position = jnp.arange(x_bshq.shape[1]) if position_bs is None else position_bs
    angle_s1q = position.astype(wide)[..., None, None] * frequency
    cos, sin = jnp.cos(angle_s1q), jnp.sin(angle_s1q)
    first, second = jnp.split(x_bshq.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_bshq.dtype)


class Embedding(nnx.Module):
    """A row of `table_vd` for each token id. Devices that split the rows look up the tokens of all of them."""

    def __init__(self, rngs: nnx.Rngs, layout: Layout, rows: int, d_model: int, dtype):
        self.table_vd = normal(rngs, layout, "vd", (rows, d_model), 0.02, dtype)
        self.layout = layout

    def __call__(self, tokens_bs: jax.Array, dtype) -> jax.Array:
        """Ids [b, S] of whole sequences -> [b, s, D] in `dtype`."""
        table, axes = use(self.table_vd), self.layout.axes("v")
        tokens_bs = self.layout.join_ids(tokens_bs, axes)
        local = tokens_bs - collectives.index(axes) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        # A device adds zeros for rows it does not hold, so the sum is exact in any dtype.
        rows = jnp.where(here[..., None], table.at[jnp.where(here, local, 0)].get(mode="clip"), 0).astype(dtype)
        return self.layout.part(rows, axes)
