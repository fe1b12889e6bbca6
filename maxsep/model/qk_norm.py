"""Normalisation of queries and keys before their rotation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from maxsep.config import ModelConfig
from maxsep.parallel import collectives
from maxsep.parallel.layout import Layout


class QKNorm(nnx.Module):
    """Root-mean-square normalisation of heads, with learned scales, in float32 or wider.

    `model.qk_norm`: `head`, each head by itself, all with the same scale [Q] (Qwen3, Yang et al. 2025); `all`, over all
    heads together, each with its own (OLMoE, Muennighoff et al. 2024), for which devices that split them add up their
    squares.

    Args:
        layout: where heads lie.
        model: the model's config.
        letter: of what is normalised: `h` for queries, `k` for keys.
        dtype: of the weights beside it.
    """

    def __init__(self, layout: Layout, model: ModelConfig, letter: str, dtype):
        self.heads = {"h": model.heads, "k": model.n_kv_heads}[letter]
        self.together = model.qk_norm == "all"
        letters, sizes = ("l-", ()) if not self.together else (f"l{letter}-", (self.heads,))
        shape = (model.layers, *sizes, model.head_size)
        wide = jnp.promote_types(dtype, jnp.float32)
        self.scale = nnx.Param(jnp.ones(shape, wide, out_sharding=layout.spec(letters)))
        self.eps, self.axes = model.norm_eps, layout.axes("h")

    def __call__(self, x_bshq: jax.Array, own: Callable[[jax.Array], jax.Array] = lambda scale: scale) -> jax.Array:
        """[b, s, h, Q] -> [b, s, h, Q], of this device's heads; `own` takes their scales from all of them."""
        scale = self.scale[...]
        wide = x_bshq.astype(scale.dtype)
        if self.together:
            scale = own(scale)
            parts, own = collectives.size(self.axes), x_bshq.shape[2]
            copies = parts * own // self.heads  # of each head: devices may share key/value heads
            squares = jnp.sum(jnp.square(wide), axis=(-2, -1), keepdims=True) / (copies * self.heads * wide.shape[-1])
            mean_square = collectives.total(squares, self.axes)
        else:
            mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x_bshq.dtype)
