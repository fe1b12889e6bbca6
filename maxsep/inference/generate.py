"""Completing prompts: batches through prefill and decoding, tokens handed over as they come, and how long it took."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxsep.cluster.job import ALONE, Job
from maxsep.inference.program import Program
from maxsep.inference.sampling import Sampling
from maxsep.measure import memory
from maxsep.parallel.sharding import fetched

TURN_SECONDS = 0.05  # of decoding between two looks at the new tokens, about
SIZES = 32  # new tokens and slots are made for multiples of it, so that few programs are compiled


@dataclass
class Completion:
    """What came after one prompt."""

    tokens: list[int] = field(default_factory=list)  # without the end of a text
    logprobs: list[float] = field(default_factory=list)  # of each, nats, before temperature and the rest
    ended: bool = False  # by the end of a text
    first: float = 0.0  # seconds from the batch's start to the first token
    last: float = 0.0  # to the last
    count: int = 0  # new tokens, the end of a text included

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time of a token after the first; None where there is none."""
        return (self.last - self.first) / (self.count - 1) if self.count > 1 else None


class Turn(NamedTuple):
    """Some tokens of a batch: those from `before` to `made`, which came from `start` to `end`."""

    before: int
    made: int
    start: float  # seconds from the batch's start
    end: float
    tokens_bn: np.ndarray  # all until now
    logprobs_bn: np.ndarray


class Generator:
    """A model with its weights, on the mesh that `jax.set_mesh` has set."""

    def __init__(self, program: Program, weights: dict, job: Job = ALONE):
        self.program, self.weights, self.job = program, weights, job
        self.compile_seconds = 0.0
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: Sampling,
        first_number: int = 0,
        rows: int = 1,
        told: Callable[[list[Completion]], None] = lambda completions: None,
    ) -> list[Completion]:
        """Completes a batch of prompts, whose numbers go on from `first_number`.

        Args:
            prompts: ids, at least one each.
            limits: the most new tokens of each, from 1.
            sampling: how tokens are chosen.
            first_number: of the first prompt, for random numbers.
            rows: at least so many, padding among them, so that a smaller last batch needs no other program.
            told: called with what there is, whenever there are new tokens.
        """
        completions = [Completion() for _ in prompts]
        for turn in self.turns(Batch(self.program, prompts, limits, first_number, rows), sampling):
            for row, completion in enumerate(completions):
                self._take(completion, turn, row, limits[row])
            told(completions)
        return completions

    def turns(self, batch: "Batch", sampling: Sampling, most: int | None = None) -> Iterator["Turn"]:
        """The new tokens of a batch as they come: the first of each sequence, then some more at a time.

        `most` are the tokens of a turn; None: as many as take `TURN_SECONDS`.
        """
        key = batch.shape, sampling.greedy, sampling.top_k, sampling.nucleus
        prefill = self._compiled("prefill", key, self._prefill, batch, sampling)
        begin = time.perf_counter()
        state = prefill(self.weights, *batch.arrays, sampling)
        before, start = 0, 0.0  # tokens until now, and the seconds that they took
        while True:
            self.job.at("generating")
            with self.job.waiting():
                busy, made = bool(state.busy), int(state.made)
                tokens_bn, logprobs_bn = fetched(state.tokens_bn)[0], fetched(state.logprobs_bn)[0]
            end = start + time.perf_counter() - begin
            yield Turn(before, made, start, end, tokens_bn, logprobs_bn)
            if not busy:
                return
            # The first token is not kept waiting for this program.
            decode = self._compiled("decode", key, self._decode, state, sampling)
            pace = 1 if before == 0 else max(1, int(TURN_SECONDS * (made - before) / (end - start)))
            pace = self.job.agree(most or pace)[0]  # clocks differ
            before, start = made, end
            begin = time.perf_counter()
            state = decode(self.weights, state, sampling, np.int32(made + pace))

    def _take(self, completion: Completion, turn: "Turn", row: int, limit: int) -> None:
        """Adds a turn's tokens, which came evenly between its start and its end."""
        for number in range(turn.before, turn.made):
            if completion.ended or completion.count >= limit:
                return
            token = int(turn.tokens_bn[row, number])
            completion.count += 1
            share = (number - turn.before + 1) / (turn.made - turn.before)
            completion.last = turn.start + (turn.end - turn.start) * share
            if number == 0:
                completion.first = completion.last
            completion.ended = token in self.program.ends
            if not completion.ended:
                completion.tokens.append(token)
                completion.logprobs.append(float(turn.logprobs_bn[row, number]))

    def _compiled(self, name: str, key: tuple, lowered: Callable, *args):
        if (name, key) not in self._programs:
            self.job.at("compiling")
            begin = time.perf_counter()
            takes = "more devices, a smaller --batch_size, or fewer tokens (--max_new_tokens, shorter prompts)"
            self._programs[name, key] = memory.fitting(lowered(*args), f"the {name} program", takes)
            self.compile_seconds += time.perf_counter() - begin
        return self._programs[name, key]

    def _prefill(self, batch: "Batch", sampling: Sampling):
        return lower_prefill(self.program, self.weights, batch.arrays, batch.shape, sampling)

    def _decode(self, state, sampling: Sampling):
        return lower_decode(self.program, self.weights, state, sampling)


class Shape(NamedTuple):
    """Of a batch, with padding that its layout divides."""

    rows: int
    length: int  # of the prompts
    slots: int  # of the cache
    most: int  # new tokens

    @classmethod
    def of(cls, program: Program, count: int, length: int, most: int) -> "Shape":
        """For so many prompts of at most `length` tokens, and at most `most` new tokens each."""
        rows = -(-count // program.rows) * program.rows
        length, most = padded(length, program.layout.ways("s")), -(-most // SIZES) * SIZES
        return cls(rows, length, -(-(length + most - 1) // SIZES) * SIZES, most)


def lower_prefill(program: Program, weights, arrays, shape: Shape, sampling: Sampling) -> jax.stages.Lowered:
    """Prefill of a batch's `arrays`, abstract or not: prompts, their lengths, numbers and limits."""
    prefill = jax.jit(program.prefill, static_argnums=(6, 7))
    return prefill.lower(weights, *arrays, sampling, shape.slots, shape.most)


def lower_decode(program: Program, weights, state, sampling: Sampling) -> jax.stages.Lowered:
    """Decoding of what prefill returns, which it takes the place of."""
    return jax.jit(program.decode, donate_argnums=1).lower(weights, state, sampling, np.int32(1))


class Batch:
    """Prompts as arrays on the mesh: padded to a length and a number of rows that the layout divides."""

    def __init__(self, program: Program, prompts, limits, first_number: int = 0, rows: int = 1):
        self.shape = Shape.of(program, max(rows, len(prompts)), max(map(len, prompts)), max(limits))
        count, length = self.shape.rows, self.shape.length
        tokens_bs, length_b = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        number_b, limit_b = np.arange(count, dtype=np.int32) + first_number, np.ones(count, np.int32)
        for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            tokens_bs[row, : len(prompt)], length_b[row], limit_b[row] = prompt, len(prompt), limit
        whole, rows = shardings(program)
        self.arrays = (jax.device_put(tokens_bs, whole), *jax.device_put([length_b, number_b, limit_b], rows))


def shardings(program: Program) -> tuple[NamedSharding, NamedSharding]:
    """Of prompts [B, S], and of what there is one of per prompt, on the mesh that is set."""
    axes, mesh = program.layout.axes("b"), jax.sharding.get_mesh()
    return NamedSharding(mesh, P(axes, None)), NamedSharding(mesh, P(axes))


def padded(length: int, parts: int) -> int:
    """A length of at least `length` that divides by `parts`: few different ones, of which each needs a program."""
    step = 16
    while step < min(length, 128):
        step *= 2
    size = -(-length // step) * step
    return -(-size // parts) * parts
