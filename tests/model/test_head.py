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


@pytest.mark.parametrize("block", [8 * 2**20, 7 * V])
@pytest.mark.parametrize("vocab_size", [V, 100, 3])
@pytest.mark.parametrize("ways", [1, 4])
def test_equals_log_softmax(ways, vocab_size, block, monkeypatch):
    monkeypatch.setattr(head, "BLOCK_LOGITS", block)
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(T, D)), rng.normal(size=(V, D))
    targets = rng.integers(vocab_size, size=T).astype(np.int32)
    targets[[0, 5, T - 1]] = -1
    axes = ("attention",)

    def on_device(x, table, targets):
        def loss(x, table):
            return head.cross_entropy(x, table, targets, vocab_size, axes) * 3

        own = collectives.vary((x, table))
        value, (dx, dtable) = jax.value_and_grad(loss, (0, 1))(*own)
        without = head.cross_entropy(*own, targets, vocab_size, axes)  # as evaluation computes it
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


def test_padded_ids_have_no_probability():
    with jax.set_mesh(make_mesh(config())):
        function = jax.shard_map(
            lambda x, table: head.logits(x, table, 100, ("attention",)), in_specs=(P(), P()), out_specs=P()
        )
        scores = jax.jit(function)(jnp.ones((2, D), jnp.bfloat16), jnp.ones((V, D), jnp.bfloat16))
    assert scores.dtype == jnp.float32
    assert (scores[:, 100:] == -np.inf).all()
    assert np.isfinite(scores[:, :100]).all()
