"""The train step and the evaluation step as functions of state and batch.

What different programs compute is compared in float64: in float32 rounding may tip a choice between experts.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SEED, config, text

from maxsep.parallel.mesh import make_mesh
from maxsep.training.run import Run


@pytest.fixture(scope="module")
def stepped():
    """A run on 2x2, the optimizer's state split, with its compiled step, and batches."""
    c = config((2, 2), optimizer={"zero1": True}, model={"dtype": "float64", "layers": 1})
    with jax.enable_x64(True), jax.set_mesh(make_mesh(c)):
        run = Run(c)
        step = run.compile_train_step()
        batches = [jax.device_put(batch, run.batch_sharding) for batch in text(c, 2)]
        yield run, step, batches


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def broken(state):
    """The state with one parameter that is not a number, on which no step can be finite."""
    final_norm = jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.params["final_norm"])
    return replace(state, params=state.params | {"final_norm": final_norm})


def test_a_non_finite_step_changes_nothing_and_is_counted(stepped):
    run, step, batches = stepped
    state, metrics = step(run.new_state(), batches[0])
    assert metrics["skipped"].tolist() == [0, 0]
    good = jax.device_get(state.params)
    state = broken(state)
    for count in (1, 2):
        before = jax.device_get(state)
        state, metrics = step(state, batches[1])
        after = jax.device_get(state)
        assert not np.isfinite(metrics["total_loss"])
        assert metrics["skipped"].tolist() == after.skipped.tolist() == [count, count]
        assert after.step == 1 + count
        unbroken = [[x for x in jax.tree.leaves(s.params) if np.isfinite(x).all()] for s in (before, after)]
        assert len(unbroken[0]) == len(jax.tree.leaves(before.params)) - 1
        assert same(*unbroken)
        assert same(before.optimizer, after.optimizer)
    whole = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), good, run.abstract_state.params)
    state, metrics = step(replace(state, params=whole), batches[1])
    assert metrics["skipped"].tolist() == [2, 0]
    assert not same(good, jax.device_get(state.params))


def test_shapes_types_and_shardings_of_the_state_stay(stepped):
    run, step, batches = stepped
    state = run.new_state()
    for held in (state, step(state, batches[0])[0]):
        for leaf, like in zip(jax.tree.leaves(held), jax.tree.leaves(run.abstract_state), strict=True):
            assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def test_evaluation_is_the_training_loss_before_the_update(stepped):
    run, step, batches = stepped
    state = run.new_state()
    evaluation = run.eval_step(state.variables, batches[0])
    _, metrics = step(state, batches[0])
    assert float(evaluation.targets) == run.tokens
    assert float(evaluation.cross_entropy) / run.tokens == pytest.approx(float(metrics["loss"]), rel=1e-12)


def test_padding_is_not_evaluated(stepped):
    run, _, batches = stepped
    model = run.new_state().variables
    short = np.asarray(batches[0]).copy()
    short[:, -2:] = -1  # rows that fill up the last batch
    short[:, 0, 9:] = -1  # a record that is partly filled
    evaluation = run.eval_step(model, jax.device_put(short, run.batch_sharding))
    assert float(evaluation.targets) == (short[..., 1:] >= 0).sum()
    whole = run.eval_step(model, batches[0])
    assert 0 < float(evaluation.cross_entropy) < float(whole.cross_entropy)
    nothing = run.eval_step(model, jax.device_put(np.full_like(short, -1), run.batch_sharding))
    assert float(nothing.cross_entropy) == float(nothing.targets) == 0


@pytest.mark.exhaustive  # the fast suite compares accumulated gradients with the dense model's, in test_equality.py
def test_gradients_are_added_over_micro_batches():
    """Without the auxiliary losses, which are over micro-batches, accumulation changes nothing."""
    sums = []
    batch, model = text(config(), 1).reshape(16, -1), None
    for accumulation in (1, 4):
        off = {"load_balancing_coefficient": 0.0, "router_z_coefficient": 0.0, "dtype": "float64", "layers": 1}
        c = config((2, 2), train={"accumulation": accumulation}, model=off)
        with jax.enable_x64(True), jax.set_mesh(make_mesh(c)):
            run = Run(c)
            model = model or run.new_state().variables
            placed = jax.device_put(batch.reshape(run.batch_shape), run.batch_sharding)
            gradients, metrics = jax.device_get(jax.jit(run.program._gradients)(model, placed, np.int32(0)))
            sums.append((gradients, metrics["loss"], metrics["total_loss"]))
            assert metrics["load_le"].sum(axis=1).tolist() == [16 * 32 * 2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max()), *sums)


@pytest.mark.parametrize("mesh", [(4, 4), pytest.param((1, 16), marks=pytest.mark.slow)])
def test_initial_weights_follow_the_seed_and_not_the_mesh(mesh):
    """Equal to the last bits: on another shape of an array XLA's CPU code may round the inverse error function otherwise."""  # noqa: E501

    def drawn(c):
        with jax.set_mesh(make_mesh(c)):
            return jax.device_get(Run(c).new_state().params)

    one, other_seed = config(), config(train={"seed": SEED + 1})
    here, there, other = drawn(one), drawn(config(mesh)), drawn(other_seed)
    jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, b, maxulp=4), here, there)
    matrices = [(a, b) for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(other), strict=True) if a.std()]
    assert len(matrices) >= 8 and all((a != b).mean() > 0.99 for a, b in matrices)
