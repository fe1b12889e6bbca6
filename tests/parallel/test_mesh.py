"""The mesh of devices."""

from small import config

from maxsep.config.layouts import AXES
from maxsep.parallel.mesh import make_mesh


def test_expert_is_the_innermost_axis():
    mesh = make_mesh(config((2, 8)))
    assert mesh.axis_names == AXES
    ids = [[device.id for device in row] for row in mesh.devices[0]]
    assert ids == [list(range(8)), list(range(8, 16))]
