"""The study's run, `configs/seed.py`, type-checked on meshes that no machine here has."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from maxsep.config import MeshConfig
from maxsep.config.cli import load_config
from maxsep.config.paths import REPOSITORY
from maxsep.config.validate import validate
from maxsep.parallel.mesh import abstract_mesh
from maxsep.training.step import Program


def seed(attention: int, expert: int):
    config = replace(load_config(str(REPOSITORY / "configs/seed.py")), mesh=MeshConfig(1, attention, expert))
    validate(config)
    return config


def test_the_model_has_the_studys_parameters():
    assert seed(4, 4).model.parameters == 13_565_407_232


def described(leaf):
    return leaf.shape, leaf.dtype, leaf.sharding.spec if leaf.ndim else None


@pytest.mark.parametrize("mesh", [(4, 4), (2, 8)], ids=lambda m: f"{m[0]}x{m[1]}")
def test_the_whole_train_step_type_checks_on_sixteen_devices(mesh):
    config = seed(*mesh)
    devices = abstract_mesh(config)
    with jax.sharding.use_abstract_mesh(devices):
        program = Program(config)
        train = config.train
        shape = (train.accumulation, train.batch_size // train.accumulation, config.data.sequence_length + 1)
        batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(devices, program.batch_spec))
        state = jax.eval_shape(program.init)
        after, metrics = jax.eval_shape(program.train_step, state, batch)
    assert jax.tree.map(described, after) == jax.tree.map(described, state)
    assert metrics["load_le"].shape == (4, 16)
    for leaf in jax.tree.leaves(state.optimizer):  # ZeRO-1: nothing of it is on two devices
        axes = jax.tree.leaves(tuple(leaf.sharding.spec)) if leaf.ndim else ["attention", "expert"]
        assert sorted(set(axes) & {"attention", "expert"}) == ["attention", "expert"]
    embedding_rows = config.model.padded_vocab_size - config.model.vocab_size
    padding = 2 * embedding_rows * config.model.d_model
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == config.model.parameters + padding
