"""Normalisation of queries and keys before their rotation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from maxsep.config import ModelConfig
from maxsep.model.parameters import Parameters
from maxsep.parallel import collectives


class QKNorm(nnx.Module):
    """Root-mean-square normalisation of heads, with learned scales, in float32 or wider.

    `model.qk_norm`: `head`, each head by itself, all with the same scale [Q] (Qwen3, Yang et al. 2025); `all`, over all
    heads together, each with its own (OLMoE, Muennighoff et al. 2024), for which devices that split them add up their
    squares.

    Args:
        parameters: declares the scales.
        model: the model's config.
        letter: of what is normalised: `h` for queries, `k` for keys.
    """

    def __init__(self, parameters: Parameters, model: ModelConfig, letter: str):
        self.heads = parameters.sizes[letter]
        self.together = model.qk_norm == "all"
        self.scale = parameters.ones(f"{letter}q" if self.together else "q")
        self.eps, self.axes = model.norm_eps, parameters.layout.axes("h")

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
