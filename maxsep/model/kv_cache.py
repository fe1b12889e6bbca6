"""The cache of keys and values: what decoding keeps of the tokens before.

A prompt's tokens lie at the end of the first slots, so that all sequences of a batch write the next slot together: with
five slots of prompts, `the cat` is `. . . the cat`, and what comes next goes into slot 5 of every sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Prompts(NamedTuple):
    """What attention has to know of a batch of prompts, which begin at 0."""

    segments_bs: jax.Array | None  # the number of each token's document; None: tokens attend across them
    pad_b: jax.Array  # int32, empty slots before each in the cache
    slots: int  # of the cache


class Window(NamedTuple):
    """Which slots belong to a sequence."""

    pad_b: jax.Array  # int32, empty slots before the prompt
    first_b: jax.Array  # int32, the first slot that may be attended to


class KeysValues(NamedTuple):
    """Keys and values of one layer, of the heads that this device has."""

    k_bktq: jax.Array
    v_bktq: jax.Array

    @classmethod
    def of_prompts(cls, prompts: Prompts, k_bskq: jax.Array, v_bskq: jax.Array) -> "KeysValues":
        """A cache with the keys and values of prompts."""
        return cls(*(_aligned(prompts.slots, prompts.pad_b, x_bskq) for x_bskq in (k_bskq, v_bskq)))

    def put(self, slot: jax.Array, k_b1kq: jax.Array, v_b1kq: jax.Array) -> "KeysValues":
        """With one token's keys and values in `slot`."""
        new = zip(self, (k_b1kq, v_b1kq), strict=True)
        return KeysValues(*(lax.dynamic_update_slice_in_dim(x, y.swapaxes(1, 2), slot, axis=2) for x, y in new))


def _aligned(slots: int, pad_b: jax.Array, x_bskq: jax.Array) -> jax.Array:
    """[b, s, k, q] -> [b, k, slots, q]: each sequence moved by its `pad_b`."""
    s = x_bskq.shape[1]
    source_bs = jnp.maximum(jnp.arange(s) - pad_b[:, None], 0)
    x_bskq = jnp.take_along_axis(x_bskq, source_bs[..., None, None], axis=1)
    return jnp.pad(x_bskq.swapaxes(1, 2), ((0, 0), (0, 0), (0, slots - s), (0, 0)))
