"""What layers have to know of a micro-batch beside its states: documents, padding, numbers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """One device's tokens [b, s] of a micro-batch."""

    segments_bs: jax.Array | None  # [b, S], of whole sequences: the number of each token's document
    number_bs: jax.Array  # int32, in the global batch
    real_bs: jax.Array  # bool, which are none of the padding
    length_b: jax.Array  # int32, tokens of each whole sequence without padding
    count: jax.Array  # float32 or wider: how many there are on all devices, what means are over
    sequences: jax.Array  # the same of sequences that are not all padding


def documents(tokens_bs: jax.Array, end_of_text: int | None) -> jax.Array | None:
    """The number of each token's document in its sequence; None where tokens attend across them (no `end_of_text`)."""
    if end_of_text is None:
        return None
    ends = (tokens_bs == end_of_text).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends  # an end of text belongs to the document it ends
