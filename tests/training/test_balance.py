"""Balance means the same on every mesh and under every accumulation, and padding has no part in it."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from programs import gradients, initial, leaves_differ, parameters, placed, run, wide
from small import config, named, text

from maxsep.config import MeshConfig

EXACT = 1e-12
BIASED = {"dtype": "float64", "router_score": "sigmoid", "router_bias_rate": 0.01, "balance_over": "batch"}


@functools.cache
def trained(mesh: tuple[int, int], accumulation: int, layout: str = "ma"):
    """The losses, and the biases at the end, of twenty steps from the weights of one device."""
    alone = config(model=BIASED, train={"batch_size": 32})
    train = replace(alone.train, accumulation=accumulation)
    c = replace(alone, mesh=MeshConfig(*(1, *mesh)[-3:]), layout=layout, train=train)
    r, new, losses = run(c), initial(alone), []
    with wide(c), jax.set_mesh(r.mesh):
        state, step = placed(new, r.abstract_state), r.train_step()
        for batch in text(alone, 20):
            batch = batch.reshape(r.batch_shape)
            state, metrics = step(state, jax.device_put(batch, r.batch_sharding))
            losses.append((float(metrics["loss"]), float(metrics["total_loss"]), float(metrics["load_balancing_loss"])))
        (bias_le,) = jax.tree.leaves(jax.device_get(state.buffers))
    return np.array(losses), bias_le


@pytest.mark.parametrize(
    ("mesh", "accumulation", "layout"),
    [
        pytest.param((1, 1), 4, "ma", marks=pytest.mark.exhaustive),
        pytest.param((4, 4), 2, "ma", marks=pytest.mark.slow),
        pytest.param((2, 1, 8), 4, "pp", marks=pytest.mark.slow),
        pytest.param((2, 8), 1, "ma_folded", marks=pytest.mark.exhaustive),
        pytest.param((8, 2), 4, "tp", marks=pytest.mark.exhaustive),
        pytest.param((4, 4), 2, "zero", marks=pytest.mark.exhaustive),
    ],
    ids=lambda value: named(value) if isinstance(value, tuple) else str(value),
)
def test_twenty_steps_and_their_biases_are_those_of_one_device_and_one_micro_batch(mesh, accumulation, layout):
    expected, biases = trained((1, 1), 1)
    found, found_biases = trained(mesh, accumulation, layout)
    assert expected[0, 0] - expected[-1, 0] > 0.5, "it learns"
    assert np.abs(biases).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=EXACT)
    assert (found_biases == biases).all()


def test_a_bias_moves_towards_balance_and_not_in_a_step_that_is_skipped():
    c = config(model=BIASED | {"layers": 1})
    r, batch = run(c), text(c, 1)[0]
    with wide(c), jax.set_mesh(r.mesh):
        step = r.train_step()
        state, metrics = step(r.new_state(), jax.device_put(batch, r.batch_sharding))
        (bias_le,) = jax.tree.leaves(jax.device_get(state.buffers))
        load_le = np.asarray(metrics["load_le"])
        assert bias_le.dtype == np.float32
        sign_le = np.sign(load_le.mean(axis=1, keepdims=True) - load_le)
        np.testing.assert_array_equal(bias_le, np.float32(0.01) * sign_le)
        assert len(set(np.sign(bias_le).ravel())) >= 2
        np.testing.assert_allclose(metrics["router_bias_norm_l"], np.linalg.norm(bias_le, axis=1), rtol=1e-6)
        broken = jax.tree.map(lambda x: x * np.nan, state.params)
        skipped, _ = step(replace(state, params=broken), jax.device_put(batch, r.batch_sharding))
        assert (jax.tree.leaves(jax.device_get(skipped.buffers))[0] == bias_le).all()


@pytest.mark.parametrize("over", ["micro_batch", pytest.param("sequence", marks=pytest.mark.slow)])
@pytest.mark.parametrize("capacity", [None, pytest.param(1.0, marks=pytest.mark.slow)])
def test_padding_has_no_part_in_a_step(over, capacity):
    """Sixteen records of which five are padding, and the eleven others alone; also with records that end early."""
    fields = {"dtype": "float64", "layers": 1, "balance_over": over, "capacity_factor": capacity}
    fields["capacity_group"] = None if capacity is None else 4
    whole, few = config(model=fields), config(model=fields, train={"batch_size": 11})
    params, batch = parameters(whole), text(whole, 1)[0]
    batch[:, 3, 20:] = -1
    padded = batch.copy()
    padded[:, 11:] = -1
    found, figures = gradients(whole, params, padded)
    expected, expected_figures = gradients(few, params, batch[:, :11])
    for name in ("loss", "total_loss", "load_balancing_loss", "router_z_loss", "load_le", "dropped_l"):
        np.testing.assert_allclose(figures[name], expected_figures[name], rtol=EXACT, err_msg=name)
    assert figures["load_le"].sum() == 2 * (11 * 32 - 12)
    differ = leaves_differ(found, expected)
    assert max(differ.values()) <= EXACT, differ
