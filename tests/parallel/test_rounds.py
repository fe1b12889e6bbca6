"""A sum over rounds: that the first is kept, and the others are computed again, is nothing that a caller sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxsep.parallel.rounds import in_rounds


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_the_sum_and_its_gradient(rounds):
    rng = np.random.default_rng(0)
    x, w, plan, g = rng.normal(size=(3, 4)), {"a": rng.normal(size=(4,))}, np.arange(1, 7.0), rng.normal(size=(3, 4))

    def one(number, operands, plan):
        x, w = operands
        return jnp.sin(x * plan[number]) * w["a"]

    with jax.enable_x64(True):
        y, pull = jax.vjp(jax.jit(lambda x, w: in_rounds(one, jnp.int32(rounds), (x, w), plan)), x, w)
        expected, pull_expected = jax.vjp(lambda x, w: sum(one(n, (x, w), plan) for n in range(rounds)), x, w)
        np.testing.assert_allclose(y, expected, rtol=1e-14)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), pull(g), pull_expected(g))
