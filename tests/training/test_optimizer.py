"""The learning rate's schedule, and AdamW against its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import config

from maxsep.training.optimizer import adamw, schedule


def rates(steps: int = 20, **fields) -> list[float]:
    rate = schedule(config(train={"steps": steps}, optimizer=fields))
    return [float(rate(step)) for step in range(steps + 5)]


def test_schedule():
    """Rises in `warmup_steps` equal steps from above 0, then half a cosine to the final rate, where it stays."""
    found = rates(20, learning_rate=0.5, warmup_steps=5, final_fraction=0.1)
    assert found[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], rel=1e-6)
    cosine = [0.05 + 0.45 * (1 + np.cos(np.pi * (step - 4) / 15)) / 2 for step in range(5, 20)]
    assert found[5:20] == pytest.approx(cosine, rel=1e-5)
    assert found[19:] == pytest.approx([0.05] * 6, rel=1e-5)


def test_schedule_ends_where_it_is_told():
    found = rates(20, learning_rate=1.0, warmup_steps=0, decay_steps=10, final_fraction=0.0)
    assert 0.9 < found[0] < 1
    assert found[4] == pytest.approx(0.5, rel=1e-5)
    assert found[9:] == pytest.approx([0.0] * 16, abs=1e-7)


@pytest.mark.parametrize("steps", [1, 3])
def test_runs_shorter_than_the_warm_up(steps):
    assert rates(steps, learning_rate=1.0, warmup_steps=5)[:steps] == pytest.approx([0.2, 0.4, 0.6][:steps], rel=1e-6)


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_adamw(clip_norm):
    """Three updates by hand: clip by the global norm, moments with their biases, decay on all but norms' scales."""
    c = config(optimizer={"learning_rate": 0.1, "warmup_steps": 2, "weight_decay": 0.3, "clip_norm": clip_norm})
    rng = np.random.default_rng(0)
    params = {"a": {"w_lde": rng.normal(size=(2, 3)), "scale": rng.normal(size=4)}}
    with jax.enable_x64(True):
        optimizer, state = adamw(c), None
        p, found = params, jax.tree.map(jnp.asarray, params)
        state = optimizer.init(found)
        m = jax.tree.map(np.zeros_like, params)
        v = jax.tree.map(np.zeros_like, params)
        b1, b2, eps = c.optimizer.b1, c.optimizer.b2, c.optimizer.eps
        for step in range(3):
            g = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, g), state, found)
            found = jax.tree.map(jnp.add, found, updates)

            norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
            g = jax.tree.map(lambda x, norm=norm: x * min(1, clip_norm / norm), g)
            m = jax.tree.map(lambda m, x: b1 * m + (1 - b1) * x, m, g)
            v = jax.tree.map(lambda v, x: b2 * v + (1 - b2) * x**2, v, g)
            rate, n = float(schedule(c)(step)), step + 1
            decay = {"a": {"w_lde": 0.3, "scale": 0.0}}
            p = jax.tree.map(
                lambda p, m, v, d, rate=rate, n=n: (
                    p - rate * (m / (1 - b1**n) / (np.sqrt(v / (1 - b2**n)) + eps) + d * p)
                ),
                p,
                m,
                v,
                decay,
            )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, p)
