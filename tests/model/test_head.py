"""The fused head and loss against log-softmax, with rows split and not, in one block and in many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from small import config

from maxsep.model import head
from maxsep.parallel import collectives
from maxsep.parallel.mesh import make_mesh

T, D, V = 24, 8, 128


@pytest.mark.parametrize("block", [32, 4, 16])  # one, some, the last one filled up
@pytest.mark.parametrize("vocab_size", [V, 100, 3])
@pytest.mark.parametrize("ways", [1, 4])
def test_equals_log_softmax(ways, vocab_size, block):
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(T, D)), rng.normal(size=(V, D))
    targets = rng.integers(vocab_size, size=T).astype(np.int32)
    targets[[0, 5, T - 1]] = -1
    axes = ("attention",)

    def on_device(x, table, targets):
        def loss(x, table):
            return head.cross_entropy(x, table, targets, vocab_size, axes, block) * 3

        own = collectives.vary((x, table))
        value, (dx, dtable) = jax.value_and_grad(loss, (0, 1))(*own)
        without = head.cross_entropy(*own, targets, vocab_size, axes, block)  # as evaluation computes it
        value, dx, without = lax.psum((value, dx, without), ("stage", "attention", "expert"))
        return value, dx, lax.psum(dtable, ("stage", "expert")), without

    def dense(x, table):
        log_p = jax.nn.log_softmax(x @ table[:vocab_size].T, axis=-1)
        return -3 * jnp.sum(jnp.where(targets >= 0, log_p[jnp.arange(T), np.maximum(targets, 0)], 0))

    with jax.enable_x64(True):
        slope = jax.jit(jax.value_and_grad(dense, (0, 1)))
        expected, (dx, dtable) = jax.device_get(slope(x, table))
        with jax.set_mesh(make_mesh(config((ways, 1)))):
            shards = P(axes, None)
            function = jax.shard_map(on_device, in_specs=(P(), shards, P()), out_specs=(P(), P(), shards, P()))
            placed = x, jax.device_put(table, shards), targets
            value, got_x, got_table, without = jax.device_get(jax.jit(function)(*placed))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(without, expected / 3, rtol=1e-12)
    np.testing.assert_allclose(got_x, dx, atol=1e-12)
    np.testing.assert_allclose(got_table, dtable, atol=1e-12)
    assert not got_table[vocab_size:].any()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_micro_batches_are_summed(micro_batches):
    """The sum's gradient is made with it: that of the plain sum."""
    rng = np.random.default_rng(0)
    weights = {"scale": rng.normal(size=D), "table": rng.normal(size=(V, D))}
    x_absd = rng.normal(size=(micro_batches, 2, 4, D))
    targets_abs = rng.integers(-1, V, size=x_absd.shape[:3]).astype(np.int32)

    def nll(weights, x_bsd, targets_bs):
        x_td = (x_bsd * weights["scale"]).reshape(-1, D)
        return head.cross_entropy(x_td, weights["table"], targets_bs.ravel(), V, ("attention",), block=T)

    def on_device(weights, x_absd):
        def summed(weights, x_absd):
            return 2 * head.summed(nll, weights, x_absd, targets_abs)

        def plain(weights, x_absd):
            return 2 * sum(nll(weights, *at) for at in zip(x_absd, targets_abs, strict=True))

        own = collectives.vary((weights, x_absd))
        found = [jax.value_and_grad(f, (0, 1))(*own) for f in (summed, plain)]
        without = head.summed(nll, *own, targets_abs)  # as evaluation computes it
        return lax.psum((*found, without), collectives.AXES)

    with jax.enable_x64(True), jax.set_mesh(make_mesh(config())):
        function = jax.jit(jax.shard_map(on_device, in_specs=(P(), P()), out_specs=P()))
        found, expected, without = jax.device_get(function(weights, x_absd))
    np.testing.assert_allclose(without, expected[0] / 2, rtol=1e-12)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_padded_ids_have_no_probability():
    with jax.set_mesh(make_mesh(config())):
        function = jax.shard_map(
            lambda x, table: head.logits(x, table, 100, ("attention",)), in_specs=(P(), P()), out_specs=P()
        )
        scores = jax.jit(function)(jnp.ones((2, D), jnp.bfloat16), jnp.ones((V, D), jnp.bfloat16))
    assert scores.dtype == jnp.float32
    assert (scores[:, 100:] == -np.inf).all()
    assert np.isfinite(scores[:, :100]).all()
