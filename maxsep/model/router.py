"""The router: which experts each token goes to, with which weights, and how evenly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from maxsep.config import ModelConfig
from maxsep.model.layers import normal, use
from maxsep.parallel import collectives
from maxsep.parallel.layout import Layout


class Choice(NamedTuple):
    """Where one device's tokens go."""

    scores_te: jax.Array  # float32 or wider
    ids_tn: jax.Array  # int32, the chosen experts, best first; equal scores go to the lower id
    weights_tn: jax.Array  # as the scores, softmax over the chosen ones, or their part of that over all


class Routing(NamedTuple):
    """What the router decides for one device's tokens."""

    ids_tn: jax.Array  # as in `Choice`
    weights_tn: jax.Array
    # float32 or wider; this device's share of the loss, to be summed over devices.
    load_balancing: jax.Array
    router_z: jax.Array
    load_e: jax.Array  # int32, tokens that chose each expert, over all devices


class Router(nnx.Module):
    """Linear scores in float32 or wider, top-k, softmax over the chosen, or with raw weights over all experts."""

    def __init__(self, rngs: nnx.Rngs, layout: Layout, model: ModelConfig, dtype):
        wide = jnp.promote_types(dtype, jnp.float32)
        shape = (model.layers, model.d_model, model.experts)
        self.w_lde = normal(rngs, layout, "ld-", shape, model.d_model**-0.5, wide)
        self.layout, self.top_k, self.normalized = layout, model.top_k, model.normalize_top_k

    def choose(self, x_td: jax.Array) -> Choice:
        w_de = use(self.w_lde)
        # Reduced precision here would flip choices; the product is small.
        scores_te = jnp.dot(x_td.astype(w_de.dtype), w_de, precision=lax.Precision.HIGHEST)
        top_tn, ids_tn = lax.top_k(scores_te, self.top_k)
        if self.normalized:
            return Choice(scores_te, ids_tn, jax.nn.softmax(top_tn, axis=-1))
        return Choice(scores_te, ids_tn, jnp.exp(top_tn - jax.nn.logsumexp(scores_te, axis=-1, keepdims=True)))

    def __call__(self, x_td: jax.Array) -> Routing:
        scores_te, ids_tn, weights_tn = self.choose(x_td)
        experts = scores_te.shape[-1]
        load_e = jnp.sum(ids_tn[..., None] == jnp.arange(experts), axis=(0, 1), dtype=jnp.int32)
        load_e = self.layout.total(load_e, self.layout.token_axes, self.layout.in_stage)
        tokens = x_td.shape[0] * collectives.size(self.layout.token_axes)
        # Switch Transformer (Fedus et al. 2021), equation 4, with the choices of all tokens of the micro-batch:
        # experts × Σ share of choices × mean probability, 1 when balanced. Gradients flow through the probabilities.
        share_e = load_e.astype(scores_te.dtype) / (tokens * self.top_k)
        mean_e = jnp.sum(jax.nn.softmax(scores_te, axis=-1), axis=0) / tokens
        # ST-MoE (Zoph et al. 2022), equation 5.
        z_t = jnp.square(jax.nn.logsumexp(scores_te, axis=-1))
        return Routing(ids_tn, weights_tn, experts * jnp.dot(share_e, mean_e), jnp.sum(z_t) / tokens, load_e)
