"""The Mixture-of-Experts layer: router, dispatch, experts, weighted sum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxsep.config import ModelConfig
from maxsep.model import dispatch
from maxsep.model.experts import Experts
from maxsep.model.mlp import MLP
from maxsep.model.parameters import Parameters, use
from maxsep.model.router import Router, Statistics
from maxsep.model.tokens import Tokens
from maxsep.parallel import collectives


class MoEStats(NamedTuple):
    """What one layer reports, over all devices and the tokens of one micro-batch, without padding."""

    load_balancing: jax.Array  # 1 when balanced; unscaled
    router_z: jax.Array  # unscaled
    load_e: jax.Array  # int32, choices of each expert
    scored_e: jax.Array | None  # int32, those that the scores alone would have made; None: there is no bias, the same
    dropped: jax.Array  # int32, choices without a place
    rounds: jax.Array  # int32, of the exchange between devices: this device's own


class MoE(nnx.Module):
    """A router, its experts, and an MLP that every token goes to beside them (shared experts)."""

    def __init__(self, parameters: Parameters, model: ModelConfig):
        self.router = Router(parameters, model)
        self.experts = Experts(parameters, model)
        if model.shared_experts:
            self.shared = MLP(parameters.sized(m=model.shared_experts * model.d_ff), model)
        if model.shared_gate:
            self.shared_gate_d = parameters.normal("d", model.d_model**-0.5)
        self.layout, self.model = parameters.layout, model

    def train(self, x_bsd: jax.Array, tokens: Tokens, dropout_key: jax.Array | None, scored_e: jax.Array | None):
        """[b, s, D] -> [b, s, D] and `MoEStats`.

        `dropout_key` makes masks by the tokens' numbers; no key, no dropout. `scored_e`: as in `MoEStats`, of the whole
        batch, for a loss over it; None: the loss is over these tokens.
        """
        layout, model = self.layout, self.model
        x_td = x_bsd.reshape(-1, x_bsd.shape[-1])
        with jax.named_scope("router"):
            routing = self.router.topk(x_td)
            real_t1 = tokens.real_bs.reshape(-1, 1)
            # Padding goes to no expert.
            ids_tn, scored_tn = (
                jnp.where(real_t1, ids, model.experts) for ids in (routing.ids_tn, routing.statistics.scored_tn)
            )
            load_e = self._load(ids_tn)
            here_e = self._load(scored_tn) if model.router_bias_rate else None
            of_losses_e = next(of_e for of_e in (scored_e, here_e, load_e) if of_e is not None)
            balancing, z = self._losses(routing.statistics, scored_tn, of_losses_e, tokens)
        with jax.named_scope("dispatch"):
            # Devices that split the experts' hidden size take the tokens of all of them: each has a part of every sum.
            together = layout.axes("f")
            number_bs = layout.join(tokens.number_bs, together)

            def joined(own_t):
                x_bs = layout.join(own_t.reshape(*tokens.number_bs.shape, *own_t.shape[1:]), together)
                return x_bs.reshape(-1, *own_t.shape[1:])

            x_td, ids_tn, weights_tn = (joined(own_t) for own_t in (x_td, ids_tn, routing.weights_tn))
            axes = layout.axes("e")
            to = x_td, ids_tn, weights_tn, self.experts, model.experts, axes
            dropped, rounds = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)
            if model.capacity_factor is None:
                y_tnd, rounds = dispatch.dropless(*to, model.exchange_factor)
            else:
                y_tnd, dropped = dispatch.with_capacity(*to, model.capacity_factor, model.capacity_group)
            if dropout_key is not None:
                y_tnd *= _dropout_mask(
                    dropout_key, number_bs.ravel(), y_tnd.shape[1:], model.expert_dropout, y_tnd.dtype
                )
            y_td = jnp.sum(y_tnd, axis=1)
            y_bsd = layout.part(y_td.reshape(*number_bs.shape, -1), together)
        apart, along = layout.token_axes, layout.in_stage
        stats = MoEStats(
            layout.total(balancing, apart, along),
            layout.total(z, apart, along),
            load_e,
            here_e,
            layout.total(dropped, tuple(axis for axis in apart if axis not in together), along),
            rounds,
        )
        return self._with_shared(y_bsd, x_bsd), stats

    def _load(self, ids_tn: jax.Array) -> jax.Array:
        """How often each expert is there, over all devices."""
        load_e = jnp.sum(ids_tn[..., None] == jnp.arange(self.model.experts), axis=(0, 1), dtype=jnp.int32)
        return self.layout.total(load_e, self.layout.token_axes, self.layout.in_stage)

    def _losses(
        self, statistics: Statistics, scored_tn: jax.Array, scored_e: jax.Array, tokens: Tokens
    ) -> tuple[jax.Array, jax.Array]:
        """This device's share of the load-balancing loss and of the z-loss, unscaled.

        Switch Transformer (Fedus et al. 2021), equation 4: experts × Σ share of choices × mean probability, 1 when
        balanced; over each sequence by itself it is DeepSeek-V3's, equations 17 to 20. The z-loss is ST-MoE's (Zoph et
        al. 2022), equation 5.
        """
        model, wide = self.model, statistics.probability_te.dtype
        real_bs = tokens.real_bs
        z = jnp.sum(jnp.where(real_bs.ravel(), statistics.z_t, 0)) / tokens.count
        probability_te = jnp.where(real_bs.reshape(-1, 1), statistics.probability_te, 0)
        if model.balance_over != "sequence":
            share_e = scored_e.astype(wide) / (tokens.count * model.top_k)
            mean_e = jnp.sum(probability_te, axis=0) / tokens.count
            return model.experts * jnp.dot(share_e, mean_e), z
        by_sequence = scored_tn.reshape(*real_bs.shape, -1)[..., None] == jnp.arange(model.experts)
        scored_be = jnp.sum(by_sequence, axis=(1, 2), dtype=jnp.int32)
        # The sequence's parts lie on the devices that split it.
        scored_be = collectives.total(scored_be, self.layout.axes("s"))
        length_b1 = jnp.maximum(tokens.length_b, 1)[:, None].astype(wide)
        share_be = scored_be.astype(wide) / (length_b1 * model.top_k)
        mean_be = jnp.sum(probability_te.reshape(*real_bs.shape, -1), axis=1) / length_b1
        return model.experts * jnp.sum(share_be * mean_be) / tokens.sequences, z

    def _with_shared(self, y_bsd: jax.Array, x_bsd: jax.Array) -> jax.Array:
        """With what the shared experts make of the same tokens."""
        if not self.model.shared_experts:
            return y_bsd
        with jax.named_scope("dense"):
            shared_bsd = self.shared(x_bsd)
            if self.model.shared_gate:
                gate_bs = jnp.einsum("bsd,d->bs", x_bsd, use(self.shared_gate_d, x_bsd.dtype))
                shared_bsd *= jax.nn.sigmoid(gate_bs)[..., None]
            return y_bsd + shared_bsd

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
            y_bsd = layout.part(y_td.reshape(*joined[0].shape[:2], -1), axes)
        return self._with_shared(y_bsd, x_bsd)


def _dropout_mask(key: jax.Array, token_t: jax.Array, shape: tuple[int, ...], rate: float, dtype) -> jax.Array:
    """Inverted dropout [T, N, D]: a function of the key and the token's global number, whatever device holds it."""
    keep = jax.vmap(lambda token: jax.random.bernoulli(jax.random.fold_in(key, token), 1 - rate, shape))(token_t)
    return keep.astype(dtype) / (1 - rate)
