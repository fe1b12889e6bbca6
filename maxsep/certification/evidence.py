"""What a layout computes, as numbers on the host, to be compared with what one device computes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from maxsep.config import Config, MeshConfig
from maxsep.inference.generate import Batch, Generator
from maxsep.inference.program import Program
from maxsep.inference.sampling import Sampling
from maxsep.parallel.mesh import make_mesh
from maxsep.parallel.sharding import on_mesh
from maxsep.training.run import Run

STEPS, NEW, PROMPTS = 10, 8, (5, 12, 3)  # of training; of decoding, and the lengths of its prompts
FIGURES = ("loss", "total_loss", "load_balancing_loss", "router_z_loss", "grad_norm")
TOLERANCE = 1e-9
END_OF_TEXT = 0


@dataclass(frozen=True)
class Check:
    """One quantity of a layout beside that of one device."""

    run: str  # as ma:4x4
    quantity: str
    difference: float  # the largest, over the largest entry of the reference
    worst: str  # where
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


def alone(config: Config) -> Config:
    """The same on one device."""
    return replace(config, layout="ma", mesh=MeshConfig())


def gather(config: Config, start: Any = None) -> dict[str, Any]:
    """Trains ten steps, evaluates and decodes; by quantity a tree of arrays.

    Args:
        config: in float64, on its layout and mesh, for whose devices JAX has been started.
        start: a state on the host to start from; None: a new one, drawn from the seed.

    Returns:
        the quantities; `start` is the state that they begin with.
    """
    train, length = config.train, config.data.sequence_length
    rng = np.random.default_rng([train.seed, 1])
    shape = (STEPS, train.accumulation, train.batch_size // train.accumulation, length + 1)
    batches = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    batches[:, 0, -1, length // 2 :] = -1  # a text that ends
    held_out = rng.integers(config.model.vocab_size, size=(train.accumulation, *shape[2:]), dtype=np.int32)
    prompts = [rng.integers(1, config.model.vocab_size, size=n).tolist() for n in PROMPTS]
    found: dict[str, Any] = {}
    with jax.set_mesh(make_mesh(config)):
        run = Run(config, END_OF_TEXT)
        state = run.new_state()
        if start is not None:
            found["new state"] = jax.device_get(state)
            state = jax.tree.map(
                lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding), start, run.abstract_state
            )
        found["start"] = jax.device_get(state)
        step, losses = run.compile_train_step(), []
        for number, batch in enumerate(batches):
            state, metrics = step(state, jax.device_put(batch, run.batch_sharding))
            metrics = jax.device_get(metrics)
            losses.append(metrics["loss"])
            if number == 0:
                found |= {name.replace("_", " "): metrics[name] for name in FIGURES}
                found["choices per expert"] = metrics["load_le"]
                found["dropped choices"] = metrics["dropped_l"]
                first = jax.device_get(state)
                found["gradients"] = gradients(config, first.optimizer, metrics["grad_norm"])
                found["state after one update"] = first
        found["losses of ten steps"] = np.array(losses)
        found["state after ten steps"] = jax.device_get(state)
        found["held-out loss"] = evaluated(run, state, held_out)
        found |= decoded(config, state, prompts)
    return found


def evaluated(run: Run, state: Any, held_out: np.ndarray) -> float:
    """Nats per token of records [micro-batches, rows, S + 1]; a pipeline takes as many micro-batches as stages."""
    total, targets = 0.0, 0
    for first in range(0, len(held_out), run.stages):
        batch = np.full(run.eval_shape, -1, np.int32)
        some = held_out[first : first + run.stages]
        batch[: len(some)] = some
        one = run.eval_step(state.variables, jax.device_put(batch, run.batch_sharding))
        total, targets = total + float(one.cross_entropy), targets + int(one.targets)
    return total / targets


def gradients(config: Config, optimizer: Any, norm: Any) -> Any:
    """Those of a first step, from AdamW's first moments: (1 - b1) times the gradients, clipped to a norm."""

    def adam(part: Any) -> bool:
        return hasattr(part, "mu")

    (found,) = filter(adam, jax.tree.leaves(optimizer, is_leaf=adam))
    factor = max(1.0, float(norm) / config.optimizer.clip_norm) / (1 - config.optimizer.b1)
    return jax.tree.map(lambda mu: factor * np.asarray(mu), found.mu)


def decoded(config: Config, state: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Greedy tokens of the prompts, and their log-probabilities."""
    program = Program(config, END_OF_TEXT)
    # Inference has whole what training under `zero` stores in parts.
    variables = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), state.variables, on_mesh(program.abstract)
    )
    generator = Generator(program, program.weights(variables))
    batch = Batch(program, prompts, [NEW] * len(prompts))
    *_, last = generator.turns(batch, Sampling.of(0.0))
    made = (slice(0, len(prompts)), slice(0, NEW))
    return {"decoded tokens": last.tokens_bn[made], "log-probabilities of decoding": last.logprobs_bn[made]}


def compared(run: str, found: dict[str, Any], reference: dict[str, Any]) -> Iterator[Check]:
    """A check of each quantity: of a tree, of its worst leaf."""
    for quantity, got in found.items():
        if quantity == "start":
            continue
        expected = reference["start"] if quantity == "new state" else reference[quantity]
        pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
        differences = {jax.tree_util.keystr(path) or quantity: _difference(one, other) for (path, one), other in pairs}
        worst = max(differences, key=differences.get)
        yield Check(run, quantity, differences[worst], worst)


def _difference(one: Any, other: Any) -> float:
    """The largest, as a share of the reference's largest entry; infinite where a number is not finite."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.shape != other.shape or not np.isfinite(one).all() or not np.isfinite(other).all():
        return float("inf")
    if not one.size:
        return 0.0
    return float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-300))
