"""A sum over rounds, of which there is usually one: what more there are is a loop whose length depends on the data.

A conditional with the worst case as its branch would reserve that case's memory, whether it runs or not.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

SCOPE = "further_rounds"  # `jax.named_scope` of what runs after the first, which programs and profiles show


def further(path: str) -> bool:
    """Whether what was traced in the scopes of `path` runs in further rounds alone."""
    return SCOPE in path


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_rounds(one: Callable, rounds: jax.Array, operands, plan) -> jax.Array:
    """The sum of one(number, operands, plan) over the numbers below `rounds`; differentiable by the operands.

    What the first round's backward pass needs is kept. Further rounds are computed again for theirs.

    Args:
        one: of a round's number, a tree of arrays, and a tree of arrays without a gradient.
        rounds: int32, 1 or more; the same on devices that exchange something in a round.
    """
    return _forward(one, rounds, operands, plan)[0]


def _forward(one, rounds, operands, plan):
    first, pull = jax.vjp(lambda operands: one(0, operands, plan), operands)
    y = _further(rounds, first, lambda number, sums: sums + one(number, operands, plan))
    return y, (pull, rounds, operands, plan)


def _backward(one, kept, g):
    pull, rounds, operands, plan = kept

    def add(number, sums):
        _, pull = jax.vjp(lambda operands: one(number, operands, plan), operands)
        return jax.tree.map(jnp.add, sums, pull(g))

    # From the first round's gradients, not from zeros: a loop that runs no time then copies nothing.
    return None, *_further(rounds, pull(g), add), None


in_rounds.defvjp(_forward, _backward)


@jax.named_scope(SCOPE)
def _further(rounds: jax.Array, first, add: Callable):
    """`first` with what all rounds but the first `add`."""

    def step(at):
        number, sums = at
        return number + 1, add(number, sums)

    return lax.while_loop(lambda at: at[0] < rounds, step, (jnp.ones((), rounds.dtype), first))[1]
