"""Exact causal attention by blocks of queries over the keys before them, for devices without a fused kernel.

Only one block's scores exist at a time, and keys that a block cannot see are not computed. The backward pass computes
the scores again from the saved log-sum-exp (FlashAttention-2, Dao 2023, algorithm 2), in float32 or wider.

A row is a key/value head of a sequence. Queries are [..., g, s, q], g heads of each row, keys and values [..., s, q].
Segments [..., s] number documents and may lack the dimension of heads; None: attend across documents.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# At most MOST_BLOCKS blocks of queries (each is compiled), of LEAST_QUERIES or more.
LEAST_QUERIES, MOST_BLOCKS = 64, 16
# Scores of a block, of all rows that a CPU takes at a time: 1 MB of float32, which stays in the cores' own caches from
# the product that makes them to the one that uses them.
CACHED_SCORES = 2**18


def blocked_attention(q_bshq, k_bskq, v_bskq, segments_bs, in_turns: bool) -> jax.Array:
    """[b, s, h, q] of all, k key/value heads, and segments [b, s] or None -> [b, s, h, q].

    `in_turns`: a few rows after the other, for CPUs; GPUs take all at once.
    """
    b, s, h, q = q_bshq.shape
    kv = k_bskq.shape[2]
    # Heads first, so that every product is a batch of plain matrix products.
    q_bkgsq = (q_bshq * q**-0.5).swapaxes(1, 2).reshape(b, kv, h // kv, s, q)
    k_bksq, v_bksq = k_bskq.swapaxes(1, 2), v_bskq.swapaxes(1, 2)
    if in_turns:
        of_rows = (x.reshape(b * kv, *x.shape[2:]) for x in (q_bkgsq, k_bksq, v_bksq))
        segments_rs = None if segments_bs is None else jnp.repeat(segments_bs, kv, axis=0)
        y = _attention(True, *of_rows, segments_rs)
    else:
        y = _attention(False, q_bkgsq, k_bksq, v_bksq, segments_bs)
    return y.reshape(b, h, s, q).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(in_turns: bool, q, k, v, segments):
    """Attention of scaled queries."""
    return _fwd(in_turns, q, k, v, segments)[0]


def _fwd(in_turns, q, k, v, segments):
    y, lses = _turns(in_turns, _forward, q, k, v, segments)
    return y, (q, k, v, segments, y, lses)


def _bwd(in_turns, kept, g):
    return *_turns(in_turns, functools.partial(_backward, in_turns), *kept, g), None


_attention.defvjp(_fwd, _bwd)


def _turns(in_turns: bool, function, q, *others):
    """`function` of all rows, or of as many after the other as `CACHED_SCORES` allows."""
    if not in_turns:
        return function(q, *others)
    rows, group, length, _ = q.shape
    at_once = max(1, CACHED_SCORES // (group * _block(length) * length))
    if at_once >= rows:
        return function(q, *others)
    return lax.map(lambda row: function(*row), (q, *others), batch_size=at_once)


def _block(s: int) -> int:
    return max(LEAST_QUERIES, -(-s // MOST_BLOCKS))


def _blocks(s: int) -> list[tuple[int, int]]:
    size = _block(s)
    return [(start, min(start + size, s)) for start in range(0, s, size)]


def _scores(q, k, segments, start: int):
    """Masked scores [..., g, i, j] of queries from `start` on over keys 0 to j."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("...giq,...jq->...gij", q, k, preferred_element_type=wide)
    i, j = scores.shape[-2:]
    visible = start + jnp.arange(i)[:, None] >= jnp.arange(j)
    if segments is not None:
        same = segments[..., start : start + i, None] == segments[..., None, :j]
        visible = jnp.expand_dims(visible & same, range(same.ndim - 2, scores.ndim - 2))
    return jnp.where(visible, scores, jnp.finfo(wide).min)


def _forward(q, k, v, segments):
    """Results like `q`, and the log-sum-exp [..., g, i, 1] of each block."""
    outputs, lses = [], []
    for start, stop in _blocks(q.shape[-2]):
        scores = _scores(q[..., start:stop, :], k[..., :stop, :], segments, start)
        top = jnp.max(scores, axis=-1, keepdims=True)
        p = jnp.exp(scores - top)
        norm = jnp.sum(p, axis=-1, keepdims=True)
        y = jnp.einsum("...gij,...jq->...giq", p.astype(v.dtype), v[..., :stop, :], preferred_element_type=p.dtype)
        outputs.append((y / norm).astype(q.dtype))
        lses.append(top + jnp.log(norm))
    return jnp.concatenate(outputs, axis=-2), lses


def _backward(in_turns, q, k, v, segments, y, lses, g):
    wide = lses[0].dtype
    row = jnp.sum(g.astype(wide) * y.astype(wide), axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros_like(k, wide), jnp.zeros_like(v, wide)

    def of_keys(weights, queries):
        """[..., g, i, j] and [..., g, i, q] -> [..., j, q]."""
        if in_turns:
            # On CPUs the narrow operand is the one to turn: the product takes half as long as with `weights` turned.
            # Widened first, as XLA's CPU backend does not run such a product of bfloat16 operands.
            sums = jnp.einsum("...giq,...gij->...qj", queries.astype(wide), weights.astype(wide))
            return sums.swapaxes(-1, -2)
        return jnp.einsum("...gij,...giq->...jq", weights, queries, preferred_element_type=wide)

    for (start, stop), lse in zip(_blocks(q.shape[-2]), lses, strict=True):
        q_i, g_i, row_i = (x[..., start:stop, :] for x in (q, g, row))
        k_j, v_j = k[..., :stop, :], v[..., :stop, :]
        p = jnp.exp(_scores(q_i, k_j, segments, start) - lse)
        dp = jnp.einsum("...giq,...jq->...gij", g_i, v_j, preferred_element_type=wide)
        ds = (p * (dp - row_i)).astype(q.dtype)
        dq.append(jnp.einsum("...gij,...jq->...giq", ds, k_j))
        dk = dk.at[..., :stop, :].add(of_keys(ds, q_i))
        dv = dv.at[..., :stop, :].add(of_keys(p.astype(g.dtype), g_i))
    return jnp.concatenate(dq, axis=-2), dk.astype(k.dtype), dv.astype(v.dtype)
