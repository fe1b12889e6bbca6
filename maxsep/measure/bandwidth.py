"""How fast memory is read: by all cores of this machine, or by its accelerators."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from maxsep.measure.timing import timed
from maxsep.parallel.start import cores

BYTES = 256 * 2**20  # far more than caches hold


def read(repeats: int = 5) -> float:
    """Bytes a second at best, of all devices together."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return _of_cores(cores(), repeats)
    import jax.numpy as jnp

    array = jax.device_put(np.ones(BYTES // 4, np.float32), devices[0])
    total = jax.jit(jnp.sum)
    return len(devices) * BYTES / _fastest(lambda: total(array).block_until_ready(), repeats)


def _of_cores(count: int, repeats: int) -> float:
    parts = np.split(np.ones(BYTES // 4 // count * count, np.float32), count)
    with ThreadPoolExecutor(count) as pool:
        return BYTES / _fastest(lambda: list(pool.map(lambda part: np.dot(part, part), parts)), repeats)


def _fastest(call: Callable[[], object], repeats: int) -> float:
    call()
    return min(timed(call, repeats)["seconds"])
