"""Scoring: the log-probability of each token of a text, given those before it."""

from collections.abc import Sequence

import jax
import numpy as np

from maxsep.cluster.job import ALONE, Job
from maxsep.inference.generate import padded, shardings
from maxsep.inference.program import Program
from maxsep.measure import memory
from maxsep.parallel.sharding import fetched


def score(
    program: Program, weights: dict, texts: Sequence[Sequence[int]], batch_size: int, job: Job = ALONE
) -> list[list[float]]:
    """The log-probabilities (nats) of each text's ids from the second on, `batch_size` texts at a time."""
    whole, rows = shardings(program)
    lower, compiled, found = jax.jit(program.score).lower, {}, []
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        count = -(-min(batch_size, len(texts)) // program.rows) * program.rows
        length = padded(max(max(map(len, batch)) - 1, 1), program.layout.ways("s"))
        tokens_bs, targets_bs = np.zeros((count, length), np.int32), np.full((count, length), -1, np.int32)
        length_b = np.zeros(count, np.int32)
        for row, ids in enumerate(batch):
            length_b[row] = len(ids) - 1
            tokens_bs[row, : len(ids) - 1], targets_bs[row, : len(ids) - 1] = ids[:-1], ids[1:]
        arrays = jax.device_put(tokens_bs, whole), jax.device_put(targets_bs, whole), jax.device_put(length_b, rows)
        if (count, length) not in compiled:
            job.at("compiling")
            takes = "more devices, a smaller --batch_size, or shorter texts"
            compiled[count, length] = memory.fitting(lower(weights, *arrays), "the scoring program", takes)
        job.at("scoring")
        scores = compiled[count, length](weights, *arrays)
        with job.waiting():
            scores_bs = fetched(scores)[0]
        found += [scores_bs[row, : len(ids) - 1].tolist() for row, ids in enumerate(batch)]
    return found
