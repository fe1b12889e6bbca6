"""A config's train step on a mesh that no machine here has, as that of the study."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from maxsep.config import Config, MeshConfig
from maxsep.config.files import load_config
from maxsep.config.paths import REPOSITORY
from maxsep.config.validate import validate
from maxsep.parallel.mesh import abstract_mesh
from maxsep.training.step import Program, TrainState


class Abstract(NamedTuple):
    mesh: AbstractMesh
    program: Program
    state: TrainState  # of shapes with shardings
    batch: jax.ShapeDtypeStruct


def abstract(config: Config) -> Abstract:
    mesh, train = abstract_mesh(config), config.train
    with jax.sharding.use_abstract_mesh(mesh):
        program = Program(config)
        state = jax.eval_shape(program.init)
    shape = (train.accumulation, train.batch_size // train.accumulation, config.data.sequence_length + 1)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, program.batch_spec))
    return Abstract(mesh, program, state, batch)


def seed(layout: str, mesh: tuple[int, ...]):
    """`configs/seed.py` with nothing changed but layout and mesh."""
    config = load_config(str(REPOSITORY / "configs/seed.py"))
    config = replace(config, layout=layout, mesh=MeshConfig(*(1, *mesh)[-3:]))
    validate(config)
    return config
