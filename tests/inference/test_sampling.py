"""What is drawn: the right tokens, as often as they are likely, whatever else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxsep.inference.sampling import Sampling, sample

P = np.array([0.4, 0.05, 0.3, 0.15, 0.1])
DRAWS = 4000


def drawn(sampling, p=P, draws=DRAWS, first=0):
    scores_bv = jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (draws, 1))
    number_b = jnp.arange(first, first + draws)
    return np.asarray(jax.jit(sample)(scores_bv, sampling, number_b, jnp.full(draws, 3)))


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [0]),
        ({"top_p": 0.39}, [0]),
        ({"top_p": 0.41}, [0, 2]),
        ({"top_p": 0.8}, [0, 2, 3]),
        ({"top_p": 0.8, "top_k": 2}, [0, 2]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.0}, [0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(how, kept):
    expected = np.zeros(5)
    expected[kept] = P[kept] ** (1 / (how.get("temperature", 1.0) or 1))
    expected /= expected.sum()
    share = np.bincount(drawn(Sampling.of(**({"temperature": 1.0, "seed": 5} | how))), minlength=5) / DRAWS
    # Six standard deviations of a share: 4000 draws, 5 tokens.
    assert np.abs(share - expected).max() <= 6 * 0.5 / DRAWS**0.5
    assert set(np.flatnonzero(share)) <= set(kept)


def test_a_draw_depends_on_seed_number_and_position_alone():
    whole = drawn(Sampling.of(1.0, seed=1))
    assert (drawn(Sampling.of(1.0, seed=1), draws=7, first=100) == whole[100:107]).all()
    assert (drawn(Sampling.of(1.0, seed=2)) != whole).any()


def test_of_equal_scores_the_lower_id_is_taken():
    assert (drawn(Sampling.of(0.0), p=[0.1, 0.3, 0.3, 0.3], draws=2) == 1).all()
