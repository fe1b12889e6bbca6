"""The program of a config, called as the train step calls it: gradients of one step, and losses of a few."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from small import SEED, text

from maxsep.config import Config
from maxsep.measure import hlo
from maxsep.parallel.mesh import make_mesh
from maxsep.training.run import Run

END_OF_TEXT = 3


def wide(c: Config):
    """The context in which a config's program is made and run."""
    return jax.enable_x64(c.model.dtype == "float64")


@functools.cache
def run(c: Config, ids: int | None = None) -> Run:
    with wide(c), jax.set_mesh(make_mesh(c)):
        made = Run(c, END_OF_TEXT, ids)
    made.gradients = jax.jit(made.program._gradients)
    made.train_step = functools.cache(made.compile_train_step)
    return made


def optimised(lowered) -> hlo.Module:
    """The program that XLA makes of a lowered function."""
    return hlo.parse(lowered.compile().as_text())


def model(params, buffers=None) -> dict:
    """A model's variables; by default of one without buffers."""
    return {"params": params, "buffers": {} if buffers is None else buffers}


def placed(tree, like):
    return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding), tree, like)


def gradients(c: Config, params, batch, step: int = 0, ids: int | None = None, buffers=None):
    """Gradients and metrics of a step at `params`, as the train step computes them, with a tokenizer of so many ids."""
    r = run(c, ids)
    with wide(c), jax.set_mesh(r.mesh):
        batch = jax.device_put(batch, r.batch_sharding)
        return jax.device_get(
            r.gradients(placed(model(params, buffers), r.abstract_state.variables), batch, np.int32(step))
        )


def first_step(c: Config, params, batch):
    """Gradients and figures of a first step at `params`, of a program made anew."""
    with wide(c), jax.set_mesh(make_mesh(c)):
        r = Run(c, END_OF_TEXT)
        gradients, program = r.program._gradients, r.program

        def both(variables, batch):
            found = []

            def seen(*arguments):
                found.append(gradients(*arguments))
                return found[-1]

            program._gradients = seen
            return program.train_step(program.fresh(**variables), batch)[1], found[0][0]

        batch = jax.device_put(batch, r.batch_sharding)
        figures, of_step = jax.device_get(jax.jit(both)(placed(model(params), r.abstract_state.variables), batch))
        return of_step, figures


def parameters(c: Config, draw: int = 0):
    """Parameters of a config in float64, larger than a new model's: no gradient is lost in rounding."""
    return drawn(run(c).abstract_state.params, [SEED, 5, draw])


def drawn(abstract, seed: list[int]):
    """A tree of parameters of these shapes, in float64."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        noise = rng.normal(size=x.shape)
        return 1 + noise / 4 if path[-1].key == "scale" else noise / 4

    return jax.tree_util.tree_map_with_path(draw, abstract)


def leaves_differ(got, expected) -> dict[str, float]:
    """Largest difference of each leaf as a share of its largest entry."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    pairs = zip(paths, jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return {path: float(np.abs(a - b).max() / np.abs(b).max()) for path, a, b in pairs}


@functools.cache
def initial(c: Config):
    r = run(c)
    with wide(c), jax.set_mesh(r.mesh):
        return jax.device_get(r.new_state())


class Trained(NamedTuple):
    losses: list[float]
    moved: float  # largest change of a router weight
    dropped: list[int]  # choices, of all layers


@functools.cache
def trained(c: Config, weights: Config | None = None) -> Trained:
    """What `train.steps` steps on the same text come to.

    `weights` is the config whose new state it starts from: c, or one of another mesh or seed. That a mesh does not
    change it is a test of its own, in training/test_step.py.
    """
    r = run(c)
    new = initial(weights or c)
    with wide(c), jax.set_mesh(r.mesh):
        state, step = placed(new, r.abstract_state), r.train_step()
        losses, dropped = [], []
        for batch in text(c, c.train.steps):
            state, metrics = step(state, jax.device_put(batch, r.batch_sharding))
            losses.append(float(metrics["loss"]))
            dropped.append(int(metrics["dropped_l"].sum()))
        before, after = (
            s.params["segments"]["moe"]["feed_forward"]["router"]["w_de"] for s in (new, jax.device_get(state))
        )
    return Trained(losses, float(np.abs(after - before).max()), dropped)
