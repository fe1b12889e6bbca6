"""A config's train step on its mesh, between numbers on the host."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from maxsep.config import Config, MeshConfig
from maxsep.parallel.mesh import make_mesh, mesh_of
from maxsep.parallel.sharding import fetched
from maxsep.training.run import Run

END_OF_TEXT = 0


class Rig:
    """What trains `config`, compiled.

    Args:
        config: on its layout and mesh.
        device: where a mesh of one device is; None: the first one of this process.
    """

    def __init__(self, config: Config, device: jax.Device | None = None):
        self.config = config
        if config.mesh == MeshConfig():
            self.mesh = mesh_of(np.array([device or jax.local_devices()[0]]).reshape(1, 1, 1))
        else:
            self.mesh = make_mesh(config)
        with jax.set_mesh(self.mesh):
            self.run = Run(config, END_OF_TEXT)
            self.step = self.run.compile_train_step()

    def new_state(self) -> Any:
        """Drawn from the seed, on the devices."""
        with jax.set_mesh(self.mesh):
            return self.run.new_state()

    def placed(self, state: Any) -> Any:
        """A state of arrays on the host, on the devices, in this config's dtypes."""
        return on_devices(state, self.run.abstract_state)

    def train(self, state: Any, batch: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
        """A step: the next state on the devices, and its figures on the host. Donates `state`.

        `batch`: records [accumulation, micro-batch, S + 1], the same in all processes.
        """
        with jax.set_mesh(self.mesh):
            like = jax.ShapeDtypeStruct(batch.shape, np.int32, sharding=self.run.batch_sharding)
            state, figures = self.step(state, on_devices(batch, like))
            return state, on_host(figures)


def on_host(tree: Any) -> Any:
    """Global arrays as NumPy's, whole in each process; all processes have to ask for it."""
    return jax.tree.map(fetched, tree)


def on_devices(tree: Any, like: Any) -> Any:
    """NumPy's arrays, which all processes have, as global arrays with the dtypes and shardings of `like`."""

    def place(x: Any, like: Any) -> jax.Array:
        x = np.asarray(x, like.dtype)
        return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])

    return jax.tree.map(place, tree, like)


def alone(config: Config) -> Config:
    """The same on one device."""
    return replace(config, layout="ma", mesh=MeshConfig())


def gradients(config: Config, state: Any, norm: Any) -> Any:
    """Those of a first step, from AdamW's first moments after it, which are (1 - b1) times them, clipped to a norm.

    Args:
        config: of the step.
        state: on the host, after it.
        norm: of the gradients, before they were clipped.
    """

    def adam(part: Any) -> bool:
        return hasattr(part, "mu")

    optimizer = config.optimizer
    (found,) = filter(adam, jax.tree.leaves(state.optimizer, is_leaf=adam))
    factor = max(1.0, float(norm) / optimizer.clip_norm) / (1 - optimizer.b1)
    return jax.tree.map(lambda mu: factor * np.asarray(mu), found.mu)
