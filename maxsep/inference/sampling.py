"""The next token from the scores of all: the best, or one drawn by the softmax of scores over the temperature."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "seed"],
    meta_fields=["greedy", "top_k", "nucleus"],
)
@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. A pytree: programs are compiled anew only where the last three fields change."""

    temperature: float
    top_p: float
    seed: int
    greedy: bool
    top_k: int | None
    nucleus: bool

    @classmethod
    def of(cls, temperature: float = 0.0, top_k: int | None = None, top_p: float = 1.0, seed: int = 0) -> "Sampling":
        """Of `temperature` 0 is greedy. Only the `top_k` best can be drawn (None: all), and only the best whose
        probabilities together reach `top_p`."""
        return cls(temperature or 1.0, top_p, seed, temperature == 0, top_k, top_p < 1)


def sample(scores_bv: jax.Array, sampling: Sampling, number_b: jax.Array, position_b: jax.Array) -> jax.Array:
    """Ids [b], int32, of the next tokens.

    What is drawn depends on the seed, the prompt's number `number_b` and the token's position `position_b` in its text
    alone: not on the mesh, and not on the other prompts. Of equal scores the lower id is taken.
    """
    if sampling.greedy:
        return jnp.argmax(scores_bv, axis=-1).astype(jnp.int32)
    scores_bv = scores_bv / jnp.asarray(sampling.temperature, scores_bv.dtype)
    if sampling.top_k is not None:
        least_b1 = lax.top_k(scores_bv, min(sampling.top_k, scores_bv.shape[-1]))[0][:, -1:]
        scores_bv = jnp.where(scores_bv >= least_b1, scores_bv, -jnp.inf)
    if sampling.nucleus:  # Holtzman et al. 2020
        sorted_bv = jnp.sort(scores_bv, axis=-1, descending=True)
        p_bv = jax.nn.softmax(sorted_bv, axis=-1)
        inside_bv = jnp.cumsum(p_bv, axis=-1) - p_bv < jnp.asarray(sampling.top_p, p_bv.dtype)
        least_b1 = jnp.min(jnp.where(inside_bv, sorted_bv, jnp.inf), axis=-1, keepdims=True)
        scores_bv = jnp.where(scores_bv >= least_b1, scores_bv, -jnp.inf)

    def noise(number, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), number), position)
        return jax.random.gumbel(key, scores_bv.shape[1:], scores_bv.dtype)

    return jnp.argmax(scores_bv + jax.vmap(noise)(number_b, position_b), axis=-1).astype(jnp.int32)
