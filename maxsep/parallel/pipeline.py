"""The pipeline: micro-batches go through stages, each of which has a part of the layers.

GPipe's schedule (Huang et al. 2019): at tick t, stage p works on micro-batch t - p, and hands what it makes to the next
stage. Automatic differentiation makes the backward pass, the same ticks from last to first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from maxsep.parallel import collectives
from maxsep.parallel.collectives import Axes


def bubble(stages: int, micro_batches: int) -> float:
    """Share of the ticks in which a stage has nothing to do: (P - 1) / (A + P - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def pipelined(first: Callable, work: Callable, micro_batches: int, stage_axes: Axes) -> tuple[jax.Array, object]:
    """What leaves the last stage [micro-batch, ...], on every device, and each stage's own figures, summed.

    To be called inside `jax.shard_map`.

    Args:
        first: the input of the first stage, as a function of the micro-batch's number. It is called on all stages at
            once, which may share its work.
        work: a stage's layers: input and number -> output, of the input's shape, and figures. It may communicate within
            its stage alone: a stage that has nothing to do does not call it.
        micro_batches: how many.
        stage_axes: mesh axes along which the stages lie.
    """
    stages, stage = collectives.size(stage_axes), collectives.index(stage_axes)
    if stages == micro_batches == 1:
        x, figures = work(first(0), 0)
        return x[None], figures

    nothing = collectives.zeros(jax.eval_shape(first, 0))
    no_figures = collectives.zeros(jax.eval_shape(work, nothing, 0)[1])

    def tick(came, t):
        number, busy = at_tick(t, stage, micro_batches)
        new = lax.cond(t < micro_batches, first, lambda _: nothing, t)
        x = jnp.where(stage == 0, new, came)
        x, figures = lax.cond(busy, work, lambda x, _: (x, no_figures), x, number)
        with jax.named_scope("pipeline"):
            return collectives.shift(x, stage_axes), (x, figures)

    _, (x_t, figures_t) = lax.scan(tick, nothing, jnp.arange(micro_batches + stages - 1))
    figures = jax.tree.map(lambda figure: jnp.sum(figure, axis=0, dtype=figure.dtype), figures_t)
    with jax.named_scope("head"):
        out = jnp.where(stage == stages - 1, x_t[stages - 1 :], 0)
        return collectives.vary(collectives.total(out, stage_axes)), figures


def in_turn(work: Callable, x: jax.Array, carry, stage_axes: Axes) -> tuple[jax.Array, object]:
    """One input through all stages: what leaves the last one, on every device, and each stage's own `carry`.

    To be called inside `jax.shard_map`. While one stage works the others wait.

    Args:
        work: a stage's layers: x and carry -> x and carry of the same shapes. It may communicate within its stage
            alone.
        x: the first stage's input.
        carry: a tree, of this stage.
        stage_axes: mesh axes along which the stages lie.
    """
    stages, stage = collectives.size(stage_axes), collectives.index(stage_axes)
    if stages == 1:
        return work(x, carry)
    x, carry = collectives.vary((x, carry))
    for turn in range(stages):
        x, carry = lax.cond(stage == turn, lambda *a: collectives.vary(work(*a)), lambda *a: a, x, carry)
        if turn < stages - 1:
            x = collectives.shift(x, stage_axes)
    return collectives.vary(collectives.total(jnp.where(stage == stages - 1, x, 0), stage_axes)), carry


def at_tick(t: jax.Array, stage: jax.Array, micro_batches: int) -> tuple[jax.Array, jax.Array]:
    """The micro-batch that a stage works on, and whether there is one."""
    number = t - stage
    return jnp.clip(number, 0, micro_batches - 1), (number >= 0) & (number < micro_batches)
