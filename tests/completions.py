"""Programs for inference, called as infer.py calls them: completions and scores of prompts, on any mesh."""

import functools

import jax
import numpy as np
from programs import END_OF_TEXT, drawn, wide
from small import SEED

from maxsep.config import Config
from maxsep.inference.generate import Completion, Generator
from maxsep.inference.program import Program
from maxsep.inference.sampling import Sampling
from maxsep.inference.score import score
from maxsep.parallel.mesh import make_mesh

SAMPLED = Sampling.of(1.0, top_k=100, top_p=0.95, seed=SEED + 7)
GREEDY = Sampling.of(0.0)


def prompts(c: Config, lengths=(7, 16, 1, 4, 9)) -> list[list[int]]:
    """Random ids, ends of a text among them."""
    rng = np.random.default_rng([SEED, 11])
    found = [rng.integers(c.model.vocab_size, size=length).tolist() for length in lengths]
    found[1][5] = END_OF_TEXT
    return found


@functools.cache
def generator(c: Config) -> Generator:
    with wide(c), jax.set_mesh(make_mesh(c)):
        return Generator(Program(c, END_OF_TEXT), {})


def parameters(c: Config, draw: int = 0):
    """Of a config, in float64, larger than a new model's."""
    return drawn(generator(c).program.abstract["params"], [SEED, 13, draw])


@functools.cache
def buffers(c: Config):
    """Of a config: biases of its routers, if they have any."""
    return drawn(generator(c).program.abstract["buffers"], [SEED, 19])


def weights(c: Config, params):
    """`params` and `buffers` on the config's mesh, which must be set."""
    of, mesh = generator(c).program, jax.sharding.get_mesh()

    def place(x, like):
        sharding = jax.sharding.NamedSharding(mesh, like.sharding.spec)
        return jax.device_put(np.asarray(x, like.dtype), sharding)

    return of.weights(jax.tree.map(place, {"params": params, "buffers": buffers(c)}, of.abstract))


def completed(
    c: Config, params, given: list[list[int]], limits: list[int], sampling: Sampling, first_number: int = 0
) -> list[Completion]:
    with wide(c), jax.set_mesh(make_mesh(c)):
        generator(c).weights = weights(c, params)
        return generator(c).complete(given, limits, sampling, first_number)


def scored(c: Config, params, texts: list[list[int]], batch_size: int) -> list[list[float]]:
    with wide(c), jax.set_mesh(make_mesh(c)):
        return score(generator(c).program, weights(c, params), texts, batch_size)
