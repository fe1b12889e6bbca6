"""The Mixture-of-Experts layer: router, dispatch, experts, weighted sum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxsep.config import ModelConfig
from maxsep.model import dispatch
from maxsep.model.experts import Experts
from maxsep.model.parameters import Parameters
from maxsep.model.router import Router, Statistics
from maxsep.parallel import collectives


class MoEStats(NamedTuple):
    """What one layer reports, over all devices and the tokens of one micro-batch."""

    load_balancing: jax.Array  # 1 when balanced; unscaled
    router_z: jax.Array  # unscaled
    load_e: jax.Array  # int32, choices of each expert
    dropped: jax.Array  # int32, choices without a place
    rounds: jax.Array  # int32, of the exchange between devices: this device's own


class MoE(nnx.Module):
    """A router and its experts."""

    def __init__(self, parameters: Parameters, model: ModelConfig):
        self.router = Router(parameters, model)
        self.experts = Experts(parameters, model)
        self.layout, self.model = parameters.layout, model

    def train(self, x_bsd: jax.Array, token_bs: jax.Array, dropout_key: jax.Array | None):
        """[b, s, D] -> [b, s, D] and `MoEStats`.

        `token_bs` numbers this device's tokens in the global batch, for `dropout_key`'s masks; no key, no dropout.
        """
        layout, model = self.layout, self.model
        x_td = x_bsd.reshape(-1, x_bsd.shape[-1])
        with jax.named_scope("router"):
            routing = self.router.topk(x_td)
            load_balancing, router_z, load_e = self._losses(routing.statistics, x_td.shape[0])
        with jax.named_scope("dispatch"):
            # Devices that split the experts' hidden size take the tokens of all of them: each has a part of every sum.
            together = layout.axes("f")
            token_bs = layout.join(own_bs := token_bs, together)

            def joined(own_t):
                x_bs = layout.join(own_t.reshape(*own_bs.shape, *own_t.shape[1:]), together)
                return x_bs.reshape(-1, *own_t.shape[1:])

            x_td, ids_tn, weights_tn = (joined(own_t) for own_t in (x_td, routing.ids_tn, routing.weights_tn))
            axes = layout.axes("e")
            to = x_td, ids_tn, weights_tn, self.experts, model.experts, axes
            dropped, rounds = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)
            if model.capacity_factor is None:
                y_tnd, rounds = dispatch.dropless(*to, model.exchange_factor)
            else:
                y_tnd, dropped = dispatch.with_capacity(*to, model.capacity_factor, model.capacity_group)
            if dropout_key is not None:
                y_tnd *= _dropout_mask(
                    dropout_key, token_bs.ravel(), y_tnd.shape[1:], model.expert_dropout, y_tnd.dtype
                )
            y_td = jnp.sum(y_tnd, axis=1)
            y_bsd = layout.part(y_td.reshape(*token_bs.shape, -1), together)
        apart, along = layout.token_axes, layout.in_stage
        stats = MoEStats(
            layout.total(load_balancing, apart, along),
            layout.total(router_z, apart, along),
            load_e,
            layout.total(dropped, tuple(axis for axis in apart if axis not in together), along),
            rounds,
        )
        return y_bsd, stats

    def _losses(self, statistics: Statistics, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """This device's share of both losses, unscaled, and the load of each expert over all devices."""
        model, wide = self.model, statistics.probability_e.dtype
        load_e = self.layout.total(statistics.load_e, self.layout.token_axes, self.layout.in_stage)
        tokens *= collectives.size(self.layout.token_axes)
        # Switch Transformer (Fedus et al. 2021), equation 4, with the choices of all tokens of the micro-batch:
        # experts × Σ share of choices × mean probability, 1 when balanced.
        share_e = load_e.astype(wide) / (tokens * model.top_k)
        balancing = model.experts * jnp.dot(share_e, statistics.probability_e / tokens)
        return balancing, statistics.z / tokens, load_e  # the z-loss is ST-MoE's (Zoph et al. 2022), equation 5

    def infer(self, x_bsd: jax.Array, real_bs: jax.Array, layer: int) -> jax.Array:
        """[b, s, D] -> [b, s, D]: no token is dropped, and `real_bs` says which are none of our padding.

        The experts' weights are those of all layers of the segment, of which only the chosen experts' of `layer` are
        read. Devices that share experts bring their tokens together; each computes what its experts make of them.
        """
        layout = self.layout
        x_td = x_bsd.reshape(-1, x_bsd.shape[-1])
        with jax.named_scope("router"):
            routing = self.router.topk(x_td)
            ids_tn = jnp.where(real_bs.reshape(-1, 1), routing.ids_tn, self.model.experts)  # to no expert
        axes = layout.axes("e") + layout.axes("f")
        with jax.named_scope("dispatch"):
            shape = x_bsd.shape[:2]
            joined = [layout.join(of_t.reshape(*shape, -1), axes) for of_t in (x_td, ids_tn, routing.weights_tn)]
            x_td, ids_tn, weights_tn = (of_bs.reshape(-1, of_bs.shape[-1]) for of_bs in joined)
            y_tnd = dispatch.at_home(x_td, ids_tn, self.experts, layout.axes("e"), layer)
            y_td = jnp.einsum("tn,tnd->td", weights_tn.astype(y_tnd.dtype), y_tnd)
            return layout.part(y_td.reshape(*joined[0].shape[:2], -1), axes)


def _dropout_mask(key: jax.Array, token_t: jax.Array, shape: tuple[int, ...], rate: float, dtype) -> jax.Array:
    """Inverted dropout [T, N, D]: a function of the key and the token's global number, whatever device holds it."""
    keep = jax.vmap(lambda token: jax.random.bernoulli(jax.random.fold_in(key, token), 1 - rate, shape))(token_t)
    return keep.astype(dtype) / (1 - rate)
