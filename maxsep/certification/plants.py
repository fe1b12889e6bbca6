"""Faults that are planted from outside, to show that a certificate sees them: what devices add up, send and order.

Each patches names of the package, and none is in the package itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxsep.config.layouts import AXES
from maxsep.model import transformer
from maxsep.model.layers import Embedding
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


class Plant(NamedTuple):
    fault: Callable[[Patch], None]
    run: str  # the layout and mesh on which it is planted
    quantity: str  # of the certificate, in which it must be seen

    @property
    def name(self) -> str:
        return self.fault.__name__


PLANTS = (
    Plant(expert_gradients_not_summed, "ma:2x2", "gradients"),
    Plant(attention_gradients_summed_over_heads_too, "ma:2x2", "gradients"),
    Plant(norm_counts_copies, "ma:2x2", "grad norm"),
    Plant(statistic_counted_on_every_device, "tp:2x2", "dropped choices"),
    Plant(idle_ticks_counted, "pp:2x1x2", "choices per expert"),
    Plant(stage_forgotten_in_the_order, "pp:2x1x2", "loss"),
    Plant(layers_of_a_stage_reversed, "pp:2x1x2", "loss"),
    Plant(micro_batch_sent_twice, "pp:2x1x2", "loss"),
    Plant(embedding_gradients_summed_over_stages_twice, "pp:2x1x2", "gradients"),
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
