"""Records in batches, through Grain: a global shuffle by index, and reading ahead in a background thread.

A batch is a function of (seed, position) alone. Hosts and threads only decide who reads which of its rows.
"""

import functools
import sys
from collections.abc import Callable

import grain
import numpy as np

from maxsep.data.records import PAD, Records

AHEAD = 4  # batches read ahead


def train_batches(records: Records, batch_size: int, seed: int, position: int, rows: np.ndarray):
    """Batches without end, each epoch in an order of its own.

    Args:
        records: the training split.
        batch_size: rows of a global batch.
        seed: of the order.
        position: records that all hosts together have consumed before; the epoch is `position // len(records)`.
        rows: int [n], the rows of every global batch that this host needs.

    Returns: an iterator of int32 [n, sequence_length + 1], padded with -1. Its `close()` stops the reading ahead.
    """
    count = len(records)
    source = grain.MapDataset.source(records)

    @functools.lru_cache(2)  # a batch may hold the end of an epoch and the start of the next
    def order(epoch: int) -> grain.MapDataset:
        # A seed of its own, not seed + epoch: that would be the order of another run's epoch.
        return source.shuffle(seed=int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))

    def read(batch: int) -> np.ndarray:
        numbers = (position + batch * batch_size + int(row) for row in rows)
        return _stack(records, [order(number // count)[number % count] for number in numbers])

    return _read_ahead(read, sys.maxsize)


def eval_batches(records: Records, batch_size: int, rows: np.ndarray):
    """Every record once, in order; the last batch is filled up with rows of -1.

    Returns: an iterator of int32 [len(rows), sequence_length + 1]. Its `close()` stops the reading ahead.
    """
    count = len(records)
    nothing = np.full(records.sequence_length + 1, PAD, np.int32)

    def read(batch: int) -> np.ndarray:
        numbers = (batch * batch_size + int(row) for row in rows)
        return _stack(records, [records[number] if number < count else nothing for number in numbers])

    return _read_ahead(read, -(-count // batch_size))


def _stack(records: Records, batch: list[np.ndarray]) -> np.ndarray:
    return np.stack(batch) if batch else np.zeros((0, records.sequence_length + 1), np.int32)


def _read_ahead(read: Callable[[int], np.ndarray], batches: int):
    # One thread: with more, they wait for each other's Python.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    return iter(grain.MapDataset.range(batches).map(read).to_iter_dataset(options))
