"""How fast memory is read: by all cores of this machine, or by one accelerator."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BYTES = 256 * 2**20  # far more than caches hold


def read(repeats: int = 5) -> float:
    """Bytes a second at best, of all devices' together."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return _of_cores(repeats)
    import jax.numpy as jnp

    array = jax.device_put(np.ones(BYTES // 4, np.float32), devices[0])
    total = jax.jit(jnp.sum)
    return len(devices) * BYTES / _fastest(lambda: total(array).block_until_ready(), repeats)


def _of_cores(repeats: int) -> float:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.split(np.ones(BYTES // 4 // cores * cores, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:
        return BYTES / _fastest(lambda: list(pool.map(lambda part: np.dot(part, part), parts)), repeats)


def _fastest(call, repeats: int) -> float:
    call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)
