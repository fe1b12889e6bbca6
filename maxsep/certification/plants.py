"""Faults that are planted from outside, to show that a certificate sees them.

Each patches names of the package, and none is in the package itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxsep.config.layouts import AXES
from maxsep.model import attention, blocked_experts, moe, transformer
from maxsep.model.blocked_attention import blocked_attention
from maxsep.model.kv_cache import KeysValues
from maxsep.model.layers import Embedding
from maxsep.model.moe import MoE
from maxsep.model.tokens import Tokens
from maxsep.output.checkpoint import Checkpoints
from maxsep.parallel import collectives, pipeline
from maxsep.parallel.layout import Layout
from maxsep.parallel.sharding import replicating_axes
from maxsep.training import step
from maxsep.training.step import Program

Patch = Callable[[Any, str, Any], None]  # setattr, to be undone


def expert_gradients_not_summed(patch: Patch) -> None:
    """Devices that hold the same experts keep one device's gradient."""

    def reduce(self, gradient, spec, zero):
        if "expert" not in replicating_axes(spec):
            first = collectives.index(replicating_axes(spec)) == 0
            gradient = jnp.where(first, gradient, 0)
        return true_reduce(self, gradient, spec, zero)

    true_reduce = Program._reduce
    patch(Program, "_reduce", reduce)


def attention_gradients_summed_over_heads_too(patch: Patch) -> None:
    """Devices that hold other heads add up their gradients."""

    def reduce(self, gradient, spec, zero):
        gradient = true_reduce(self, gradient, spec, zero)
        of_heads = "attention" not in replicating_axes(spec) and gradient.ndim == 4
        return lax.psum(gradient, "attention") if of_heads else gradient

    true_reduce = Program._reduce
    patch(Program, "_reduce", reduce)


def norm_counts_copies(patch: Patch) -> None:
    """Every device adds up what it holds."""

    def norm(gradients):
        def square(leaf):
            sizes = jax.typeof(leaf).sharding.mesh.shape
            copies = np.prod([sizes[axis] for axis in replicating_axes(jax.typeof(leaf).sharding.spec)])
            return copies * jnp.sum(jnp.square(leaf))

        return jnp.sqrt(sum(square(leaf) for leaf in jax.tree.leaves(gradients)))

    patch(step.optax.tree, "norm", norm)


def statistic_counted_on_every_device(patch: Patch) -> None:
    """Devices that have the same tokens all count them."""
    patch(Layout, "total", lambda self, x, apart, along=AXES: lax.psum(collectives.vary(x), along))


def idle_ticks_counted(patch: Patch) -> None:
    """A stage works on whatever comes, also before the first micro-batch and after the last."""
    at_tick = pipeline.at_tick
    patch(pipeline, "at_tick", lambda *args: (at_tick(*args)[0], True))


def stage_forgotten_in_the_order(patch: Patch) -> None:
    """All stages take the micro-batch that the first one works on to be theirs."""
    at_tick = pipeline.at_tick
    patch(pipeline, "at_tick", lambda t, *others: (at_tick(t, 0, others[1])[0], at_tick(t, *others)[1]))


def layers_of_a_stage_reversed(patch: Patch) -> None:
    """The second stage runs its last layer first."""

    def scan(f, x, layers):
        blocks, *others = layers
        reverse = collectives.index(("stage",)) == 1
        return lax.scan(f, x, (jax.tree.map(lambda w: jnp.where(reverse, w[::-1], w), blocks), *others))

    patch(transformer, "lax", SimpleNamespace(scan=scan))


def micro_batch_sent_twice(patch: Patch) -> None:
    """The first is, and the last is not."""
    pipelined = transformer.pipelined

    def wrong(first, *others):
        return pipelined(lambda number: first(jnp.maximum(number - 1, 0)), *others)

    patch(transformer, "pipelined", wrong)


def embedding_gradients_summed_over_stages_twice(patch: Patch) -> None:
    """The table that all stages share gets its gradient once for each of them."""
    call = Embedding.__call__

    def wrong(self, tokens_bs, dtype):
        x_bsd, stages = call(self, tokens_bs, dtype), lax.axis_size("stage")
        return stages * x_bsd - lax.stop_gradient((stages - 1) * x_bsd)

    patch(Embedding, "__call__", wrong)


def auxiliary_loss_scaled_by_the_mesh(patch: Patch) -> None:
    """The load-balancing loss grows with the number of devices."""
    losses = MoE._losses

    def wrong(self, *arguments):
        balancing, z = losses(self, *arguments)
        return balancing * collectives.size(AXES), z

    patch(MoE, "_losses", wrong)


def bias_updated_per_device(patch: Patch) -> None:
    """Each device moves its own experts' biases towards their own mean load."""

    def wrong(load_le, rate, bias_le):
        devices = jax.sharding.get_abstract_mesh().shape["expert"]
        own_lde = load_le.reshape(load_le.shape[0], devices, -1).astype(bias_le.dtype)
        change_lde = rate * jnp.sign(jnp.mean(own_lde, axis=-1, keepdims=True) - own_lde)
        return bias_le + jax.reshard(change_lde.reshape(load_le.shape), jax.typeof(bias_le).sharding.spec)

    patch(step, "_balanced", wrong)


def padding_counted(patch: Patch) -> None:
    """Padding is routed and counted as text is."""

    def wrong(segments_bs, number_bs, real_bs, *others):
        return Tokens(segments_bs, number_bs, jnp.ones_like(real_bs), *others)

    patch(transformer, "Tokens", wrong)


def rows_swapped_in_the_exchange(patch: Patch) -> None:
    """Of what comes through the all-to-all, the first two rows have changed places."""
    exchange = collectives.exchange

    def wrong(x, axes, split, concat):
        y = exchange(x, axes, split, concat)
        return jnp.concatenate([y[1:2], y[:1], y[2:]])

    patch(collectives, "exchange", wrong)


def mask_shifted_by_a_device(patch: Patch) -> None:
    """The second device's queries see one key too many."""

    def wrong(q_bshq, k_bskq, v_bskq, *others, **options):
        second = collectives.index(("attention",)) == 1
        k_bskq, v_bskq = (jnp.where(second, jnp.roll(x, -1, axis=1), x) for x in (k_bskq, v_bskq))
        return blocked_attention(q_bshq, k_bskq, v_bskq, *others, **options)

    patch(attention, "blocked_attention", wrong)


def cache_of_another_device(patch: Patch) -> None:
    """Decoding reads the keys and values of the next device's sequences."""
    cached_attention = attention.cached_attention

    def wrong(q_b1hq, k_b1kq, v_b1kq, cache, *others):
        devices = lax.axis_size("expert")
        ring = [(i, (i + 1) % devices) for i in range(devices)]
        other = KeysValues(*(lax.ppermute(x, "expert", ring) for x in cache))
        return cached_attention(q_b1hq, k_b1kq, v_b1kq, other, *others)

    patch(attention, "cached_attention", wrong)


def kernel_leaves_its_last_block(patch: Patch) -> None:
    """The last block of an expert's rows is not computed."""

    def loop(first, end, body, carry):
        return lax.fori_loop(first, end - 1, body, carry)

    patch(blocked_experts, "lax", SimpleNamespace(**vars(lax) | {"fori_loop": loop}))


def gradients_cast_too_early(patch: Patch) -> None:
    """Gradients are added up over devices in bfloat16."""
    reduce = Program._reduce
    patch(Program, "_reduce", lambda self, g, *specs: reduce(self, g.astype(jnp.bfloat16), *specs).astype(g.dtype))


def moment_not_restored(patch: Patch) -> None:
    """The optimizer begins anew where a checkpoint is read."""
    restore = Checkpoints.restore

    def wrong(self, *arguments):
        found = restore(self, *arguments)
        optimizer = jax.tree.map(lambda x: x - x, found.state.optimizer)
        return found._replace(state=replace(found.state, optimizer=optimizer))

    patch(Checkpoints, "restore", wrong)


def dropout_by_local_index(patch: Patch) -> None:
    """Devices number their tokens from 0 and drop the same of each."""
    mask = moe._dropout_mask
    patch(moe, "_dropout_mask", lambda key, token_t, *others: mask(key, jnp.arange(token_t.size), *others))


def weight_not_gathered(patch: Patch) -> None:
    """A device takes its own part of a weight for all parts."""

    def wrong(w, cast, axes, dim):
        return jnp.concatenate([cast] * collectives.size(axes), axis=dim)

    patch(collectives, "gather_weight", wrong)


class Plant(NamedTuple):
    fault: Callable[[Patch], None]
    run: str  # the layout and mesh on which it is planted
    quantity: str  # of the certificate, in which it must be seen
    part: str = "layouts"  # of the certificate

    @property
    def name(self) -> str:
        return self.fault.__name__


PLANTS = (
    Plant(expert_gradients_not_summed, "ma:2x2", "gradients"),
    Plant(attention_gradients_summed_over_heads_too, "ma:2x2", "gradients"),
    Plant(gradients_cast_too_early, "ma:2x2", "gradients"),
    Plant(norm_counts_copies, "ma:2x2", "grad norm"),
    Plant(auxiliary_loss_scaled_by_the_mesh, "ma:2x2", "load balancing loss"),
    Plant(bias_updated_per_device, "ma:2x2", "state after one update"),
    Plant(padding_counted, "ma:2x2", "choices per expert"),
    Plant(dropout_by_local_index, "ma:2x2", "loss"),
    Plant(mask_shifted_by_a_device, "ma:2x2", "loss"),
    Plant(cache_of_another_device, "ma:2x2", "log-probabilities of decoding"),
    Plant(statistic_counted_on_every_device, "tp:2x2", "dropped choices"),
    Plant(weight_not_gathered, "zero:2x2", "loss"),
    Plant(idle_ticks_counted, "pp:2x1x2", "choices per expert"),
    Plant(stage_forgotten_in_the_order, "pp:2x1x2", "loss"),
    Plant(layers_of_a_stage_reversed, "pp:2x1x2", "loss"),
    Plant(micro_batch_sent_twice, "pp:2x1x2", "loss"),
    Plant(embedding_gradients_summed_over_stages_twice, "pp:2x1x2", "gradients"),
    Plant(moment_not_restored, "ma:2x2", "restored state", "moves"),
    Plant(rows_swapped_in_the_exchange, "ma:2x2", "exchange, expert", "collectives"),
    Plant(kernel_leaves_its_last_block, "ma:2x2", "experts (blocks), ragged", "kernels"),
)


@contextlib.contextmanager
def planted(plant: Plant) -> Iterator[None]:
    """While inside, what is traced has the fault."""
    before: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, value: Any) -> None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        plant.fault(patch)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
