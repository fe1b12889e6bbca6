"""The router: which experts each token goes to, with which weights, and how evenly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from maxsep.config import ModelConfig
from maxsep.model.parameters import Parameters, use


class Statistics(NamedTuple):
    """Of each token, of which `moe.py` makes losses and figures over all devices."""

    scored_tn: jax.Array  # int32, the experts that the scores alone would choose
    probability_te: jax.Array  # scores that sum to 1, float32 or wider; balancing losses have their gradient through it
    z_t: jax.Array  # squared log-sum-exp of the logits, float32 or wider


class Routing(NamedTuple):
    """Where one device's tokens go."""

    ids_tn: jax.Array  # int32, the chosen experts, best first; equal scores go to the lower id
    weights_tn: jax.Array  # float32 or wider
    statistics: Statistics


class Router(nnx.Module):
    """Scores in float32 or wider, top-k, weights (DeepSeek-V3, arXiv:2412.19437, equations 12 to 16).

    A score is the softmax of linear logits over all experts, or each logit's sigmoid. With a bias, which no gradient
    trains, score + bias chooses; with groups, among the experts of those groups whose two best add up to the most.
    The weights are the chosen ones' scores without the bias, made to sum to 1 if they are normalised, times a scale.
    It sends nothing: what is added up over devices is added up in `moe.py`.
    """

    def __init__(self, parameters: Parameters, model: ModelConfig):
        self.w_de = parameters.normal("de", model.d_model**-0.5, whole="e", wide=True)
        if model.router_bias_rate:
            self.bias_e = parameters.buffer("e", jnp.float32)
        self.softmax, self.biased = model.router_score == "softmax", bool(model.router_bias_rate)
        self.top_k, self.normalized, self.scale = model.top_k, model.normalize_top_k, model.router_scale
        self.groups, self.top_groups = model.router_groups, model.router_top_groups

    def topk(self, x_td: jax.Array) -> Routing:
        w_de = use(self.w_de)
        # Reduced precision here would flip choices; the product is small.
        logits_te = jnp.dot(x_td.astype(w_de.dtype), w_de, precision=lax.Precision.HIGHEST)
        probability_te = jax.nn.softmax(logits_te, axis=-1)
        if not self.biased and self.groups == 1:
            top_tn, ids_tn = lax.top_k(logits_te, self.top_k)  # scores rise with their logits
            scored_tn = ids_tn
        else:
            score_te = probability_te if self.softmax else jax.nn.sigmoid(logits_te)
            scored_tn = self._chosen(score_te)
            ids_tn = self._chosen(score_te + self.bias_e[...]) if self.biased else scored_tn
            top_tn = jnp.take_along_axis(logits_te, ids_tn, axis=-1)
        if not self.softmax:
            top_tn, probability_te = jax.nn.log_sigmoid(top_tn), jax.nn.softmax(jax.nn.log_sigmoid(logits_te), axis=-1)
        if self.normalized:
            weights_tn = jax.nn.softmax(top_tn, axis=-1)  # of scores' logarithms, up to a constant: no sum can be 0
        elif self.softmax:
            weights_tn = jnp.exp(top_tn - jax.nn.logsumexp(logits_te, axis=-1, keepdims=True))
        else:
            weights_tn = jnp.exp(top_tn)
        if self.scale != 1:
            weights_tn *= self.scale
        z_t = jnp.square(jax.nn.logsumexp(logits_te, axis=-1))
        return Routing(ids_tn, weights_tn, Statistics(scored_tn, probability_te, z_t))

    def _chosen(self, score_te: jax.Array) -> jax.Array:
        """The ids of the k largest, in the groups that may be chosen from."""
        if self.groups > 1:
            score_tge = score_te.reshape(score_te.shape[0], self.groups, -1)
            best_tg = jnp.sum(lax.top_k(score_tge, 2)[0], axis=-1)
            groups_tn = lax.top_k(best_tg, self.top_groups)[1]
            open_tg = jnp.any(groups_tn[..., None] == jnp.arange(self.groups), axis=1)
            score_te = jnp.where(open_tg[..., None], score_tge, -jnp.inf).reshape(score_te.shape)
        return lax.top_k(score_te, self.top_k)[1]


def balanced(bias_le: jax.Array, load_le: jax.Array, rate: float) -> jax.Array:
    """Biases after a step: an expert with less than the mean load gains `rate`, one with more loses it.

    Wang et al. 2024 (arXiv:2408.15664), algorithm 1, as DeepSeek-V3 has it. `load_le` are choices of the whole batch.
    """
    load_le = load_le.astype(bias_le.dtype)
    return bias_le + rate * jnp.sign(jnp.mean(load_le, axis=-1, keepdims=True) - load_le)
