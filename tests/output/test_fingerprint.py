"""The number that stands for an array's bits: the formula, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from states import mesh_of

from maxsep.output.fingerprint import PRIME, fingerprints


def oracle(x: np.ndarray) -> int:
    """The sum as the docstring has it, in Python's integers."""
    word = np.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    words = np.ascontiguousarray(x).reshape(-1).view(word).tolist()
    return sum(w * (2 * PRIME * i + 1) for i, w in enumerate(words)) % 2**32


def of(x: np.ndarray, mesh, *spec) -> int:
    with jax.enable_x64(True):
        bits, infinite = fingerprints({"x": jax.device_put(x, NamedSharding(mesh, P(*spec)))})
    assert infinite == []
    return bits["x"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int32", "int8", "bool", "float16"])
def test_is_the_formula_on_every_mesh(dtype):
    x = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, (16, 3, 8)).astype(jnp.dtype(dtype))
    for mesh, spec in [
        (mesh_of(1, 1), ()),
        (mesh_of(4, 4), (("attention", "expert"),)),
        (mesh_of(4, 2), ("attention", None, "expert")),
        (mesh_of(2, 8), (None, None, ("expert",))),
    ]:
        assert of(x, mesh, *spec) == oracle(x), (mesh, spec)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (24, 5), (3, 16), (2, 1, 1, 9)])
def test_of_any_shape(shape):
    x = np.asarray(np.random.default_rng(1).standard_normal(shape), np.float32)
    assert of(x, mesh_of(1, 1)) == oracle(x)


@given(place=st.integers(0, 47), bit=st.integers(0, 31))
def test_any_flipped_bit_changes_it(place, bit):
    x = np.arange(48, dtype=np.uint32).reshape(16, 3)
    other = x.copy()
    other.reshape(-1)[place] ^= np.uint32(1 << bit)
    assert of(x, mesh_of(4, 4), "attention") != of(other, mesh_of(4, 4), "attention")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_not_finite_is_named(wrong, dtype):
    x = np.zeros((16, 8), dtype)
    x[13, 2] = wrong
    sharding = NamedSharding(mesh_of(4, 4), P(("attention", "expert")))
    whole, broken = (jax.device_put(a, sharding) for a in (np.zeros((16, 8), dtype), x))
    assert fingerprints({"a": whole, "b": broken})[1] == ["b"]
