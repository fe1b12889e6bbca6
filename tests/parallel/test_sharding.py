"""How a sharding is split further, over the devices that hold copies: ZeRO-1, and weights at rest."""

import math

import pytest
from jax.sharding import PartitionSpec as P

from maxsep.config.layouts import AXES
from maxsep.parallel.sharding import Split, added, axes_of, replicating_axes, split_further


def test_axes_of_a_dimension():
    spec = P(None, "expert", ("stage", "attention"))
    assert [axes_of(spec, dim) for dim in range(4)] == [(), ("expert",), ("stage", "attention"), ()]
    assert replicating_axes(spec) == ()
    assert replicating_axes(P(None, "expert")) == ("stage", "attention")


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 4), (2, 2, 8), (1, 16, 1), (1, 1, 16)])
@pytest.mark.parametrize("spec", [P(), P(None, ("expert",)), P(("attention",)), P(None, "expert", "attention")])
@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 32, 5), (16, 16, 48), (7, 16, 12)])
@pytest.mark.parametrize("over", [AXES, ("expert",)])
def test_splits_over_as_many_copies_as_divide(sizes, spec, shape, over):
    dims = [2, 0, 1]
    further, split = split_further(spec, shape, sizes, over, dims)
    size = dict(zip(AXES, sizes, strict=True))
    whole = [dim for dim in dims if not axes_of(spec, dim)]
    free = [axis for axis in replicating_axes(spec) if axis in over and size[axis] > 1]
    subsets = [[axis for i, axis in enumerate(free) if bits >> i & 1] for bits in range(2 ** len(free))]
    ways = {math.prod(size[axis] for axis in axes) for axes in subsets}
    most = max(way for way in ways if way == 1 or any(shape[dim] % way == 0 for dim in whole))
    if most == 1:
        assert (further, split) == (spec, None)
        return
    assert set(split.axes) <= set(free)
    assert math.prod(size[axis] for axis in split.axes) == most
    assert split.dim == next(dim for dim in whole if shape[dim] % most == 0)
    assert axes_of(further, split.dim) == split.axes
    assert all(axes_of(further, dim) == axes_of(spec, dim) for dim in range(3) if dim != split.dim)
    assert added(spec, further) == split


def test_nothing_added():
    assert added(P(None, "expert"), P(None, ("expert",))) is None
    assert added(P(), P(None, "expert")) == Split(("expert",), 1)
