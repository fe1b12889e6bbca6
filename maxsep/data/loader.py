"""Records in batches, through Grain: a global shuffle by index, and reading ahead in a background thread.

A batch is a function of (seed, position) alone. Hosts and threads only decide who reads which of its rows.
"""

import functools
import sys
from collections.abc import Callable

import grain
import numpy as np

from maxsep.data.mixture import Mixture
from maxsep.data.records import PAD, Records

AHEAD = 4  # batches read ahead


def train_batches(corpus: Mixture, batch_size: int, seed: int, position: int, rows: np.ndarray):
    """Batches without end. Each source is read in epochs, each in an order of its own.

    Args:
        corpus: whose training records are taken, of each source its share.
        batch_size: rows of a global batch.
        seed: of the order.
        position: records that all hosts together have consumed before.
        rows: int [n], the rows of every global batch that this host needs.

    Returns: an iterator of int32 [n, sequence_length + 1], padded with -1. Its `close()` stops the reading ahead.
    """
    sources = [
        _Epochs(one.train, (seed, *(name.encode() if corpus.named else ()))) for name, one in corpus.corpora.items()
    ]

    def record(number: int) -> np.ndarray:
        source, own = corpus.place(number)
        return sources[source][own]

    def read(batch: int) -> np.ndarray:
        return _stack(corpus.sequence_length, [record(position + batch * batch_size + int(row)) for row in rows])

    return _read_ahead(read, sys.maxsize)


class _Epochs:
    """Records again and again, shuffled anew each time; the epoch of record i is `i // len(records)`."""

    def __init__(self, records: Records, seed: tuple[int, ...]):
        self._count, self._seed = len(records), seed
        self._source = grain.MapDataset.source(records)
        self._order = functools.lru_cache(2)(self._shuffled)  # a batch may hold two epochs' records

    def __getitem__(self, number: int) -> np.ndarray:
        return self._order(number // self._count)[number % self._count]

    def _shuffled(self, epoch: int) -> grain.MapDataset:
        # A seed of its own, not seed + epoch: that would be the order of another run's epoch.
        seed = np.random.SeedSequence((*self._seed, epoch))
        return self._source.shuffle(seed=int(seed.generate_state(1)[0]))


def eval_batches(records: Records, batch_size: int, rows: np.ndarray):
    """Every record once, in order; the last batch is filled up with rows of -1.

    Returns: an iterator of int32 [len(rows), sequence_length + 1]. Its `close()` stops the reading ahead.
    """
    count = len(records)
    nothing = np.full(records.sequence_length + 1, PAD, np.int32)

    def read(batch: int) -> np.ndarray:
        numbers = (batch * batch_size + int(row) for row in rows)
        return _stack(records.sequence_length, [records[n] if n < count else nothing for n in numbers])

    return _read_ahead(read, -(-count // batch_size))


def _stack(sequence_length: int, batch: list[np.ndarray]) -> np.ndarray:
    return np.stack(batch) if batch else np.zeros((0, sequence_length + 1), np.int32)


def _read_ahead(read: Callable[[int], np.ndarray], batches: int):
    # One thread: with more, they wait for each other's Python.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    return iter(grain.MapDataset.range(batches).map(read).to_iter_dataset(options))
