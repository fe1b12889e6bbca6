"""The mesh of devices."""

import dataclasses

from small import config

from maxsep.config.layouts import AXES
from maxsep.parallel.mesh import make_mesh, neighbours


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


def test_a_run_shows_which_axis_lies_inside():
    for shape in ((4, 4), (16, 1)):
        c = meant(config(shape), "attention")
        shown = neighbours(c, make_mesh(c).devices.ravel())
        assert shown == (", neighbours along attention (mesh.inner=attention)" if min(shape) > 1 else "")
