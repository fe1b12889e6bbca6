"""What a layout computes, as numbers on the host, to be compared with what one device computes."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from maxsep.certification.rig import END_OF_TEXT, Rig, gradients, on_devices, on_host
from maxsep.config import Config
from maxsep.inference.generate import Batch, Generator
from maxsep.inference.program import Program
from maxsep.inference.sampling import Sampling
from maxsep.parallel.sharding import on_mesh

TOLERANCE = 1e-9
STEPS, NEW, PROMPTS = 10, 8, (5, 12, 3)  # of training; of decoding, and the lengths of its prompts
LAST = "state after ten steps"
FIGURES = ("loss", "total_loss", "load_balancing_loss", "router_z_loss", "grad_norm")  # of a step


def batches(config: Config, steps: int) -> np.ndarray:
    """Random records [steps, accumulation, micro-batch, S + 1]; one of each batch ends early."""
    train, length = config.train, config.data.sequence_length
    rng = np.random.default_rng([train.seed, 1])
    shape = (steps, train.accumulation, train.batch_size // train.accumulation, length + 1)
    records = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    records[:, 0, -1, length // 2 :] = -1
    return records


def figures(config: Config, state: Any, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is compared of a first step: `state` after it on the host, and its figures."""
    return {
        **{name.replace("_", " "): found[name] for name in FIGURES},
        "choices per expert": found["load_le"],
        "dropped choices": found["dropped_l"],
        "gradients": gradients(config, state, found["grad_norm"]),
    }


def gathered(rig: Rig, start: Any = None) -> Iterator[tuple[str, Any]]:
    """Trains ten steps, evaluates and decodes: quantities and their trees of arrays on the host, as they come.

    Args:
        rig: of a config in float64.
        start: a state on the host to start from; None: a new one, drawn from the seed, which is `new state`.
    """
    config, state = rig.config, rig.new_state()
    yield "new state", on_host(state)
    if start is not None:
        state = rig.placed(start)
    losses = []
    for number, batch in enumerate(batches(config, STEPS)):
        state, metrics = rig.train(state, batch)
        losses.append(metrics["loss"])
        if number == 0:
            first = on_host(state)
            yield from figures(config, first, metrics).items()
            yield "state after one update", first
    yield "losses of ten steps", np.array(losses)
    yield LAST, on_host(state)
    with jax.set_mesh(rig.mesh):
        yield "held-out loss", evaluated(rig, state)
        yield from decoded(config, state).items()


def evaluated(rig: Rig, state: Any) -> float:
    """Nats per token of other records; a pipeline takes as many micro-batches as stages."""
    run, config = rig.run, rig.config
    rng = np.random.default_rng([config.train.seed, 2])
    shape = (config.train.accumulation, *run.batch_shape[1:])
    held_out = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    like = jax.ShapeDtypeStruct(run.eval_shape, np.int32, sharding=run.batch_sharding)
    total, targets = 0.0, 0
    for first in range(0, len(held_out), run.stages):
        batch = np.full(run.eval_shape, -1, np.int32)
        some = held_out[first : first + run.stages]
        batch[: len(some)] = some
        one = on_host(run.eval_step(state.variables, on_devices(batch, like)))
        total, targets = total + float(one.cross_entropy), targets + int(one.targets)
    return total / targets


def decoded(config: Config, state: Any) -> dict[str, Any]:
    """Greedy tokens of prompts, and their log-probabilities."""
    rng = np.random.default_rng([config.train.seed, 3])
    prompts = [rng.integers(1, config.model.vocab_size, size=n).tolist() for n in PROMPTS]
    program = Program(config, END_OF_TEXT)
    # Inference has whole what training under `zero` stores in parts.
    variables = on_devices(on_host(state.variables), on_mesh(program.abstract))
    generator = Generator(program, program.weights(variables))
    *_, last = generator.turns(Batch(program, prompts, [NEW] * len(prompts)), Sampling.of(0.0), most=NEW)
    made = (slice(0, len(prompts)), slice(0, NEW))
    return {"decoded tokens": last.tokens_bn[made], "log-probabilities of decoding": last.logprobs_bn[made]}
