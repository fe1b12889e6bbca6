"""From a host's records to a batch over the whole mesh: each host reads only the rows that its devices hold."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding


def host_rows(shape: tuple[int, int, int], sharding: NamedSharding) -> np.ndarray:
    """Which of a batch's rows this host needs, ascending; row i is [i // micro-batch, i % micro-batch].

    Args:
        shape: of the batch, [accumulation, micro-batch, S + 1].
        sharding: of the batch.
    """
    numbers = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    indices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([numbers[index[:2]].ravel() for index in indices]))


def to_mesh(batches: Iterator[np.ndarray], shape: tuple[int, int, int], sharding: NamedSharding) -> Iterator[jax.Array]:
    """Batches [rows of this host, S + 1] as global arrays [accumulation, micro-batch, S + 1]."""
    numbers = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    rows = host_rows(shape, sharding)
    for batch in batches:

        def part(index, batch=batch):
            wanted = numbers[index[:2]]
            return batch[np.searchsorted(rows, wanted.ravel())].reshape(*wanted.shape, -1)

        yield jax.make_array_from_callback(shape, sharding, part)
