"""The router: which experts each token goes to, with which weights, and how evenly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from maxsep.config import ModelConfig
from maxsep.model.parameters import Parameters, use


class Statistics(NamedTuple):
    """Sums over this device's tokens, of which `moe.py` makes losses and figures over all devices."""

    load_e: jax.Array  # int32, tokens that chose each expert
    probability_e: jax.Array  # of each expert, float32 or wider; balancing losses have their gradient through it
    z: jax.Array  # squared log-sum-exp of the scores, float32 or wider


class Routing(NamedTuple):
    """Where one device's tokens go."""

    ids_tn: jax.Array  # int32, the chosen experts, best first; equal scores go to the lower id
    weights_tn: jax.Array  # float32 or wider, softmax over the chosen ones, or their part of that over all
    statistics: Statistics


class Router(nnx.Module):
    """Linear scores in float32 or wider, top-k, softmax over the chosen, or with raw weights over all experts.

    It sends nothing: what is added up over devices is added up in `moe.py`.
    """

    def __init__(self, parameters: Parameters, model: ModelConfig):
        self.w_de = parameters.normal("de", model.d_model**-0.5, whole="e", wide=True)
        self.top_k, self.normalized = model.top_k, model.normalize_top_k

    def topk(self, x_td: jax.Array) -> Routing:
        w_de = use(self.w_de)
        # Reduced precision here would flip choices; the product is small.
        scores_te = jnp.dot(x_td.astype(w_de.dtype), w_de, precision=lax.Precision.HIGHEST)
        top_tn, ids_tn = lax.top_k(scores_te, self.top_k)
        if self.normalized:
            weights_tn = jax.nn.softmax(top_tn, axis=-1)
        else:
            weights_tn = jnp.exp(top_tn - jax.nn.logsumexp(scores_te, axis=-1, keepdims=True))
        load_e = jnp.sum(ids_tn[..., None] == jnp.arange(scores_te.shape[-1]), axis=(0, 1), dtype=jnp.int32)
        probability_e = jnp.sum(jax.nn.softmax(scores_te, axis=-1), axis=0)
        z = jnp.sum(jnp.square(jax.nn.logsumexp(scores_te, axis=-1)))
        return Routing(ids_tn, weights_tn, Statistics(load_e, probability_e, z))
