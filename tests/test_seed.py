"""The study's run, `configs/seed.py`, type-checked on meshes that no machine here has, and what it costs there."""

from dataclasses import replace

import jax
import pytest
from abstract import abstract, seed
from small import ROWS, named

from maxsep.config.matrices import parameters
from maxsep.config.paths import REPOSITORY
from maxsep.measure.communication import sent
from maxsep.measure.memory import of_state
from maxsep.parallel.pipeline import bubble


def test_the_model_has_the_studys_parameters():
    assert parameters(seed("ma", (4, 4)).model) == 13_565_407_232


ROLES = {  # of what is sent, and the table's names for them
    "sent a step: attention": "attention",
    "dispatch": "dispatch",
    "between stages": "stages",
    "embedding and head": "embedding, head",
    "gradients": "gradients",
    "parameters": "parameters",
}


def described(leaf):
    return leaf.shape, leaf.dtype, leaf.sharding.spec if leaf.ndim else None


@pytest.mark.parametrize(
    ("layout", "mesh"),
    [
        pytest.param(layout, mesh, marks=pytest.mark.exhaustive if number else pytest.mark.slow)
        for layout, meshes in ROWS.items()
        for number, mesh in enumerate(meshes)
    ],
    ids=lambda value: value if isinstance(value, str) else named(value),
)
def test_the_whole_train_step_type_checks_on_sixteen_devices(layout, mesh):
    config = seed(layout, mesh)
    devices, program, state, batch = abstract(config)
    with jax.sharding.use_abstract_mesh(devices):
        after, metrics = jax.eval_shape(program.train_step, state, batch)
    assert jax.tree.map(described, after) == jax.tree.map(described, state)
    assert metrics["load_le"].shape == (4, 16)
    padding = 2 * (config.model.padded_vocab_size - config.model.vocab_size) * config.model.d_model
    stored = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert stored == parameters(config.model) + padding
    # ZeRO-1: nothing of the optimizer's state is on two devices, but for two counts of steps.
    assert of_state(state)["optimizer"] == 2 * 4 * stored / 16 + 2 * 4


@pytest.mark.slow
def test_what_the_page_on_layouts_says_of_the_studys_run():
    """The table of docs/layouts.md, GB a device."""
    page = (REPOSITORY / "docs" / "layouts.md").read_text(encoding="utf-8")
    table = page.split("## The study's run")[1].split("The study's table")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    rows = {name: values for name, *values in cells}
    for number, (layout, meshes) in enumerate(ROWS.items()):
        config = seed(layout, meshes[0])
        devices, program, state, batch = abstract(config)
        unsplit = abstract(replace(config, optimizer=replace(config.optimizer, zero1=False))).state
        idle = bubble(program.layout.ways("l"), config.train.accumulation)
        memory, bytes_sent = of_state(state), sent(program.train_step, state, batch, mesh=devices, busy=1 - idle)
        said = {name: values[number] for name, values in rows.items()}
        assert said["weights, and gradients as much"] == f"{memory['weights'] / 1e9:.2f}"
        optimizer = (memory["optimizer"] / 1e9, of_state(unsplit)["optimizer"] / 1e9)
        assert said["optimizer state (without ZeRO-1)"] == "{:.2f} ({:.2f})".format(*optimizer)
        for name, role in ROLES.items():
            assert float(said[name]) == round(bytes_sent[role] / 1e9, 1)
        assert float(said["bubble"].removesuffix(" %")) == round(100 * idle, 1)
