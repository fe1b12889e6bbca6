"""The small layers: norm, rotary positions, embedding."""

import jax
import jax.numpy as jnp
from flax import nnx

from maxsep.model.parameters import Parameters, use
from maxsep.parallel import collectives


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, equation 4) in float32 or wider."""

    def __init__(self, parameters: Parameters, eps: float):
        self.scale, self.eps = parameters.ones("d"), eps

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

    def __init__(self, parameters: Parameters):
        self.table_vd, self.layout = parameters.normal("vd", 0.02), parameters.layout

    def __call__(self, tokens_bs: jax.Array, dtype) -> jax.Array:
        """Ids [b, S] of whole sequences -> [b, s, D] in `dtype`."""
        table, axes = use(self.table_vd), self.layout.axes("v")
        tokens_bs = self.layout.join_ids(tokens_bs, axes)
        local = tokens_bs - collectives.index(axes) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        # A device adds zeros for rows it does not hold, so the sum is exact in any dtype.
        rows = jnp.where(here[..., None], table.at[jnp.where(here, local, 0)].get(mode="clip"), 0).astype(dtype)
        return self.layout.part(rows, axes)
