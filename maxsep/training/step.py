"""The train step and the evaluation step, as functions of state and batch.

Loss and gradients are computed in one `jax.shard_map` over the whole mesh: in it, every device works on its own part
and `collectives` say what is sent. Gradients stay on their device over all micro-batches and are reduced once.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from maxsep.config import Config
from maxsep.config.layouts import AXES
from maxsep.config.segments import moe_layers
from maxsep.kernels import Sizes
from maxsep.model.attention import attention_kernel
from maxsep.model.dispatch import room_of
from maxsep.model.parameters import casts, declared, drawn, new_buffers, with_casts
from maxsep.model.router import balanced
from maxsep.model.transformer import Transformer, Whole
from maxsep.parallel import collectives
from maxsep.parallel.layout import Layout
from maxsep.parallel.sharding import added, replicating_axes, split_further
from maxsep.training.optimizer import adamw, schedule


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "buffers", "optimizer", "skipped"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    step: jax.Array  # int32, finished optimizer steps, skipped ones included
    params: dict[str, Any]
    buffers: dict[str, Any]  # what is not trained by gradients, in the same places of the model
    optimizer: Any  # Optax state
    skipped: jax.Array  # int32 [2], non-finite steps that changed nothing: in all, and in a row until now

    @property
    def variables(self) -> dict[str, dict]:
        """The model's: what it computes with."""
        return {"params": self.params, "buffers": self.buffers}


class Evaluation(NamedTuple):
    cross_entropy: jax.Array  # sum over targets, nats
    targets: jax.Array  # int32, number of targets


class Program:
    """The functions of one config, to be called and compiled under its mesh (`jax.set_mesh`).

    `end_of_text` and `ids` are the tokenizer's: the id, for runs whose attention stays within documents, and how many
    ids have a probability, by default all of the vocabulary. `platform` is that of the devices to compile for, this
    machine's by default.
    """

    def __init__(
        self,
        config: Config,
        end_of_text: int | None = None,
        ids: int | None = None,
        platform: str | None = None,
    ):
        self.ids = ids or config.model.vocab_size
        self.config = config
        self.layout = Layout.of(config, platform)
        self.kernel = attention_kernel(config.model, self.layout.platform)
        self.optimizer = adamw(config)
        self.learning_rate = schedule(config)
        self.end_of_text = None if config.data.cross_document_attention else end_of_text
        self.model = Transformer(config.model, self.layout, self.ids)
        self.graph, abstract = nnx.graphdef(self.model), declared(self.model)
        self.specs = jax.tree.map(lambda x: x.sharding.spec, abstract)
        self.zero_specs = jax.tree.map(self._zero_spec, abstract["params"])

    def grouped(self) -> Sizes:
        """Of the products of dropless experts, of a micro-batch, on one device."""
        train, model, layout = self.config.train, self.config.model, self.layout
        tokens = train.batch_size // train.accumulation * self.config.data.sequence_length
        apart = [axis for axis in layout.token_axes if axis not in layout.axes("f")]  # the others' tokens are joined
        own = tokens // math.prod(layout.sizes[AXES.index(axis)] for axis in apart)
        peers, rows = layout.ways("e"), own * model.top_k
        local, places = model.experts // peers, rows
        if peers > 1:
            places = peers * room_of(own, model.top_k, local, peers, model.exchange_factor)
        return Sizes(places, min(1.0, rows / places), local, model.d_model, model.d_ff // layout.ways("f"))

    def _zero_spec(self, x) -> P:
        if not self.config.optimizer.zero1:
            return x.sharding.spec
        return split_further(x.sharding.spec, x.shape, self.layout.sizes, AXES, reversed(range(x.ndim)))[0]

    @property
    def looks_ahead(self) -> bool:
        """Whether a forward pass comes before the first gradient: a loss has to know loads of all micro-batches."""
        model = self.config.model
        over_more = model.balance_over == "batch" and self.config.train.accumulation > 1
        return over_more and model.load_balancing_coefficient > 0

    @property
    def batch_spec(self) -> P:
        """Sharding of a batch of records [accumulation, micro-batch, S + 1]."""
        return P(None, self.layout.axes("b"), None)

    def init(self) -> TrainState:
        """A new state. Jit it: its arrays are then born in their shardings."""
        return self.fresh(**drawn(self.model, self.config.train.seed))

    def fresh(self, params: dict, buffers: dict) -> TrainState:
        """Step 0 with these; without buffers the model's are new."""
        optimizer = self.optimizer.init(jax.tree.map(jax.reshard, params, self.zero_specs))
        step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((2,), jnp.int32)
        return TrainState(step, params, buffers or new_buffers(self.model), optimizer, skipped)

    def train_step(self, state: TrainState, batch_abt: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step on records [accumulation, micro-batch, S + 1], int32, -1 for padding."""
        gradients, metrics = self._gradients(state.variables, batch_abt, state.step)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            finite = jnp.isfinite(norm) & jnp.isfinite(metrics["total_loss"])
            # Once too many in a row were not finite, nothing changes any more: the host learns of it a step late.
            halted = state.skipped[1] >= self.config.train.nonfinite_limit
            changes = finite & ~halted
            old = jax.tree.map(jax.reshard, state.params, self.zero_specs)
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, old)
            new = optax.apply_updates(old, updates)
            keep = functools.partial(jax.tree.map, lambda a, b: jnp.where(changes, a, b))
            params = jax.tree.map(jax.reshard, keep(new, old), self.specs["params"])
            optimizer, buffers = keep(optimizer, state.optimizer), state.buffers
            if rate := self.config.model.router_bias_rate:
                buffers = keep(jax.tree.map(functools.partial(_balanced, metrics["load_le"], rate), buffers), buffers)
                (bias_le,) = jax.tree.leaves(buffers)
                metrics["router_bias_norm_l"] = jax.reshard(jnp.linalg.norm(bias_le, axis=-1), P())
            skipped = jnp.where(finite, state.skipped * jnp.array([1, 0], jnp.int32), state.skipped + 1)
            skipped = jnp.where(halted, state.skipped, skipped)
            step = state.step + ~halted
        metrics |= {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(self.learning_rate(state.step - state.skipped[0])),  # counts updates
            "skipped": skipped,
        }
        return TrainState(step, params, buffers, optimizer, skipped), metrics

    def _gradients(self, variables, batch_abt, step):
        accumulation, model = self.config.train.accumulation, self.config.model

        def on_device(variables, batch_abt, step):
            targets = collectives.total(jnp.sum(batch_abt[..., 1:] >= 0), self.layout.axes("b"))
            key = None
            if model.expert_dropout:
                key = jax.random.fold_in(jax.random.key(self.config.train.seed), step)

            def loss(params, batch_abt, first_row):
                transformer = nnx.merge(self.graph, with_casts(params, cast), buffers)
                cross_entropy, stats = transformer.losses(batch_abt, first_row, key, self.end_of_text, whole)
                layers = self.layout.axes("l")
                balancing = collectives.total(jnp.sum(stats.load_balancing), layers)
                z = collectives.total(jnp.sum(stats.router_z), layers)
                auxiliary = model.load_balancing_coefficient * balancing + model.router_z_coefficient * z
                total = cross_entropy / targets + auxiliary / accumulation
                means = {
                    "loss": cross_entropy / targets,
                    "total_loss": total,
                    "load_balancing_loss": balancing / (accumulation * moe_layers(model)),
                    "router_z_loss": z / (accumulation * moe_layers(model)),
                    "exchange_rounds": collectives.vary(jnp.sum(stats.rounds)),
                    "load_le": stats.load_e,
                    "dropped_l": stats.dropped,
                }
                return total, means

            # Parameters that devices share get a gradient on each; they are added up below, once a step.
            own, buffers = collectives.vary((variables["params"], variables["buffers"]))
            cast = casts(own, model.dtype)  # once a step

            rows = batch_abt.shape[1] * self.layout.ways("b")  # of a micro-batch
            # A pipeline has all micro-batches under way; else each has a gradient of its own.
            count = 1 if self.layout.ways("l") > 1 else accumulation
            batch_nabt = batch_abt.reshape(count, -1, *batch_abt.shape[1:])
            whole = None
            if self.looks_ahead:
                transformer = nnx.merge(self.graph, with_casts(own, cast), buffers)

                def scored(numbered):
                    number, batch_abt = numbered
                    return transformer.scored(batch_abt, number * rows, key, self.end_of_text)

                with jax.named_scope("ahead"):
                    scored_le = jnp.sum(lax.map(scored, (jnp.arange(count), batch_nabt)), axis=0)
                    tokens = collectives.total(jnp.sum(batch_abt[..., :-1] >= 0), self.layout.axes("b"))
                whole = Whole(scored_le / accumulation, jnp.maximum(tokens, 1) / accumulation)
            sums = jax.tree.map(jax.new_ref, collectives.zeros(jax.tree.map(jax.typeof, own)))

            def add(metrics, numbered):
                # A layer's gradient is added to the sums when it is made, in place: there is never a second one of all.
                number, batch_abt = numbered
                total, pull, more = jax.vjp(lambda own: loss(own, batch_abt, number * rows), own, has_aux=True)
                pull.with_refs(sums)(jnp.ones_like(total))
                return jax.tree.map(jnp.add, metrics, more), None

            nothing = collectives.zeros(jax.eval_shape(loss, own, batch_nabt[0], 0)[1])
            metrics, _ = lax.scan(add, nothing, (jnp.arange(count), batch_nabt))
            # Each device's own until here: the layers exchange nothing for it.
            layers = accumulation * moe_layers(model) / self.layout.ways("l")
            rounds = collectives.total(metrics["exchange_rounds"], AXES)
            metrics["exchange_rounds"] = rounds / (layers * collectives.size(AXES))
            gradients = jax.tree.map(jax.freeze, sums)
            with jax.named_scope("gradient_reduction"):
                return jax.tree.map(self._reduce, gradients, self.specs["params"], self.zero_specs), metrics

        means = dict.fromkeys(("loss", "total_loss", "load_balancing_loss", "router_z_loss", "exchange_rounds"), P())
        layers = {"load_le": self.layout.spec("l-"), "dropped_l": self.layout.spec("l")}
        gradients, metrics = jax.shard_map(
            on_device,
            in_specs=(self.specs, self.batch_spec, P()),
            out_specs=(self.zero_specs, means | layers),
        )(variables, batch_abt, step)
        return gradients, metrics | {name: jax.reshard(metrics[name], P()) for name in layers}

    def _reduce(self, gradient: jax.Array, spec: P, zero: P) -> jax.Array:
        """Sum over the devices that hold the same parameter; with ZeRO-1 each keeps its part of the sum."""
        if split := added(spec, zero):
            gradient = collectives.reduce_scatter(gradient, *split)
        return collectives.total(gradient, replicating_axes(zero))

    def eval_step(self, variables: dict[str, dict], batch_abt: jax.Array) -> Evaluation:
        """Cross-entropy of records [micro-batches, batch, S + 1], as many as stages; no dropout."""

        def on_device(variables, batch_abt):
            transformer = nnx.merge(self.graph, *collectives.vary((variables["params"], variables["buffers"])))
            cross_entropy, _ = transformer.losses(batch_abt, 0, None, self.end_of_text)
            targets = jnp.sum(batch_abt[..., 1:] >= 0, dtype=jnp.int32)
            return Evaluation(cross_entropy, collectives.total(targets, self.layout.axes("b")))

        return jax.shard_map(on_device, in_specs=(self.specs, self.batch_spec), out_specs=P())(variables, batch_abt)


def _balanced(load_le: jax.Array, rate: float, bias_le: jax.Array) -> jax.Array:
    return balanced(bias_le, jax.reshard(load_le, jax.typeof(bias_le).sharding.spec), rate)
