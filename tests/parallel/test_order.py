"""Which axis of the mesh lies inside a node."""

from dataclasses import replace

import pytest
from small import config

from maxsep.config import MeshConfig, files
from maxsep.parallel.order import between, inner

CAPACITY = {"model": {"capacity_factor": 1.0}}
ROOM = {"model": {"exchange_factor": 4.0}}  # for four times a balanced load: all that there can be


@pytest.mark.parametrize(
    "shape, changed, near, axis",
    [
        # In one node nothing crosses: the axis that sends more.
        ((4, 4), ROOM, 16, "expert"),
        ((4, 4), CAPACITY, 16, "attention"),
        ((4, 4), {"layout": "tp"}, 16, "attention"),
        ((16, 1), {}, 16, "attention"),
        ((1, 16), {}, 16, "expert"),
        ((1, 1), {}, 1, "expert"),
        # Nodes of 4: what crosses them is 3/4 of the dispatch, or all that attention sends.
        ((4, 4), ROOM, 4, "expert"),
        ((4, 4), CAPACITY, 4, "attention"),
        ((2, 8), CAPACITY, 4, "attention"),
    ],
)
def test_less_crosses_nodes_or_the_axis_that_sends_more_is_inside(shape, changed, near, axis):
    c = config(shape, train={"batch_size": 4096}, **changed)  # far more tokens than weights
    assert inner(c, near) == axis
    other = {"expert": "attention", "attention": "expert"}[axis]
    assert inner(replace(c, mesh=replace(c.mesh, inner=other)), near) == other, "what is asked for"


# GB from node to node with attention inside, and with expert, as the compiled program sends them:
# python -m maxsep.plan --config=configs/seed.py --cluster=a100-80gb:4x4
STUDY = {
    ("ma", 4, 4): (26.8, 83.8),
    ("ma", 2, 8): (27.0, 45.7),
    ("ma", 8, 2): (73.9, 112.8),
    ("ma_folded", 4, 4): (26.8, 90.2),
    ("ma_folded", 8, 2): (63.7, 100.9),
    ("tp", 4, 4): (20.3, 116.0),
    ("tp", 8, 2): (74.5, 135.3),
    ("zero", 2, 8): (98.4, 486.3),
    ("zero", 4, 4): (92.7, 1282.1),
    ("zero", 8, 2): (790.1, 1490.4),
}


@pytest.mark.parametrize("layout, attention, expert", STUDY)
def test_what_crosses_is_what_the_compiled_program_sends_there(layout, attention, expert):
    """Within a fifth: on 8x2 XLA sends tokens again, where memory is short."""
    mesh = MeshConfig(attention=attention, expert=expert)
    c = replace(files.load_config("configs/seed.py"), layout=layout, mesh=mesh)
    for axis, compiled in zip(("attention", "expert"), STUDY[layout, attention, expert], strict=True):
        assert between(c, axis, 4) / 1e9 == pytest.approx(compiled, rel=0.2)
    assert inner(c, 4) == "attention"


def test_few_large_micro_batches_are_not_many_small_ones():
    """Weights are gathered once a micro-batch: with enough of them they count for more than tokens."""
    c = replace(files.load_config("configs/seed.py"), layout="zero", mesh=MeshConfig(attention=4, expert=4))
    few = replace(c, train=replace(c.train, accumulation=1))
    assert between(c, "expert", 4) > 20 * between(few, "expert", 4)
