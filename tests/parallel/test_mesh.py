"""Layouts, the mesh, and how ZeRO-1 splits what they replicate."""

import math

import pytest
from jax.sharding import PartitionSpec as P
from small import config

from maxsep.config.layouts import AXES
from maxsep.parallel.mesh import Layout, make_mesh, replicating_axes, zero_spec


def test_layout_splits_what_it_names():
    layout = Layout.of(config((4, 2)))
    assert layout.spec("bsd") == P(("expert",), ("attention",), None)
    assert layout.spec("ldhq") == P(None, None, ("attention",), None)
    assert layout.spec("ld-") == P(None, None, None)
    assert (layout.ways("e"), layout.ways("h"), layout.ways("d")) == (2, 4, 1)


def test_key_value_heads_are_split_where_they_divide():
    assert Layout.of(config((4, 2), model={"kv_heads": 8})).ways("k") == 4
    assert Layout.of(config((8, 2), model={"kv_heads": 4})).ways("k") == 1


def test_expert_is_the_innermost_axis():
    mesh = make_mesh(config((2, 8)))
    assert mesh.axis_names == AXES
    ids = [[device.id for device in row] for row in mesh.devices[0]]
    assert ids == [list(range(8)), list(range(8, 16))]


def named(part) -> list[str]:
    return [] if part is None else [part] if isinstance(part, str) else list(part)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 4), (1, 2, 8), (1, 16, 1), (1, 1, 16)])
@pytest.mark.parametrize("spec", [P(), P(None, ("expert",)), P(("attention",)), P(None, "expert", "attention")])
@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 32, 5), (16, 16, 48), (7, 16, 16)])
def test_zero_splits_over_what_replicates(sizes, spec, shape):
    zero, dim = zero_spec(spec, shape, sizes)
    size = dict(zip(AXES, sizes, strict=True))
    replicated = [axis for axis in replicating_axes(spec) if size[axis] > 1]
    before = [*spec, *[None] * (len(shape) - len(spec))]
    if dim is None:
        assert zero == spec
        whole = [n for n, part in zip(shape, before, strict=True) if part is None]
        assert not replicated or all(n % math.prod(size[axis] for axis in replicated) for n in whole)
    else:
        assert not [axis for axis in replicating_axes(zero) if size[axis] > 1]
        assert named(zero[dim]) == replicated
        assert shape[dim] % math.prod(size[axis] for axis in replicated) == 0
        others = [i for i in range(len(shape)) if i != dim]
        assert before[dim] is None
        assert [named(zero[i]) for i in others] == [named(before[i]) for i in others]
