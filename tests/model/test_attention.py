"""Blocked attention and rotary positions against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from maxsep.model import blocked_attention
from maxsep.model.attention import fused_attention
from maxsep.model.blocked_attention import LEAST_QUERIES
from maxsep.model.layers import rotate


def naive(q_bshq, k_bskq, v_bskq, segments_bs):
    return jax.vmap(oracle.attend)(q_bshq, k_bskq, v_bskq, segments_bs)


def blocked(in_turns: bool):
    return functools.partial(blocked_attention.blocked_attention, in_turns=in_turns)


@pytest.mark.parametrize(
    ("length", "kv_heads", "documents"),
    [
        (1, 4, False),
        (2 * LEAST_QUERIES, 1, False),
        (2 * LEAST_QUERIES + 7, 2, True),
        (3 * LEAST_QUERIES + 40, 4, True),  # blocks have grown
    ],
)
def test_blocked_attention_is_exact(monkeypatch, length, kv_heads, documents):
    monkeypatch.setattr(blocked_attention, "MOST_BLOCKS", 3)
    monkeypatch.setattr(blocked_attention, "CACHED_SCORES", 3 * 4 // kv_heads * LEAST_QUERIES * 2 * length)  # of 3 rows
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        q, out = (jnp.asarray(rng.normal(size=(2, length, 4, 6))) for _ in range(2))
        k, v = (jnp.asarray(rng.normal(size=(2, length, kv_heads, 6))) for _ in range(2))
        segments = jnp.zeros((2, length), jnp.int32)
        if documents:
            segments = jnp.cumsum(jnp.asarray(rng.random((2, length)) < 0.1), axis=1)

        def loss(attend, segments, q, k, v):
            y = attend(q, k, v, segments)
            return jnp.sum(y * out), y

        grad = [
            jax.jit(jax.value_and_grad(functools.partial(loss, f, s), (0, 1, 2), has_aux=True))(q, k, v)
            for f, s in [
                *((blocked(turns), segments if documents else None) for turns in (False, True)),
                (naive, segments),
            ]
        ]
        for of_one in grad[:2]:
            for got, expected in zip(jax.tree.leaves(of_one), jax.tree.leaves(grad[2]), strict=True):
                np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("in_turns", [False, True])
def test_bfloat16_keeps_its_type_and_is_near(in_turns):
    """The result, and the gradients of its sum of squares."""
    rng = np.random.default_rng(2)
    inputs = [jnp.asarray(rng.normal(size=(1, 150, 4, 8)), jnp.bfloat16) for _ in range(3)]

    def found(attend, segments, inputs):
        y = attend(*inputs, segments)
        return jnp.sum(jnp.square(y), dtype=jnp.float32), y

    def both(attend, segments, inputs):
        graded = jax.value_and_grad(functools.partial(found, attend, segments), has_aux=True)
        (_, y), gradients = jax.jit(graded)(inputs)
        return [y, *gradients]

    got = both(blocked(in_turns), None, inputs)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    expected = both(naive, jnp.zeros((1, 150)), [x.astype(jnp.float32) for x in inputs])
    for x, exact in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), exact, atol=0.02 * np.abs(exact).max())


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's kernel needs an NVIDIA GPU")
def test_fused_attention_is_near():
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 256, 4, 64)), jnp.bfloat16) for _ in range(3))
    segments = jnp.asarray(np.arange(256) // 100)[None].repeat(2, axis=0)
    for one in (None, segments):
        y, expected = fused_attention(q, k, v, one), blocked(in_turns=False)(q, k, v, one)
        np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), atol=0.03)


def test_rotary_positions():
    """The rotation by complex numbers; scores depend on the distance alone."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, 9, 3, 8)))
        np.testing.assert_allclose(rotate(x, 100.0), jax.vmap(lambda one: oracle.rotary(one, 100.0))(x), atol=1e-13)
        q, k = (rotate(jnp.broadcast_to(jnp.asarray(rng.normal(size=8)), (1, 9, 1, 8)), 100.0)[0, :, 0] for _ in "qk")
        scores = q @ k.T
        np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-13)
        assert np.abs(scores[0, 0] - scores[0, 5]) > 0.1
    assert rotate(x.astype(jnp.bfloat16), 100.0).dtype == jnp.bfloat16
