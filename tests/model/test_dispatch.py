"""The index arithmetic of the dispatch, each function against its definition."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxsep.model.dispatch import _regroup, _sort, capacity_of, room_of


@pytest.mark.parametrize("factor", ["1", "1.1", "1.25", "0.7", "2.0", "0.01"])
def test_capacity_is_the_exact_ceiling(factor):
    for tokens in (1, 10, 32, 128, 1000, 2048):
        for top_k, experts in [(1, 1), (2, 16), (3, 7), (8, 64)]:
            exact = math.ceil(Fraction(tokens * top_k, experts) * Fraction(factor))
            assert capacity_of(tokens, top_k, experts, float(factor)) == min(exact, tokens)


def test_a_room_is_the_exact_ceiling_and_at_most_what_there_can_be():
    assert room_of(10, 2, 4, 4, 1.1) == 6  # 5.5
    assert room_of(10, 2, 4, 4, 1.2) == 6  # in floats a little more than 6
    assert room_of(10, 2, 4, 4, 100) == 20
    assert room_of(10, 2, 1, 16, 100) == 10, "a token chooses an expert once"
    assert room_of(1, 1, 1, 16, 0.1) == 1


def test_sort_keeps_the_order_within_an_expert():
    ids = np.random.default_rng(0).integers(5, size=(3, 40)).astype(np.int32)
    ids[ids == 2] = 0  # an expert that nobody chose
    order, rank, count = _sort(jnp.asarray(ids), 5)
    for g in range(3):
        assert order[g].tolist() == sorted(range(40), key=lambda i, g=g: (ids[g, i], i))
        assert rank[g][order[g]].tolist() == list(range(40))
        assert count[g].tolist() == [(ids[g] == e).sum() for e in range(5)]


@pytest.mark.parametrize(("peers", "experts"), [(1, 3), (4, 1), (3, 4)])
def test_regroup_moves_every_run(peers, experts):
    """Rows labelled (expert, peer, place) come out in that order, and go back."""
    rng, room = np.random.default_rng(0), 6
    rows = peers * room
    regroup = jax.jit(lambda *runs: _regroup(*runs, rows))
    for _ in range(50):
        count = np.zeros((peers, experts), np.int32)
        for p in range(peers):  # what a peer sent: at most its room, sometimes all or nothing of it
            count[p] = rng.multinomial(rng.choice([0, room, rng.integers(room)]), rng.dirichlet([0.3] * experts))
        before = [None] * rows
        for p in range(peers):
            sent = [(e, p, i) for e in range(experts) for i in range(count[p, e])]
            before[p * room : p * room + len(sent)] = sent
        after = sorted(label for label in before if label is not None)

        start_pe = np.cumsum(count, axis=1) - count + np.arange(peers)[:, None] * room
        to_ep = (np.cumsum(count.T.ravel()) - count.T.ravel()).reshape(experts, peers)
        source, target = jax.device_get(regroup(start_pe, to_ep.T, count))
        assert [before[i] for i in source[: len(after)]] == after
        assert (source[len(after) :] == rows).all()
        assert target.tolist() == [rows if label is None else after.index(label) for label in before]
