"""The mesh of devices."""

import dataclasses

import pytest
from small import config

from maxsep.config.layouts import AXES
from maxsep.parallel.mesh import inner, make_mesh, neighbours


def meant(c, axis):
    return dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, inner=axis))


def test_neighbours_lie_along_the_inner_axis():
    c = config((2, 8))
    ids = {
        axis: [[device.id for device in row] for row in make_mesh(meant(c, axis)).devices[0]]
        for axis in ("expert", "attention")
    }
    assert make_mesh(c).axis_names == AXES
    assert ids["expert"] == [list(range(8)), list(range(8, 16))]
    assert ids["attention"] == [list(range(0, 16, 2)), list(range(1, 16, 2))]


@pytest.mark.parametrize(
    "shape, changed, axis",
    [
        ((4, 4), {}, "expert"),  # 1 + 4 against 2 x 4 x 2: dropless, every device may get all
        ((4, 4), {"model": {"capacity_factor": 1.0}}, "attention"),  # 1 + 4 against 2 x 2
        ((2, 8), {"model": {"capacity_factor": 1.0}}, "expert"),  # 1 + 2 against 2 x 2
        ((4, 4), {"layout": "tp"}, "attention"),
        ((16, 1), {}, "attention"),
        ((1, 16), {}, "expert"),
        ((1, 1), {}, "expert"),
    ],
)
def test_the_axis_that_sends_more_is_inside(shape, changed, axis):
    c = config(shape, **changed)
    assert inner(c) == axis
    other = {"expert": "attention", "attention": "expert"}[axis]
    assert inner(meant(c, other)) == other
    assert (axis in neighbours(c)) == (min(shape) > 1)
