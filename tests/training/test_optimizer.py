"""The learning rate's schedule, and AdamW against its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import config

from maxsep.training.optimizer import adamw, schedule, warnings


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
    found = rates(20, learning_rate=1.0, warmup_steps=0, decay_steps=11, final_fraction=0.0)
    assert found[5] == pytest.approx(0.5, rel=1e-5)
    assert found[10:] == pytest.approx([0.0] * 15, abs=1e-7)


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_without_a_warm_up_the_first_step_has_the_peak(steps, warmup_steps):
    found = rates(steps, learning_rate=1.0, warmup_steps=warmup_steps)
    assert found[0] == 1 and found[steps] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "steps, warmup_steps, decay_steps, done, said",
    [
        (300, 100, 300, 0, []),
        (100, 100, 100, 0, []),  # the last step has the peak
        (
            50,
            100,
            100,
            0,
            ["does not reach its peak: optimizer.warmup_steps is 100, train.steps 50; the last step has 50%"],
        ),
        (200, 100, 100, 50, ["falls from its peak to 10% of it after step 100: optimizer.decay_steps, set when"]),
        (200, 100, 100, 150, []),  # it is there
        (1, 0, 1, 0, []),
        (9, 0, 1, 1, ["falls from its peak to 10% of it after step 1"]),
        (9, 2, 4, 4, []),
    ],
)
def test_what_is_told_of_the_rate(steps, warmup_steps, decay_steps, done, said):
    c = config(train={"steps": steps}, optimizer={"warmup_steps": warmup_steps, "decay_steps": decay_steps})
    told = warnings(c, done)
    assert len(told) == len(said) and all(words in line for words, line in zip(said, told, strict=True))
    falls = [n for n in range(max(1, done), steps) if rate_of(c, n + 1) < 0.2 * rate_of(c, n)]
    assert bool(falls) == any("falls" in line for line in told)
    assert (max(rate_of(c, n) for n in range(1, steps + 1)) < c.optimizer.learning_rate) == ("not reach" in str(told))


def rate_of(c, step: int) -> float:
    """Of the step of this number."""
    return round(float(schedule(c)(step - 1)), 9)


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
