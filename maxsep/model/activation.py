"""What makes hidden numbers of an MLP's products: SwiGLU, or GELU."""

import math

import jax
import jax.numpy as jnp
from jax import lax


def activate(activation: str, *hidden: jax.Array) -> jax.Array:
    """`model.activation` of the products with w_gate and w_in (swiglu: Shazeer 2020), or with w_in (gelu)."""
    if activation == "swiglu":
        gate, up = hidden
        return jax.nn.silu(gate) * up
    return _gelu(*hidden)


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
    """x × the normal distribution's cumulative function (Hendrycks and Gimpel 2016), exact."""
    return x * _normal_cdf(x)


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    # JAX 0.12 cannot differentiate erfc inside `shard_map`.
    (x,), (dx,) = primals, tangents
    cdf = _normal_cdf(x)
    return x * cdf, dx * (cdf + x * jnp.exp(-jnp.square(x) / 2) * (2 * math.pi) ** -0.5)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return lax.erfc(-x * 0.5**0.5) / 2


def weighted(h: jax.Array, share: jax.Array) -> jax.Array:
    """Hidden rows times their shares, which are float32 or wider, as is the sum that is their gradient."""
    return (h.astype(share.dtype) * share).astype(h.dtype)
