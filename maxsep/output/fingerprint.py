"""A number for the bits of each array, computed where the array lies: the same on every mesh, another for other bits.

It finds accidents, it is no signature: a changed bit always changes it, any other damage all but once in 2**32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

PRIME = 2654435761  # odd; near 2**32 over the golden ratio, so that neighbours' weights have little in common


def fingerprints(arrays: dict[str, jax.Array]) -> tuple[dict[str, int], list[str]]:
    """The arrays' fingerprints, and the names of those that hold what is not finite, in all processes alike.

    An array's is the sum, modulo 2**32, of its 32-bit words (smaller types: its elements' bits; 64-bit types: two words
    an element), each times an odd weight that only its index in the whole array decides. A flipped bit changes it
    by a power of two below 2**32 times an odd number, which is never zero.

    Args:
        arrays: global arrays of any dtype of 1, 2, 4 or 8 bytes, with NamedShardings.
    """
    found = {}
    for name, x in arrays.items():
        found[name] = _fingerprint(x.sharding)(x)
        if x.sharding.mesh.devices.flat[0].platform == "cpu":
            # One after the other: simulated devices run several of these at once, each another one first, and hang.
            found[name] = jax.device_get(found[name])
    found = jax.device_get(found)
    return {name: int(pair[0]) for name, pair in found.items()}, [name for name, pair in found.items() if pair[1]]


@functools.cache
def _fingerprint(sharding: NamedSharding):
    """A compiled function a sharding, not one for all arrays: parameters and their moments share theirs."""
    axes_d = [() if part is None else part if isinstance(part, tuple) else (part,) for part in sharding.spec]
    axes = tuple(axis for split in axes_d for axis in split)

    def on_device(x):
        sizes_d = [math.prod(sharding.mesh.shape[axis] for axis in split) for split in axes_d]
        sizes_d += [1] * (x.ndim - len(sizes_d))
        index, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for d in reversed(range(x.ndim)):
            first = lax.axis_index(axes_d[d]) * x.shape[d] if sizes_d[d] > 1 else 0
            along = lax.broadcasted_iota(jnp.uint32, x.shape, d) + jnp.uint32(first)
            index = index + along * jnp.uint32(stride % 2**32)
            stride *= x.shape[d] * sizes_d[d]
        words, index = _words(x, index)
        pair = jnp.stack([_sum(words * (index * jnp.uint32(2 * PRIME % 2**32) + jnp.uint32(1))), _infinite(x)])
        return lax.psum(pair, axes) if axes else pair

    return jax.jit(jax.shard_map(on_device, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=P()))


def _words(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bits of `x` as uint32, and the place of each, given that of its element."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32), index
    if x.dtype.itemsize == 8:
        words = lax.bitcast_convert_type(x, jnp.uint32)  # a dimension of two more
        return words, index[..., None] * jnp.uint32(2) + lax.broadcasted_iota(jnp.uint32, words.shape, x.ndim)
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32), index


def _sum(words: jax.Array) -> jax.Array:
    """Modulo 2**32. First the eighths of a dimension on each other: a CPU adds so four times as fast as at once."""
    parts, d = max(((math.gcd(size, 8), d) for d, size in enumerate(words.shape)), default=(1, 0))
    if parts > 1:
        eighths = jnp.split(words, parts, axis=d)
        words = lax.optimization_barrier(functools.reduce(jnp.add, eighths))
    return jnp.sum(words, dtype=jnp.uint32)


def _infinite(x: jax.Array) -> jax.Array:
    """Whether an entry is not finite: 0 or 1."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros((), jnp.uint32)
    # Infinity times 0 is NaN, which is not 0 either. On a CPU four times as fast as isfinite.
    return (jnp.sum(x * jnp.zeros((), x.dtype)) != 0).astype(jnp.uint32)
